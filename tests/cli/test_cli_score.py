"""`starling score`, and the commands that refuse a bundle that scores."""

import json
from pathlib import Path

import pytest
from command_line import refusal, succeed

from starling.engine.engine import Engine

CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]


def test_texts_are_scored_on_the_command_line(reward_bundle: Path) -> None:
    with Engine(reward_bundle) as engine:
        expected = engine.score_texts(["Hello", "How are you?"])[:, 0]
    lines = succeed("score", str(reward_bundle), "Hello", "How are you?").splitlines()
    assert lines == [f"{expected[0]:.5f}  Hello", f"{expected[1]:.5f}  How are you?"]
    document = json.loads(succeed("score", str(reward_bundle), "Hello", "--json"))
    assert document["results"] == [{"scores": {"LABEL_0": pytest.approx(expected[0], abs=1e-5)}, "tokens": 2}]


def test_lines_of_json_are_answered_by_lines_of_json(reward_bundle: Path, tmp_path: Path) -> None:
    lines = [{"text": "Hello", "id": 7}, {"messages": CHAT}, {"ids": [1, 5, 6], "id": "c"}]
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n\n", encoding="utf-8")
    answers = [
        json.loads(line)
        for line in succeed("score", str(reward_bundle), "--input", str(tmp_path / "in.jsonl")).splitlines()
    ]
    with Engine(reward_bundle) as engine:
        expected = engine.score_texts(["Hello", CHAT, [1, 5, 6]])[:, 0]
    assert [answer.get("id") for answer in answers] == [7, None, "c"]
    assert [answer["scores"]["LABEL_0"] for answer in answers] == pytest.approx(list(expected), abs=1e-4)


def test_a_classifier_shows_its_labels(classifier_bundle: Path) -> None:
    line = succeed("score", str(classifier_bundle), "Hello", "--activation")
    words = line.split()
    assert (words[0], words[-3], words[-1]) == ("bad", "good", "Hello")
    document = json.loads(succeed("score", str(classifier_bundle), "Hello", "--activation", "--json"))
    scores = document["results"][0]["scores"]
    assert list(scores) == ["bad", "so so", "good"]
    assert sum(scores.values()) == pytest.approx(1)


def test_an_embedding_is_a_list(embedding_bundle: Path) -> None:
    assert len(json.loads(succeed("score", str(embedding_bundle), "Hello"))) == 256
    assert "--activation is for scores" in refusal("score", str(embedding_bundle), "Hello", "--activation")


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 has no text"),
        ('{"text": "a", "ids": [1]}', "line 2 has text and ids"),
        ('{"text": 5}', "line 2: text is no string"),
        ('{"ids": []}', "line 2: ids is no list with something in it"),
    ],
)
def test_a_line_without_a_text_is_named(reward_bundle: Path, tmp_path: Path, line: str, named: str) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n' + line + "\n", encoding="utf-8")
    assert named in refusal("score", str(reward_bundle), "--input", str(tmp_path / "in.jsonl"))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), "give texts, or a file of them"),
        (("a", "--input", "x"), "give texts, or a file of them"),
        (("a", "--template", "code"), "--template is for messages"),
        (("--input", "x", "--json"), "--json is for texts on the command line"),
        (("--input", "nowhere.jsonl"), "nowhere.jsonl"),
        (("a", "--truncate", "0"), "truncate is 0"),
    ],
)
def test_what_cannot_be_scored_is_one_line(reward_bundle: Path, arguments: tuple[str, ...], named: str) -> None:
    assert named in refusal("score", str(reward_bundle), *arguments)


def test_a_bundle_that_generates_is_not_scored_by(tiny_bundle: Path) -> None:
    assert "generates text, it neither scores nor embeds texts" in refusal("score", str(tiny_bundle), "a")


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "hi"),
        ("chat",),
        ("evaluate",),
        ("profile",),
        ("batch", "in.jsonl", "out.jsonl"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_every_command_that_generates_refuses_a_bundle_that_scores(
    reward_bundle: Path, tmp_path: Path, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n', encoding="utf-8")
    command, *rest = arguments
    assert f"{reward_bundle} scores texts, it generates none: use starling score" in refusal(
        command, str(reward_bundle), *rest
    )
    assert not list(tmp_path.glob("repo*"))


def test_no_plan_is_built_of_a_bundle_that_scores(reward_bundle: Path) -> None:
    line = f"{reward_bundle} scores texts, and no backend runs TensorRT plans of such bundles: run it on the CPU"
    assert refusal("build", str(reward_bundle)).startswith(line)


def test_inspect_says_what_it_is_for(reward_bundle: Path, embedding_bundle: Path) -> None:
    shown = succeed("inspect", str(reward_bundle))
    assert "score LABEL_0, read at the token before the first 0, 512 tokens, cut at the left" in shown
    assert "embed, read at the last token" in succeed("inspect", str(embedding_bundle))
