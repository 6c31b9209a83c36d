"""Bodies, lines and settings as no good client sends them: drawn from a seed, so that any one can be had again."""

from __future__ import annotations

import json
import random
from typing import Any

#: Values as JSON text: numbers beyond what anything holds, the wrong types, half surrogate pairs, deep and long ones.
VALUES = (
    *("null", "true", "false", "0", "-1", "1", "1.5", "-0", "1E2", "1e-308", "5e-324", "1e308", "1e999", "-1e999"),
    *(
        "NaN",
        "Infinity",
        "-Infinity",
        str(2**63),
        str(2**64),
        "-1" + "0" * 400,
        "1" + "0" * 309,
        "9" * 4300,
        "9" * 5000,
    ),
    *('""', '"x"', '"1"', '"\\u0000"', '"\\ud800"', '"' + "é" * 300 + '"', '"' + "a" * 5000 + '"', '"\\u2028\\r\\n"'),
    *("[]", "[[]]", "[1]", '["a"]', "[null]", "[true]", "[-1]", "[1e400]", "{}", '{"a": 1}', '{"\\ud800": 1}'),
    *("[" * 500 + "]" * 500, '{"a":' * 500 + "1" + "}" * 500, '["x",' * 200 + "1" + "]" * 200),
    json.dumps(["a"] * 5000),
    json.dumps(list(range(5000))),
    json.dumps("word " * 2000),
)
SAMPLING = (
    *("max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed"),
    *("stop", "stop_token_ids", "ignore_eos", "n", "presence_penalty", "frequency_penalty", "logit_bias", "deadline_s"),
    *(
        "logprobs",
        "top_logprobs",
        "best_of",
        "echo",
        "suffix",
        "stream",
        "stream_options",
        "template",
        "user",
        "metadata",
    ),
    *(
        "tools",
        "tool_choice",
        "response_format",
        "modalities",
        "model",
        "prompt",
        "messages",
        "unknown",
        "\ud800",
        "\x00",
        "",
    ),
)
_PIECES = ("\\u0000", "\\ud800", "1e999", "null", "[", "}", '"', "\\", "NaN", "\x00", "\xff", "9" * 400, "{" * 50)
_KEYS = ("role", "content", "name", "type", "text", "tool_calls", "\ud800", "x" * 2000)
_ROLES = ("user", "system", "assistant", "developer", "tool", "\ud800", "x" * 2000)


def body(draw: random.Random, base: dict[str, Any], names: tuple[str, ...] = SAMPLING) -> bytes:
    """A good object with one to three fields as they should not be; now and then its text torn besides."""
    fields = {json.dumps(name): json.dumps(value) for name, value in base.items()}
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        fields[json.dumps(draw.choice(names))] = draw.choice(VALUES)
    text = "{" + ", ".join(f"{name}: {value}" for name, value in fields.items()) + "}"
    return mutated(draw, text.encode()) if draw.random() < 0.3 else text.encode()


def messages(draw: random.Random) -> list[Any]:
    """Messages of a chat, of which some are none."""
    kinds: tuple[Any, ...] = (
        "Hi",
        "",
        None,
        1,
        [],
        {},
        "\ud800",
        ["x"],
        [{"type": "text", "text": "Hi"}],
        nested(draw),
    )
    made: list[Any] = []
    for _ in range(draw.randint(0, 4)):
        message: Any = {"role": draw.choice(_ROLES), "content": draw.choice(kinds)}
        if draw.random() < 0.4:
            message[draw.choice(_KEYS)] = draw.choice(kinds)
        made.append(draw.choice((message, message, message, draw.choice(kinds))))
    return made


def nested(draw: random.Random) -> Any:
    """Parts of a message in parts of a message."""
    value: Any = draw.choice(("x", 1, None))
    for _ in range(draw.randint(1, 300)):
        value = [value] if draw.random() < 0.5 else {"type": value, "text": "x"}
    return [value]


def mutated(draw: random.Random, text: bytes) -> bytes:
    """The bytes with some of them lost, changed, or more between them."""
    torn = bytearray(text)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(torn) + 1)
        choice = draw.randrange(4)
        if choice == 0:
            del torn[at : at + draw.randint(1, 8)]
        elif choice == 1:
            torn[at:at] = draw.randbytes(draw.randint(1, 6))
        elif choice == 2:
            torn[at:at] = draw.choice(_PIECES).encode("utf-8", "surrogatepass")
        else:
            del torn[at:]
        if not torn:
            break
    return bytes(torn)
