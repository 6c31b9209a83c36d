"""Damaged checkpoints, folders and GGUF files: `checkpoint_cases.py ROUNDS SEED WORK`.

Each is opened, its tokenizer is written as a bundle has it, and every tensor's first row is read, in a forked process
with limits; one in eight is exported. Prints a JSON object: how many there were, what was bad, what was refused.
"""

import json
import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # a forked process has none of its parent's threads, and would wait for them
sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
import limited_child
import plain_checkpoints
from mutations import VALUES, damage_bytes, damage_json, damage_safetensors, dump

from starling.export.bundle_folder import write_tokenizer
from starling.export.checkpoints.model_source import open_checkpoint
from starling.export.exporter import ExportOptions, export_bundle

#: An export takes some of them on a busy machine.
SECONDS = 60.0
JSON_FILES = ("config.json", "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
#: Settings of config.json that ask for code, for far too much, or for something else.
SETTINGS: tuple[dict[str, Any], ...] = (
    {"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}},
    {"attn_implementation": "kernels-community/evil"},
    {"_attn_implementation": "evil/evil"},
    {"torch_dtype": "evil"},
    {"dtype": "int8"},
    {"num_hidden_layers": 10**7},
    {"num_hidden_layers": 100},
    {"hidden_size": 10**9},
    {"vocab_size": 10**12},
    {"num_labels": 10**9},
    {"model_type": "bert"},
    {"model_type": "gpt2", "n_positions": 2**30},
    {"architectures": ["Evil"]},
    {"rope_parameters": {"rope_type": "x"}},
    {"rope_scaling": {"type": "yarn", "factor": 1e308}},
    {"quantization_config": "x"},
    {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 10**30}},
    {"quantization_config": {"quant_method": "fp8", "weight_block_size": [1, 2**31 - 1]}},
    {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": 4}}}},
    {"layer_types": ["x"] * 100_000},
    {"hidden_act": "os.system"},
    {"head_dim": 0},
    {"head_dim": 10**6},
    {"num_key_value_heads": 0},
    {"num_attention_heads": 0},
    {"id2label": {"a": 1}},
    {"torchscript": "x"},
    {"max_position_embeddings": 2**31 - 1},
    {"max_position_embeddings": 0},
    {"sliding_window": -5},
    {"rms_norm_eps": "x"},
)
WEIGHT_MAPS: tuple[Any, ...] = ({}, {"a": "../x"}, {"a": 1}, {"a": None}, {"a": ["x"]}, {"a": "/etc/passwd"}, [1], 5)
NESTED = (b"[" * 100_000 + b"]" * 100_000, b'{"a":' * 100_000 + b"1" + b"}" * 100_000)


def damage_folder(folder: Path, dice: random.Random) -> str:
    """Spoil one file of the folder; which one."""
    choices: tuple[Callable[[Path, random.Random], str], ...] = (_json, _json, _json, _weights, _weights, _config)
    return dice.choice((*choices, _config, _index, _nested, _only_vocabulary, _template, _bytes))(folder, dice)


def _json(folder: Path, dice: random.Random) -> str:
    file = folder / dice.choice(JSON_FILES)
    file.write_bytes(dump(damage_json(json.loads(file.read_text()), dice)))
    return file.name


def _config(folder: Path, dice: random.Random) -> str:
    file, settings = folder / "config.json", dice.choice(SETTINGS)
    file.write_bytes(dump(json.loads(file.read_text()) | settings))
    return f"config.json: {next(iter(settings))}"


def _weights(folder: Path, dice: random.Random) -> str:
    file = folder / "model.safetensors"
    file.write_bytes(dice.choice((damage_safetensors, damage_safetensors, damage_bytes))(file.read_bytes(), dice))
    return file.name


def _index(folder: Path, dice: random.Random) -> str:
    (folder / "model.safetensors.index.json").write_bytes(dump({"weight_map": dice.choice(WEIGHT_MAPS)}))
    return "index"


def _nested(folder: Path, dice: random.Random) -> str:
    file = folder / dice.choice(JSON_FILES)
    file.write_bytes(dice.choice(NESTED))
    return f"nested {file.name}"


def _only_vocabulary(folder: Path, dice: random.Random) -> str:
    (folder / "tokenizer.json").unlink()
    name = dice.choice(("tokenizer.model", "tekken.json", "vocab.json"))
    contents = (b"", b"\x00" * 100, dice.randbytes(500), b"{}", b"[1]", b'{"a": 0}', dump({"config": {"pattern": "("}}))
    (folder / name).write_bytes(dice.choice(contents))
    return f"only {name}"


def _template(folder: Path, dice: random.Random) -> str:
    file = folder / "tokenizer_config.json"
    named = [{"name": dice.choice(VALUES), "template": dice.choice(("text", "{{", 5, None, "{% include 'x' %}"))}]
    file.write_bytes(dump(json.loads(file.read_text()) | {"chat_template": dice.choice((named, *VALUES))}))
    return "chat_template"


def _bytes(folder: Path, dice: random.Random) -> str:
    file = folder / dice.choice(JSON_FILES)
    file.write_bytes(damage_bytes(file.read_bytes(), dice))
    return f"bytes of {file.name}"


def use(model: Path, out: Path, whole: bool) -> None:
    """Open MODEL and read all of it that an export reads; `whole`: export it."""
    checkpoint = open_checkpoint(str(model))
    if whole:
        export_bundle(checkpoint, out / "bundle", ExportOptions())
        return
    for name in checkpoint.tensors.names():
        checkpoint.tensors.rows(name, 0, 1)
    write_tokenizer(out, checkpoint.tokenizer, checkpoint.generation)


def main(rounds: int, seed: int, work: Path) -> dict[str, Any]:
    """Try `rounds` damaged folders and as many files."""
    dice = random.Random(seed)
    folder = plain_checkpoints.write_folder(work / "plain")
    file = plain_checkpoints.write_gguf(work / "plain.gguf")
    # Once whole, in this process: each fork has everything loaded.
    (work / "first").mkdir()
    use(folder, work / "first", whole=True)
    use(file, work / "first", whole=False)
    content, counts, bad, refusals = file.read_bytes(), Counter[str](), [], Counter[str]()
    for number in range(2 * rounds):
        spoilt, out = work / "spoilt", work / "out"
        for place in (spoilt, out):
            shutil.rmtree(place, ignore_errors=True)
        out.mkdir()
        if number % 2:
            what, model = damage_folder(Path(shutil.copytree(folder, spoilt)), dice), spoilt
        else:
            spoilt.mkdir()
            what, model = "gguf", spoilt / "m.gguf"
            model.write_bytes(damage_bytes(damage_bytes(content, dice) if dice.random() < 0.3 else content, dice))
        before = {*spoilt.rglob("*"), *work.iterdir()}
        ended = limited_child.run_limited(
            lambda model=model, out=out, whole=number % 8 == 1: use(model, out, whole), work / "log", seconds=SECONDS
        )
        counts["gguf" if number % 2 == 0 else "folder"] += 1
        outside = {*spoilt.rglob("*"), *work.iterdir()} - before - {work / "log"}
        if outside or ended.bad:
            fault = ended.bad or f"wrote {outside}"
            bad.append({"number": number, "what": what, "bad": fault, "text": ended.text[-900:]})
        refusals["opened" if ended.code == 0 else "a line" if "error: " in ended.text else ended.text[-80:]] += 1
    return {"counts": counts, "bad": bad, "refusals": refusals}


if __name__ == "__main__":
    print("\n" + json.dumps(main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))))
