"""The workers on real runtimes: transformers from our own environment, and the peers where they are set up.

STARLING_PEERS names a folder that `python -m starling.profiling.peers.install FOLDER` made.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from starling.engine.errors import StarlingError, UserError
from starling.engine.text.tokenizer import Tokenizer
from starling.export.check.torch_reference import load_reference, reference_logits
from starling.export.checkpoints.checkpoint import Checkpoint
from starling.profiling.peers.catalogue import PEERS, Peer
from starling.profiling.peers.checkpoint_folder import write_checkpoint
from starling.profiling.peers.compare import main
from starling.profiling.peers.contenders import Contender, opened
from starling.profiling.peers.environments import prepare_environment, python_of
from starling.profiling.peers.install import choose, set_up
from starling.profiling.peers.peer_divergence import score
from starling.profiling.peers.peers_file import read_peers, write_peers
from starling.profiling.quality.stored_logits import StoredLogits

pytestmark = pytest.mark.slow

FOLDER = os.environ.get("STARLING_PEERS")
NAMES = [recipe for peer in PEERS["cpu"] for recipe in (f"{peer.name} {one.name}" for one in peer.recipes)]
#: What a precision may cost in mean KL on this small model, in nats: an upside-down scale or mask costs whole nats.
#: Plain dynamic INT8 with per-tensor activations really is that far, and OpenVINO's own choice for fp32 is bfloat16.
BOUNDS = {"fp32": 1e-3, "fp16": 1e-3, "bf16": 0.005, "int8": 0.02, "int4": 1.0}
FAR = {"optimum-onnx int8": 1.0, "openvino fp32 default": 0.02}
VOCABULARY = 49152
PROMPT, ANSWER, END = "What is the capital of France?", 24, 2


def transformers_here(folder: Path, **settings: Any) -> Contender:
    settings = {"library": "transformers", "dtype": "float32", **settings}
    model = folder / "checkpoint"
    return Contender(
        "transformers fp32", "transformers", "fp32", Path(sys.executable), "hf_worker", model, "cpu", settings
    )


def ours(bundle: Path) -> Contender:
    return Contender("starling fp32", "starling", "fp32", Path(sys.executable), "starling_worker", bundle, "cpu")


def ask(contender: Contender, capacity: int, *requests: dict[str, Any]) -> list[dict[str, Any]]:
    with opened(contender, 2, capacity) as (process, _):
        return [process.request(**request) for request in requests]


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """starling-tiny as a checkpoint in a folder of peers."""
    folder = tmp_path_factory.mktemp("peers")
    write_checkpoint("random:starling-tiny", folder / "checkpoint")
    return folder


def test_the_checkpoint_folder_holds_the_same_weights_and_tokens(
    tiny_folder: Path, tiny_checkpoint: Checkpoint
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids, folder = [1, 5, 900, 31, 7], tiny_folder / "checkpoint"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    expected = reference_logits(load_reference(tiny_checkpoint.config, tiny_checkpoint.tensors), ids).numpy()
    assert np.abs(reference_logits(model, ids).numpy() - expected).max() < 1e-4
    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert theirs("0: no debugging 14", add_special_tokens=False)["input_ids"] == _raw_ids(
        tiny_checkpoint, "0: no debugging 14"
    )


def test_the_demo_checkpoint_keeps_its_digit_splitting(demo_checkpoint: Checkpoint) -> None:
    # transformers' own GGUF reader gives [415, 216, 32, …] here.
    expected = [353, 32, 42, 787, 33665, 3124, 365, 6518, 25]
    assert _raw_ids(demo_checkpoint, "        0: no debugging output (default)") == expected


def _raw_ids(checkpoint: Checkpoint, text: str) -> list[int]:
    import tokenizers

    core = tokenizers.Tokenizer.from_str(checkpoint.tokenizer.tokenizer_json)
    ids: list[int] = core.encode(text, add_special_tokens=False).ids
    return ids


class TestTransformersAndUs:
    REQUESTS = ({"op": "run", "prompt": [1, 5, 900, 31, 7], "new_tokens": 6},) * 2

    def test_both_give_the_same_greedy_tokens_run_after_run(self, tiny_folder: Path, tiny_bundle: Path) -> None:
        theirs, again = ask(transformers_here(tiny_folder), 16, *self.REQUESTS)
        assert theirs["tokens"] == again["tokens"]
        assert [reply["tokens"] for reply in ask(ours(tiny_bundle), 16, *self.REQUESTS)] == [theirs["tokens"]] * 2

    def test_both_give_the_same_logits(self, tiny_folder: Path, tiny_bundle: Path, tmp_path: Path) -> None:
        rows = np.random.default_rng(0).integers(3, 1000, (2, 8)).tolist()
        stored = []
        for number, contender in enumerate((transformers_here(tiny_folder), ours(tiny_bundle))):
            file = tmp_path / f"{number}.npz"
            ask(contender, 8, {"op": "logits", "tokens": rows, "context": 3, "file": str(file)})
            stored.append(StoredLogits.read(file))
        divergence = score(stored[1], stored[0]).divergence
        assert divergence is not None
        assert divergence.mean_kl < 1e-8
        assert divergence.top1_agreement == 1.0

    @pytest.mark.skipif(FOLDER is None, reason="compiling takes most of a minute; set STARLING_PEERS to try it")
    def test_the_compiled_one_over_a_static_cache_gives_them_too(self, tiny_folder: Path) -> None:
        eager, _ = ask(transformers_here(tiny_folder), 16, *self.REQUESTS)
        # The second run begins with the cache of the first: it must have been cleared.
        compiled = ask(transformers_here(tiny_folder, compiled=True), 16, *self.REQUESTS)
        assert [reply["tokens"] for reply in compiled] == [eager["tokens"]] * 2


def test_a_whole_comparison_writes_figures_quality_and_chart(
    tiny_folder: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "peers"
    (folder / "env").mkdir(parents=True)
    (folder / "checkpoint").symlink_to(tiny_folder / "checkpoint")
    here = transformers_here(folder)
    launcher = folder / "env" / "run"
    launcher.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    launcher.chmod(0o755)
    write_peers(
        folder, [Contender(here.name, here.peer, "fp32", launcher, here.worker, here.model, "cpu", here.settings)]
    )
    output = tmp_path / "out.json"
    arguments = [str(tiny_bundle), "--peers", str(folder), "--prompt-tokens", "16", "--new-tokens", "4"]
    arguments += ["--rounds", "1", "--quality-tokens", "24", "--threads", "2", "--output", str(output)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    document = json.loads(output.read_text(encoding="utf-8"))
    assert [row["contender"] for row in document["summaries"]] == ["starling fp32", "transformers fp32"]
    assert document["summaries"][1]["first_difference"] == [None]
    assert document["quality_reference"] == "transformers fp32"
    assert document["quality"]["starling fp32"]["divergence"]["mean_kl"] < 1e-8
    assert document["quality_failures"] == {}
    assert "transformers fp32" in output.with_suffix(".svg").read_text(encoding="utf-8")
    assert "fp32, 16 prompt tokens" in result.output


class TestSetup:
    def test_peers_are_chosen_by_name(self) -> None:
        assert [peer.name for peer in choose("cpu", "llama.cpp,transformers")] == ["llama.cpp", "transformers"]
        assert [peer.name for peer in choose("cuda", None)] == ["transformers", "genai-cuda"]
        with pytest.raises(UserError, match=r"'vllm' is no peer on cpu; there are genai, llama\.cpp"):
            choose("cpu", "vllm")
        (peer,) = choose("cpu", "openvino", "int8,int4")
        assert [recipe.name for recipe in peer.recipes] == ["int8", "int4"]
        with pytest.raises(UserError, match=r"'int3' is no precision of these peers; there are fp32, fp16, bf16, int8"):
            choose("cpu", "openvino", "int3")

    def test_a_peer_that_fails_is_one_line_and_the_folder_lists_what_is_ready(self, tmp_path: Path) -> None:
        peer = Peer("broken", "hf_worker", None, (str(tmp_path / "no-such.whl"),), ())
        (failure,) = set_up(tmp_path / "peers", "random:starling-tiny", [peer], "cpu")
        assert failure.startswith("broken: python gave exit code 1: ")
        assert "no-such.whl" in (tmp_path / "peers" / "logs" / "broken.log").read_text(encoding="utf-8")
        assert read_peers(tmp_path / "peers") == []
        with pytest.raises(UserError, match="is of the model 'random:starling-tiny', not 'demo'"):
            set_up(tmp_path / "peers", "demo", [], "cpu")

    def test_an_environment_that_is_whole_is_left_alone_and_a_changed_pin_is_not(self, tmp_path: Path) -> None:
        folder, log = tmp_path / "env", tmp_path / "log"
        peer = Peer("p", "hf_worker", None, ("pip",), ())
        assert prepare_environment(peer, folder, log)
        assert python_of(folder).exists()
        assert not prepare_environment(peer, folder, log)
        with pytest.raises(StarlingError, match="exit code 1"):
            prepare_environment(Peer("p", "hf_worker", None, ("pip", "/no/such.whl"), ()), folder, log)

    def test_an_environment_that_is_to_be_built_otherwise_is_made_again(self, tmp_path: Path) -> None:
        folder, log = tmp_path / "env", tmp_path / "log"
        for flags in ("-DA=1", "-DA=2"):
            peer = Peer("p", "hf_worker", None, ("pip",), (), build={"CMAKE_ARGS": flags})
            assert prepare_environment(peer, folder, log)
            assert not prepare_environment(peer, folder, log)


@dataclass(frozen=True, slots=True)
class Truth:
    """What transformers says in its own environment: greedy tokens, and the logits of two windows."""

    prompt: list[int]
    tokens: list[int]
    windows: list[list[int]]
    logits: StoredLogits


@pytest.fixture(scope="module")
def peers() -> dict[str, Contender]:
    if FOLDER is None:
        pytest.skip("set STARLING_PEERS to a folder that python -m starling.profiling.peers.install made")
    return {contender.name: contender for contender in read_peers(Path(FOLDER))}


@pytest.fixture(scope="module")
def truth(peers: dict[str, Contender], tmp_path_factory: pytest.TempPathFactory) -> Truth:
    if "transformers fp32" not in peers:
        pytest.skip("transformers is not set up in STARLING_PEERS")
    tokenizer = Tokenizer.load(peers["transformers fp32"].model, VOCABULARY)
    turn = f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
    prompt = tokenizer.encode(turn)
    text = tokenizer.encode("A lighthouse keeper counts the ships that pass in the night. In 1911 he wrote it down.")
    windows, file = [text[:12], text[6:18]], tmp_path_factory.mktemp("truth") / "truth.npz"
    run, _ = ask(peers["transformers fp32"], 64, *_requests(prompt, windows, file))
    return Truth(prompt, run["tokens"], windows, StoredLogits.read(file))


def _requests(prompt: list[int], windows: list[list[int]], file: Path) -> list[dict[str, Any]]:
    return [
        {"op": "run", "prompt": prompt, "new_tokens": ANSWER},
        {"op": "logits", "tokens": windows, "context": 4, "file": str(file)},
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_peer_gives_all_tokens_and_the_logits_of_its_precision(
    peers: dict[str, Contender], truth: Truth, name: str, tmp_path: Path
) -> None:
    if name not in peers:
        pytest.skip(f"{name} is not set up in STARLING_PEERS")
    contender, file = peers[name], tmp_path / "logits.npz"
    run, _ = ask(contender, 64, *_requests(truth.prompt, truth.windows, file))
    assert len(run["tokens"]) == ANSWER
    assert min(run["itl_ms"]) > 0.1  # each token by itself, not several at once
    divergence = score(StoredLogits.read(file), truth.logits).divergence
    assert divergence is not None
    assert divergence.mean_kl < FAR.get(name, BOUNDS[contender.precision])
    if contender.precision == "fp32" and not name.endswith("default"):
        assert END in truth.tokens[:-1]
        assert run["tokens"] == truth.tokens  # after the end token, too
