"""Texts for tokenizers, drawn from a seed: words, code, numbers, rare characters, and every kind of space."""

import random
from collections.abc import Iterator, Sequence

# Whole characters of many scripts; runs of one kind are what tokenizers see in different ways.
_RANGES = (
    (0x20, 0x7F, 8),
    (0xA0, 0x180, 2),
    (0x300, 0x36F, 1),  # combining marks
    (0x370, 0x5FF, 1),
    (0x600, 0x6FF, 1),
    (0x900, 0x97F, 1),
    (0x2000, 0x206F, 1),  # spaces and invisible marks
    (0x2500, 0x25FF, 1),
    (0x3040, 0x30FF, 1),
    (0x4E00, 0x9FFF, 2),
    (0xAC00, 0xD7A3, 1),
    (0xFF00, 0xFFEF, 1),
    (0x1F300, 0x1F6FF, 1),
)
_WORDS = (
    *(
        "the",
        "The",
        "of",
        "don't",
        "I'LL",
        "model",
        "token",
        "straße",
        "naïve",
        "résumé",
        "Привет",
        "안녕",
        "日本語",
        "émoji",
    ),
    *(
        "def",
        "return",
        "self.x",
        "x_1",
        "(a, b)",
        "!=",
        "//",
        "/* */",
        "http://a.b/c?d=e",
        "3.14159",
        "1,000,000",
        "0xFF",
    ),
)
_GAPS = (" ", " ", " ", "  ", "    ", "\n", "\n\n", "\r\n", "\t", "\n    ", "\n\t\t", "\u00a0", "\u3000", "", "▁")


def random_texts(count: int, seed: int, mixed_in: Sequence[str] = ()) -> Iterator[str]:
    """`count` texts, the same for a seed; `mixed_in` are put between the words now and then."""
    source = random.Random(seed)
    for _ in range(count):
        parts: list[str] = []
        for _ in range(source.randint(0, 12)):
            parts.append(source.choice((_word, _characters, _run))(source))
            parts.append(source.choice(_GAPS))
            if mixed_in and source.random() < 0.3:
                parts.append(source.choice(mixed_in))
        if source.random() < 0.3:
            parts.insert(0, source.choice(_GAPS))
        yield "".join(parts)


def _word(source: random.Random) -> str:
    return source.choice(_WORDS)


def _characters(source: random.Random) -> str:
    low, high, _ = source.choices(_RANGES, weights=[weight for *_, weight in _RANGES])[0]
    return "".join(chr(source.randrange(low, high)) for _ in range(source.randint(1, 6)))


def _run(source: random.Random) -> str:
    return source.choice("a-=_.0 1#\n!é") * source.randint(1, 40)
