"""`starling triton` writes a whole repository or nothing, and never over what it did not write."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from command_line import CHECKOUT, refusal, succeed

from starling.engine import GrammarSpec
from starling.serving.triton.engine_model import open_engine
from starling.serving.triton.entry_inputs import Inputs
from starling.serving.triton.entry_interface import Call, Interface
from starling.serving.triton.llmapi import LlmApiInterface
from starling.serving.triton.socket_messages import (
    Delta,
    Job,
    Logprob,
    RequestError,
    Times,
    delta_line,
    error_line,
    read_delta,
)
from starling.serving.triton.tensorrt_llm import TensorRtLlmInterface
from starling.serving.triton.vllm import VllmInterface

pytestmark = pytest.mark.slow

MODELS = ("starling", "ensemble", "tensorrt_llm", "vllm_model")


@pytest.fixture
def repository(tiny_bundle: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    succeed("triton", tiny_bundle, folder)
    return folder


def test_a_repository_has_its_models_and_says_how_to_start(repository: Path, tiny_bundle: Path) -> None:
    for model in MODELS:
        assert f'name: "{model}"' in (repository / model / "config.pbtxt").read_text()
        compile((repository / model / "1" / "model.py").read_text(), model, "exec")
    assert {path.name for path in repository.iterdir() if path.is_dir()} == set(MODELS)
    config = (repository / "starling" / "config.pbtxt").read_text()
    assert f'key: "bundle" value {{ string_value: "{tiny_bundle.resolve()}" }}' in config
    assert "KIND_CPU" in config
    assert "decoupled: true" in (repository / "ensemble" / "config.pbtxt").read_text()
    assert os.access(repository / "start.sh", os.X_OK)
    for name in ("README.md", "start.sh", "make_environment.sh"):
        assert not re.search(r"@\{\w+\}", (repository / name).read_text())
    assert str(tiny_bundle.resolve()) in (repository / "README.md").read_text()


def test_a_gpu_repository_names_the_gpu_and_the_environment(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    options = ("--instance-kind", "gpu", "--env", tmp_path / "env", "--max-batch", "3", "--backend", "tensorrt")
    succeed("triton", tiny_bundle, folder, *options)
    config = (folder / "starling" / "config.pbtxt").read_text()
    assert "KIND_GPU gpus: [ 0 ]" in config
    assert 'key: "max_batch" value { string_value: "3" }' in config
    assert 'key: "backend" value { string_value: "tensorrt" }' in config
    for model in MODELS:
        text = (folder / model / "config.pbtxt").read_text()
        assert f'key: "EXECUTION_ENV_PATH" value {{ string_value: "{tmp_path / "env"}" }}' in text
    assert "KIND_CPU" in (folder / "ensemble" / "config.pbtxt").read_text()


def test_copy_makes_the_repository_stand_alone(tiny_bundle: Path, tmp_path: Path) -> None:
    succeed("triton", tiny_bundle, tmp_path / "models", "--copy")
    assert 'key: "bundle" value { string_value: "bundle" }' in (tmp_path / "models/starling/config.pbtxt").read_text()
    copied = tmp_path / "models" / "starling" / "1" / "bundle"
    assert json.loads((copied / "bundle.json").read_text()) == json.loads((tiny_bundle / "bundle.json").read_text())


@pytest.mark.parametrize("copied", [(), ("--copy",)], ids=["named", "copied"])
def test_the_engine_model_opens_the_draft_beside_the_bundle(
    tiny_bundle: Path, tmp_path: Path, copied: tuple[str, ...]
) -> None:
    folder, fit = tmp_path / "models", ("--max-seq", "64", "--threads", "1", "--max-batch", "2")
    succeed("triton", tiny_bundle, folder, "--draft", tiny_bundle, *fit, *copied)
    written = (folder / "starling" / "config.pbtxt").read_text()
    parameters = dict(re.findall(r'key: "(\w+)" value { string_value: "(.*)" }', written))
    assert (folder / "starling" / "1" / "draft" / "bundle.json").exists() == bool(copied)
    assert parameters["draft"] == ("draft" if copied else str(tiny_bundle.resolve()))
    config = {"parameters": {name: {"string_value": value} for name, value in parameters.items()}}
    where = {"model_repository": str(folder / "starling"), "model_version": "1"}
    opened, _ = open_engine({"model_instance_kind": "CPU", "model_config": json.dumps(config)} | where)
    with opened as engine:
        assert engine.speculation == "draft-model"
        assert engine.draft is not None
        assert len(engine.generate("Once upon a time", max_tokens=8).tokens) == 8


def test_a_draft_that_cannot_draft_is_refused_before_anything_is_written(
    tiny_bundle: Path, reward_bundle: Path, tmp_path: Path
) -> None:
    both = refusal("triton", tiny_bundle, tmp_path / "models", "--draft", tiny_bundle, "--speculation", "prompt-lookup")
    assert both.startswith("--draft and --speculation are both given")
    assert "scores texts, it generates none" in refusal(
        "triton", tiny_bundle, tmp_path / "models", "--draft", reward_bundle
    )
    about = refusal("triton", reward_bundle, tmp_path / "models", "--draft", tiny_bundle)
    assert about.startswith("--draft is about generating text")
    assert not (tmp_path / "models").exists()


def test_nothing_is_overwritten_without_force(repository: Path, tiny_bundle: Path) -> None:
    before = (repository / "starling" / "config.pbtxt").read_text()
    line = refusal("triton", tiny_bundle, repository, "--max-batch", "2")
    assert line == f"{repository} exists already: give another place, or --force to replace it"
    assert (repository / "starling" / "config.pbtxt").read_text() == before
    succeed("triton", tiny_bundle, repository, "--max-batch", "2", "--force")
    assert 'key: "max_batch" value { string_value: "2" }' in (repository / "starling" / "config.pbtxt").read_text()
    assert [path.name for path in repository.parent.iterdir()] == ["models"]


def test_force_spares_what_starling_did_not_write(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("precious")
    assert "is not a repository that Starling wrote" in refusal("triton", tiny_bundle, tmp_path / "mine", "--force")
    assert (tmp_path / "mine" / "file").read_text() == "precious"


def test_more_positions_than_the_model_has_are_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    assert "--max-seq is 10000000" in refusal("triton", tiny_bundle, tmp_path / "models", "--max-seq", "10000000")
    assert not (tmp_path / "models").exists()


def _read(interface: Interface, **fields: object) -> Call:
    arrays = {}
    for name, value in fields.items():
        values = [
            one.encode() if isinstance(one, str) else one for one in (value if isinstance(value, list) else [value])
        ]
        dtype = object if isinstance(values[0], bytes) else None
        arrays[name] = np.array(values, dtype=dtype).reshape((1, -1) if interface.batched else (-1,))
    return interface.read(Inputs(arrays, batched=interface.batched), {})


@pytest.mark.parametrize(
    ("fields", "settings"),
    [
        ({}, (0.0, 0, 1.0)),  # TensorRT-LLM's default is top_k 1
        ({"temperature": 0.7}, (0.0, 0, 1.0)),
        ({"top_k": 1, "temperature": 0.7}, (0.0, 0, 1.0)),
        ({"top_k": 0, "top_p": 0.0}, (0.0, 0, 1.0)),
        ({"top_k": 40, "temperature": 0.5}, (0.5, 40, 1.0)),
        ({"top_p": 0.5}, (1.0, 0, 0.5)),
    ],
)
def test_tensorrt_llm_draws_only_where_top_k_or_top_p_say_so(
    fields: dict[str, float], settings: tuple[float, int, float]
) -> None:
    params = _read(TensorRtLlmInterface(), text_input="x", max_tokens=4, **fields).job.params
    assert (params.temperature, params.top_k, params.top_p) == settings


def test_tensorrt_llm_end_id_replaces_the_models_own() -> None:
    params = _read(TensorRtLlmInterface(), text_input="x", max_tokens=4, end_id=7, stop_words=["", "a"]).job.params
    assert (params.stop_token_ids, params.ignore_eos, params.stop) == ((7,), True, ("a",))
    assert _read(TensorRtLlmInterface(), text_input="x", max_tokens=4, end_id=-1).job.params.stop_token_ids == ()


def test_values_that_change_nothing_pass_and_others_do_not() -> None:
    neutral = {"bad_words": "", "beam_width": 1, "length_penalty": 1.0, "presence_penalty": 0.0, "pad_id": 5}
    params = _read(TensorRtLlmInterface(), text_input="x", max_tokens=4, **neutral).job.params
    assert not params.changes_logits
    with pytest.raises(RequestError, match=r"length_penalty is 2\.0, which is not supported"):
        _read(TensorRtLlmInterface(), text_input="x", max_tokens=4, length_penalty=2.0)


def test_several_prompts_in_one_request_are_refused() -> None:
    arrays = {"text_input": np.array([[b"a"], [b"b"]], dtype=object)}
    with pytest.raises(RequestError, match="text_input has 2 rows"):
        Inputs(arrays, batched=True)


@pytest.mark.parametrize(
    ("fields", "settings"),
    [
        ({}, (0.0, 0, 1.0)),
        ({"temperature": 0.7}, (0.7, 0, 1.0)),
        ({"temperature": 0.0}, (0.0, 0, 1.0)),
        ({"top_k": 1, "temperature": 0.7}, (0.0, 0, 1.0)),
        ({"top_p": 0.0, "temperature": 0.7}, (0.0, 0, 1.0)),
        ({"top_k": 40}, (1.0, 40, 1.0)),
        ({"top_p": 0.5}, (1.0, 0, 0.5)),
    ],
)
def test_llmapi_is_greedy_where_its_sampler_is(fields: dict[str, float], settings: tuple[float, int, float]) -> None:
    given = {f"sampling_param_{name}": value for name, value in fields.items()}
    params = _read(LlmApiInterface(), text_input="x", **given).job.params
    assert (params.temperature, params.top_k, params.top_p) == settings
    assert params.max_tokens == 32


def test_llmapi_settings_reach_the_engine_and_bad_ones_are_named() -> None:
    names = {"max_tokens": 5, "stop": ["a", "", "b"], "seed": 2**63, "frequency_penalty": 0.5, "presence_penalty": -1.0}
    given = {f"sampling_param_{name}": value for name, value in names.items()}
    call = _read(LlmApiInterface(), text_input="x", streaming=True, return_cumulative_logprob=True, **given)
    params = call.job.params
    assert (params.max_tokens, params.stop, params.seed, params.logprobs) == (5, ("a", "b"), 2**63, 0)
    assert (params.frequency_penalty, params.presence_penalty, call.stream) == (0.5, -1.0, True)
    assert call.prefix == ""
    assert _read(LlmApiInterface(), text_input="x", sampling_param_exclude_input_from_output=False).prefix == "x"
    for fields, message in (
        ({"sampling_param_temperature": -1.0}, "sampling_param_temperature is -1.0"),
        ({"sampling_param_best_of": 2}, "sampling_param_best_of is 2, which is not supported"),
        ({"lora_path": "/etc"}, "lora_path is '/etc', which is not supported"),
        ({"return_stop_reason": True}, "return_stop_reason is True, which is not supported"),
        ({"text_input": ["a", "b"]}, "text_input has 2 values: give one"),
        ({"max_tokens": 5}, "max_tokens is no input of this model"),
    ):
        with pytest.raises(RequestError, match=message):
            _read(LlmApiInterface(), **{"text_input": "x", **fields})


def test_vllm_settings_have_vllms_defaults_and_take_numbers_as_strings() -> None:
    params = _read(VllmInterface(), text_input="x").job.params
    assert (params.temperature, params.max_tokens) == (1.0, 16)
    settings = '{"temperature": "0.5", "top_k": -1, "stop": "a", "max_tokens": "3", "presence_penalty": 0}'
    params = _read(VllmInterface(), text_input="x", sampling_parameters=settings).job.params
    assert (params.temperature, params.top_k, params.stop, params.max_tokens) == (0.5, 0, ("a",), 3)


def test_vllm_answers_have_a_value_for_each_choice() -> None:
    settings = '{"n": "2", "cache_salt": "mine"}'
    asked = {"return_cumulative_logprob": True, "return_finish_reason": True, "return_num_output_tokens": True}
    call = _read(VllmInterface(), text_input="x", sampling_parameters=settings, **asked)
    assert (call.job.choices, call.job.cache_salt, call.prefix) == (2, "mine", "x")
    first, second = Delta("a", 1, (Logprob(3, -0.5, "a"),)), Delta("b", 2, (Logprob(4, -1.0, "b"),) * 2, "stop", 7)
    found = {name: array.tolist() for name, array in call.answer.outputs([first, second]).items()}
    assert found == {
        "text_output": [b"a", b"b"],
        "cumulative_logprob": [-0.5, -2.0],
        "finish_reason": [b"None", b"stop"],
        "num_output_tokens": [1, 2],
    }
    # An answer that has ended says so in every later response, without what was sent.
    found = {name: array.tolist() for name, array in call.answer.outputs([first, second.sent()]).items()}
    assert (found["text_output"], found["cumulative_logprob"]) == ([b"a", b""], [-1.0, -2.0])
    assert (found["finish_reason"], found["num_output_tokens"]) == ([b"None", b"stop"], [1, 0])


@pytest.mark.parametrize("name", ["messages", "tools", "tool_choice", "chat_template_kwargs"])
def test_chats_are_refused_by_name_in_every_convention(name: str) -> None:
    for interface in (VllmInterface(), TensorRtLlmInterface(), LlmApiInterface()):
        with pytest.raises(RequestError, match=f"{name} is about chats"):
            _read(interface, text_input="x", max_tokens=4, **{name: "[]"})
    with pytest.raises(RequestError, match=f"{name} is about chats"):
        _read(VllmInterface(), text_input="x", sampling_parameters=json.dumps({name: []}))


def test_penalties_bad_words_biases_and_min_tokens_reach_the_engine_by_both_conventions() -> None:
    given: dict[str, Any] = {"presence_penalty": 0.5, "frequency_penalty": -1.0, "min_tokens": 2}
    words = {"bad_words": ["a", "", "b c"]}
    older = _read(TensorRtLlmInterface(), text_input="x", max_tokens=4, min_length=2).job.params
    params = _read(TensorRtLlmInterface(), text_input="x", max_tokens=4, **given, **words).job.params
    assert (params.bad_words, older.min_tokens) == (("a", "b c"), 2)
    assert {name: getattr(params, name) for name in given} == given
    settings = json.dumps(given | {"bad_words": ["a"], "logit_bias": {"5": 2, "7": -100}, "seed": -1})
    call = _read(VllmInterface(), text_input="x", sampling_parameters=settings)
    assert {name: getattr(call.job.params, name) for name in given} == given
    assert (call.job.params.bad_words, call.job.params.logit_bias) == (("a",), ((5, 2.0), (7, -100.0)))
    assert Job.from_line(call.job.to_line()) == call.job


def test_grammars_reach_the_engine_by_both_conventions() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    cases = [
        ("json_schema", json.dumps(schema), {"guided_json": schema}, GrammarSpec.json_schema(schema)),
        ("regex", "[ab]+", {"guided_regex": "[ab]+"}, GrammarSpec.regex("[ab]+")),
        (
            "ebnf_grammar",
            'root ::= "a"',
            {"guided_decoding": {"grammar": 'root ::= "a"'}},
            GrammarSpec.lark('root ::= "a"'),
        ),
        ("json", "", {"structured_outputs": {"json_object": True}}, GrammarSpec.json_object()),
    ]
    for kind, guide, settings, spec in cases:
        fields = {"guided_decoding_guide_type": kind, "guided_decoding_guide": guide}
        theirs = _read(TensorRtLlmInterface(), text_input="x", max_tokens=4, **fields)
        other = _read(VllmInterface(), text_input="x", sampling_parameters=json.dumps(settings))
        for call in (theirs, other):
            assert call.job.params.grammar == spec
            assert Job.from_line(call.job.to_line()) == call.job
    for fields, problem in (
        ({"guided_decoding_guide_type": "xml"}, "guided_decoding_guide_type is 'xml': give one of json, json_schema"),
        ({"guided_decoding_guide_type": "json_schema", "guided_decoding_guide": "{"}, "the JSON schema is not JSON"),
        ({"guided_decoding_guide": "a"}, "guided_decoding_guide is given without guided_decoding_guide_type"),
    ):
        with pytest.raises(RequestError, match=problem):
            _read(TensorRtLlmInterface(), text_input="x", max_tokens=4, **fields)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ('{"n": 0}', "n is 0: give 1 to 128"),
        ('{"n": 1.5}', "n is 1.5"),
        ('{"cache_salt": 5}', "cache_salt is 5"),
        ('{"stop": 5}', "stop is 5: give a string or a list of strings"),
        ('{"stop": {"a": 1}}', "stop is .*: give a string or a list of strings"),
        ('{"stop": [5]}', r"stop\[0\] is 5"),
        ('{"stop_token_ids": 5}', "stop_token_ids is 5: give a list of token ids"),
        ('{"logit_bias": {"x": 1}}', "logit_bias is an object: give an object with token ids as keys"),
        ('{"logit_bias": 5}', "logit_bias is 5: give an object with token ids as keys"),
        ('{"logit_bias": {"5": 101}}', "logit_bias is 101: give a number from -100 to 100"),
        ('{"bad_words": "x"}', "bad_words is 'x': give a list of strings"),
        ('{"guided_choice": "x"}', "guided_choice is of the wrong type: give a list of strings"),
        ('{"guided_regex": "a", "guided_json": {}}', "guided_json and guided_regex both say"),
        ('{"stop_token_ids": ["x"]}', r"stop_token_ids\[0\] is 'x'"),
        ('{"temperature": 1%s}' % ("0" * 400), "temperature is 1"),
        ('{"logprobs": 25000}', "logprobs is 25000: give at most 20"),
        ("[" * 100_000, "cannot be read: maximum recursion"),
        ('{"seed": 1%s}' % ("0" * 5000), "cannot be read: Exceeds the limit"),
        ('{"seed": "1%s"}' % ("0" * 5000), "seed is '1000"),
    ],
    ids=lambda value: value[:30],
)
def test_vllm_settings_of_another_form_are_refused(settings: str, line: str) -> None:
    with pytest.raises(RequestError, match=f"sampling_parameters:? {line}"):
        _read(VllmInterface(), text_input="x", sampling_parameters=settings)


def test_a_fault_in_one_request_does_not_stop_the_others_of_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []

    class TritonError(str):
        INVALID_ARG, UNAVAILABLE, CANCELLED, INTERNAL = range(4)

        def __new__(cls, message: str, code: int) -> TritonError:
            return super().__new__(cls, f"{code} {message}")

    pb_utils = SimpleNamespace(
        TritonError=TritonError,
        InferenceResponse=lambda error: error,
        Logger=SimpleNamespace(log_error=lambda line: None),
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=1,
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", pb_utils)  # Triton itself makes this module
    from starling.serving.triton.entry_vllm import TritonPythonModel

    def fault() -> Any:
        raise LookupError("a fault")

    def request(inputs: list[Any]) -> Any:
        return SimpleNamespace(
            get_response_sender=lambda: SimpleNamespace(send=lambda response, flags: sent.append(response)),
            requested_output_names=list,
            inputs=lambda: inputs,
            parameters=lambda: "",
            request_id=lambda: "",
        )

    model = TritonPythonModel()
    model.initialize({})
    try:
        model.execute([request([SimpleNamespace(name=lambda: "text_input", as_numpy=fault)]), request([])])
    finally:
        model.finalize()
    assert sent == ["3 unexpected LookupError: a fault", "0 text_input is missing: it is required"]


def test_jobs_and_answers_survive_the_socket() -> None:
    call = _read(TensorRtLlmInterface(), text_input="Zürich\n😀", max_tokens=4, stop_words=["\n"], top_k=5, seed=2**63)
    assert Job.from_line(call.job.to_line()) == call.job
    times = Times(5, 0.1, 0.2, 0.3, 4, 3)
    delta = Delta("ü", 1, (Logprob(3, -0.5, "ü", ((3, -0.5, "ü"),)),), "stop", 9, times)
    assert read_delta(delta_line(delta)) == delta
    several = Job("a", call.job.params, choices=3, cache_salt="mine")
    assert Job.from_line(several.to_line()) == several
    with pytest.raises(RequestError, match="busy") as refused:
        read_delta(error_line(RequestError("busy", "unavailable")))
    assert refused.value.kind == "unavailable"


class TestTheEnvironmentsRecipe:
    """make_environment.sh installs Starling from where it came from, and leaves a whole environment or none."""

    def make(self, repository: Path, folder: Path, **env: str) -> tuple[int, list[str]]:
        """Exit code and lines on stderr."""
        command = [repository / "make_environment.sh", folder]
        variables = os.environ | {"PYTHON": sys.executable, "PIP_NO_INDEX": "1"} | env
        finished = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
        return finished.returncode, finished.stderr.splitlines()

    def test_it_names_the_checkout_that_wrote_it(self, repository: Path) -> None:
        assert f"DEFAULT={CHECKOUT}\n" in (repository / "make_environment.sh").read_text()

    @pytest.mark.parametrize("source", ["/nosuch/checkout", "./nosuch.whl", "/nosuch/with space"])
    def test_a_source_that_is_not_there_is_one_line(self, repository: Path, tmp_path: Path, source: str) -> None:
        code, lines = self.make(repository, tmp_path / "env", SOURCE=source)
        assert code == 2
        assert lines == [f"error: {source} does not exist: give SOURCE, a checkout of Starling or a wheel of it"]
        assert not (tmp_path / "env").exists()

    def test_what_is_there_already_is_left_alone(self, repository: Path, tmp_path: Path) -> None:
        (tmp_path / "env").mkdir()
        (tmp_path / "env" / "mine").touch()
        code, lines = self.make(repository, tmp_path / "env")
        assert code == 2
        assert "exists already" in lines[0]
        assert (tmp_path / "env" / "mine").exists()

    @pytest.mark.parametrize("source", ["no-such-package", "no-such-package==1", "no-such-package @ file:///nosuch"])
    def test_a_failed_installation_leaves_nothing(self, repository: Path, tmp_path: Path, source: str) -> None:
        code, lines = self.make(repository, tmp_path / "env", SOURCE=source)
        assert code == 1
        assert "ERROR" in "".join(lines[:-1])  # pip's own words
        assert lines[-1] == f"error: {tmp_path / 'env'} was not made"
        assert not (tmp_path / "env").exists()
