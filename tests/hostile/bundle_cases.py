"""Damaged bundles, inspected and run as on the command line: `bundle_cases.py BUNDLE ROUNDS SEED WORK`.

One file of a copy is damaged; most often bundle.json is made to agree, as a hostile author would. Each is run in a
forked process with limits. Prints a JSON object: how many there were, what was bad, what was refused.
"""

import hashlib
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
import onnx
from mutations import damage_bytes, damage_json, dump
from onnx import NodeProto, TensorProto

from starling.engine import Engine
from starling.engine.bundle.manifest import Bundle

SECONDS = 30.0  # a chat template may take 10 of them
LOCATIONS = (
    "../../etc/passwd",
    "/etc/passwd",
    "",
    "..",
    "/dev/zero",
    "tokenizer.json",
    "*/_ORT_MEM_ADDR_/*",
    "a" * 5000,
)
PLACES = ("-1", "0", "1", "4096", "99999999999", "18446744073709551615", "9223372036854775800", "abc", "", "1e9")
SIZES = (0, 1, 2, -1, 3, 7, 16, 2**31 - 1, 2**31, 2**32 + 1, 2**62)
LINKS = ("/etc/passwd", "/dev/zero", "/etc", "/proc/self/environ", "loop")
GRAPHS = ("model.onnx", "model_kernels.onnx")
TEXTS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
TEMPLATES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{% include '/etc/passwd' %}",
    "{{ 'a' * 10**10 }}",
    "{{ 'x' | center(10**10) }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "{{ 2 ** 10 ** 10 }}",
    "{% set ns = namespace(x='aa') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "{{ range(10**9) }}",
    "{{ 'a' | indent(10**9) }}",
    "{{ messages.append({}) }}",
    "{{ strftime_now('%' * 100000) }}",
    "{{ 1 / 0 }}",
    "{{ messages[9999] }}",
    "{% generation %}",
    "{{",
    "{{ '\ud800' }}",
    "((" * 100_000,
    "",
)


def damage(bundle: Path, dice: random.Random) -> str:
    """Spoil one file of the bundle; which one."""
    ways: tuple[tuple[int, Callable[[Path, random.Random], str]], ...] = (
        (4, _manifest),
        (4, _text),
        (3, _template),
        (6, _graph),
        (2, _graph_bytes),
        (1, _weights),
        (2, _strange_file),
    )
    way = dice.choices([way for _, way in ways], [weight for weight, _ in ways])[0]
    what = way(bundle, dice)
    if way is not _manifest and dice.random() < 0.95:
        _agree(bundle)
    return what


