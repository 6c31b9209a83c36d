"""Seeded damage to JSON values, bytes and safetensors files: what the fuzzers of this folder share."""

import json
import random
import struct
from typing import Any

#: Values where another kind, another size, or another file is expected.
VALUES: tuple[Any, ...] = (
    *(0, -1, 1, 2, 3, 10**6, 10**9, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**30, 1.5, 1e308),
    *(True, None, "x", [], {}, [["x"]], {"content": 5}, "a" * 5000),
    *("../../outside", "/etc/passwd", "..", "", "\x00", "/dev/zero", "/dev/stdin", "C:\\x", "{{", "\ud800"),
)
NUMBERS = (0, 8, 9, 12, 13, 100_000_001, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    if isinstance(value, dict):
        found += [below for key, inner in list(value.items())[:200] for below in _paths(inner, (*path, key))]
    elif isinstance(value, list):
        found += [below for index, inner in enumerate(value[:50]) for below in _paths(inner, (*path, index))]
    return found


def damage_json(value: Any, dice: random.Random) -> Any:
    """Change one place of a JSON value: gone, another value, wrapped, or many times as long."""
    *_, path = [(), *dice.choices(_paths(value)[1:] or [()])]
    if not path:
        return dice.choice(VALUES)
    place = value
    for key in path[:-1]:
        place = place[key]
    last, how = path[-1], dice.randrange(5)
    if how == 0:
        del place[last]
    elif how <= 2:
        place[last] = dice.choice(VALUES)
    elif how == 3:
        place[last] = dice.choice(([place[last]], {"a": place[last]}))
    else:
        old = place[last]
        place[last] = old * dice.choice((2, 1000)) if isinstance(old, int | str | list) else [old]
    return value


def damage_bytes(content: bytes, dice: random.Random) -> bytes:
    """Cut, flip, remove, insert or overwrite some bytes; most often near the beginning, where headers are."""
    if not content:
        return b"\x00"
    data = bytearray(content)
    at = dice.randrange(min(len(data), 4000) if dice.random() < 0.7 else len(data))
    how = dice.randrange(6)
    if how == 0:
        return bytes(data[:at])
    if how == 1:
        for _ in range(dice.choice((1, 1, 4, 32))):
            data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    elif how == 2:
        del data[at : at + dice.randint(1, 64)]
    elif how == 3:
        data[at:at] = dice.randbytes(dice.randint(1, 32))
    elif how == 4:
        data[at : at + 8] = struct.pack("<Q", dice.choice(NUMBERS))
    else:
        data[at : at + 4] = struct.pack("<I", dice.choice(NUMBERS) % 2**32)
    return bytes(data)


def damage_safetensors(content: bytes, dice: random.Random) -> bytes:
    """Change the header of a safetensors file: shapes, offsets, dtypes, names, or its length."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    name = dice.choice([key for key in header if key != "__metadata__"])
    changes: tuple[tuple[str, tuple[Any, ...]], ...] = (
        ("shape", ([2**62, 4], [0], [-1, 2], [2**63], ["x"], [10**30], [])),
        ("data_offsets", ([0, 2**63], [-1, 5], [10, 0], [0, 0], [2**64 - 1, 2**64], ["a", 1], [0])),
        ("dtype", ("F64", "I8", "XX", 1, None, "BOOL", "F8_E4M3")),
    )
    how = dice.randrange(6)
    if how < 3:
        key, values = changes[how]
        header[name][key] = dice.choice(values)
    elif how == 3:
        header[f"../../{name}"] = header.pop(name)
    elif how == 4:
        header = {f"x{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)}
    else:
        header["__metadata__"] = {"a": "b" * 10**6}
    written = json.dumps(header).encode()
    stated = dice.choice((*[len(written)] * 8, 2**63, len(written) + 10**9))
    return struct.pack("<Q", stated) + written + content[8 + length :]


def dump(value: Any) -> bytes:
    """JSON, in which half a character stays what it is."""
    return json.dumps(value).encode()