def _agree(bundle: Path) -> None:
    """Make bundle.json say what the files are."""
    document = json.loads((bundle / "bundle.json").read_text())
    for name in document["files"]:
        if (bundle / name).is_file() and not (bundle / name).is_symlink():
            content = (bundle / name).read_bytes()
            document["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (bundle / "bundle.json").write_text(json.dumps(document))


def _manifest(bundle: Path, dice: random.Random) -> str:
    file = bundle / "bundle.json"
    if dice.random() < 0.8:
        document = damage_json(json.loads(file.read_text()), dice)
        file.write_bytes(dump(document))
    else:
        file.write_bytes(damage_bytes(file.read_bytes(), dice))
    return file.name


def _text(bundle: Path, dice: random.Random) -> str:
    file = bundle / dice.choice(TEXTS)
    if dice.random() < 0.7:
        file.write_bytes(dump(damage_json(json.loads(file.read_text()), dice)))
    else:
        file.write_bytes(damage_bytes(file.read_bytes(), dice))
    return file.name


def _template(bundle: Path, dice: random.Random) -> str:
    text = dice.choice(TEMPLATES)
    (bundle / "chat_template.jinja").write_bytes(text.encode("utf-8", "surrogatepass"))
    return f"template {text[:60]}"


def _weights(bundle: Path, dice: random.Random) -> str:
    file = bundle / "model.onnx.data"
    with file.open("r+b") as opened:
        opened.seek(dice.randrange(file.stat().st_size))
        opened.write(dice.randbytes(64)) if dice.random() < 0.7 else opened.truncate()
    return file.name


def _strange_file(bundle: Path, dice: random.Random) -> str:
    name = dice.choice((*TEXTS, "chat_template.jinja", "model.onnx.data", "additional_chat_templates/x.jinja", "new"))
    file = bundle / name
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    end = dice.choice((*LINKS, "pipe"))
    if end == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to(file if end == "loop" else end)
    return f"{name} -> {end}"


def _graph_bytes(bundle: Path, dice: random.Random) -> str:
    file = bundle / dice.choice(GRAPHS)
    file.write_bytes(damage_bytes(file.read_bytes(), dice))
    return f"bytes of {file.name}"


def _graph(bundle: Path, dice: random.Random) -> str:
    file = bundle / dice.choice(GRAPHS)
    model = onnx.load(str(file), load_external_data=False)
    what = dice.choice((_external, _external, _dimensions, _type, _node, _node, _node, _input))(model.graph, dice)
    file.write_bytes(model.SerializeToString())
    return f"{file.name}: {what}"


def _external(graph: Any, dice: random.Random) -> str:
    tensor = dice.choice([t for t in graph.initializer if t.data_location == TensorProto.EXTERNAL])
    entry = dice.choice(tensor.external_data)
    entry.value = dice.choice(LOCATIONS if entry.key == "location" else PLACES)
    return f"{entry.key} {entry.value[:30]}"


def _dimensions(graph: Any, dice: random.Random) -> str:
    tensor = dice.choice(graph.initializer)
    if tensor.dims:
        at = dice.randrange(len(tensor.dims))
        tensor.dims[at] = dice.choice((*SIZES, tensor.dims[at] * 2, tensor.dims[at] + 1))
    else:
        tensor.dims.append(2**40)
    return f"dims {list(tensor.dims)}"


def _type(graph: Any, dice: random.Random) -> str:
    tensor = dice.choice(graph.initializer)
    tensor.data_type = dice.choice((0, 1, 2, 3, 6, 7, 8, 9, 10, 11, 14, 16, 17, 22, 99))
    return f"type {tensor.data_type}"


def _node(graph: Any, dice: random.Random) -> str:
    own = [node for node in graph.node if node.domain]
    node: NodeProto = dice.choice(own if own and dice.random() < 0.7 else graph.node)
    how = dice.randrange(4)
    if how <= 1 and node.attribute:
        attribute = dice.choice(node.attribute)
        if attribute.type == 2:
            attribute.i = dice.choice((*SIZES, -(2**63), 2**63 - 1, attribute.i + 1))
        elif attribute.type == 1:
            attribute.f = dice.choice((0.0, float("nan"), float("inf"), -1e38))
        else:
            node.attribute.remove(attribute)
    elif how == 2:
        outputs = [name for other in graph.node for name in other.output]
        names = ["", *outputs, *(t.name for t in graph.initializer), *(value.name for value in graph.input)]
        node.input[dice.randrange(len(node.input))] = dice.choice(names)
    else:
        node.op_type = dice.choice([other.op_type for other in graph.node] + ["Loop", "Foo"])
    return f"node {node.op_type}"


def _input(graph: Any, dice: random.Random) -> str:
    value = dice.choice([*graph.input, *graph.output])
    dimensions = value.type.tensor_type.shape.dim
    if dimensions:
        dice.choice(dimensions).dim_value = dice.choice((0, 1, 3, 2**31))
    return f"shape of {value.name}"


def use(bundle: Path) -> None:
    """Open, inspect, and answer three prompts: a text, a chat, ids."""
    with Engine(Bundle.open(bundle, verify=True), max_seq=64, threads=1) as engine:
        engine.generate("hi there", max_tokens=3)
        engine.generate([1, 2, 3], max_tokens=2, temperature=1.0, seed=1)
        ids = engine.apply_chat_template([{"role": "user", "content": "hi <|end|>"}])
        engine.generate(ids[:40], max_tokens=2)


def main(bundle: Path, rounds: int, seed: int, work: Path) -> dict[str, Any]:
    """Try `rounds` damaged bundles."""
    dice, spoilt = random.Random(seed), work / "spoilt"
    import jinja2  # noqa: F401 (and what else a fork had to load again)
    import onnxruntime  # noqa: F401
    import tokenizers  # noqa: F401

    counts, bad, refusals = Counter[str](), [], Counter[str]()
    for number in range(rounds):
        shutil.rmtree(spoilt, ignore_errors=True)
        what = damage(Path(shutil.copytree(bundle, spoilt)), dice)
        before = {*work.rglob("*")} - {work / "log"}
        ended = limited_child.run_limited(lambda: use(spoilt), work / "log", seconds=SECONDS)
        counts[what.partition(" ")[0]] += 1
        outside = {*work.rglob("*")} - before - {work / "log"}
        if outside or ended.bad:
            fault = ended.bad or f"wrote {outside}"
            bad.append({"number": number, "what": what, "bad": fault, "text": ended.text[-900:]})
        refusals["answered" if ended.code == 0 else "a line" if "error: " in ended.text else ended.text[-80:]] += 1
    return {"counts": counts, "bad": bad, "refusals": refusals}


if __name__ == "__main__":
    made = main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
    print("\n" + json.dumps(made))
