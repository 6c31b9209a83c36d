"""Prefixes that rows held before: their keys and values, in blocks of tokens, for later prompts that begin the same.

A block is known by the block before it and its exact tokens, so two prefixes are never taken for each other. Blocks are
copied out of a row while its prompt is prefilled and when its request ends, and into a row when a prompt begins. The
one that was used least recently goes first; it is always the last of its chain, since a chain is used from its end to
its beginning.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import count

from starling.engine.backends.backend import PREFIX_BLOCK, Backend, RowCopies
from starling.engine.batching.request import Request

#: Memory of a serving loop's known prefixes, in bytes, where nobody says otherwise.
DEFAULT_PREFIX_CACHE = 256 * 2**20
#: Bytes that a block takes beside its keys and values: 32 integers, their tuple, dict entries.
BLOCK_OVERHEAD = 4096
#: Tokens of a prompt that are prefilled although they are known: the last one's logits are wanted, and a token alone
#: would take other kernels (see `chunk_length`).
LEAST_PREFILLED = 2


class _Block:
    """A node: the tokens that led to it are its parents'."""

    __slots__ = ("children", "number", "parent", "slot", "tokens")

    def __init__(self, number: int, parent: _Block | None, tokens: tuple[int, ...], slot: int) -> None:
        self.number, self.parent, self.tokens, self.slot = number, parent, tokens, slot
        self.children: dict[tuple[int, ...], _Block] = {}


class PrefixStore:
    """A bounded number of blocks, and copies between them and rows. One thread uses it."""

    def __init__(self, copies: RowCopies, blocks: int) -> None:
        """`copies` has memory for so many blocks."""
        self.copies = copies
        self.capacity = blocks
        self._free = list(range(blocks))
        #: What no block is before, by salt.
        self._roots: dict[str, _Block] = {}
        #: All blocks by number, the least recently used first.
        self._used: OrderedDict[int, _Block] = OrderedDict()
        self._numbers = count()

    @classmethod
    def of(cls, backend: Backend, size: int) -> PrefixStore | None:
        """A store of at most `size` bytes; None where the backend cannot copy rows.

        Raises BackendError where memory is missing.
        """
        blocks = size // stored_bytes(backend)
        copies = backend.row_copies(blocks)
        return None if copies is None else cls(copies, blocks)

    @property
    def used(self) -> int:
        """Blocks that hold something."""
        return len(self._used)

    def known(self, request: Request) -> int:
        """How many tokens of a request's prompt `load` would copy now."""
        prompt = request.sequence.prompt
        return self._usable(prompt, sum(1 for _ in self._path(prompt, request.salt)))

    def load(self, request: Request) -> int:
        """Copy the longest known prefix of a request's prompt into its row; how many tokens of it count as written."""
        prompt = request.sequence.prompt
        path = list(self._path(prompt, request.salt))
        self._touch(path)
        tokens = self._usable(prompt, len(path))
        for index, block in enumerate(path[: -(-tokens // PREFIX_BLOCK)]):
            self.copies.load(block.slot, request.row, index * PREFIX_BLOCK)
        return tokens

    @staticmethod
    def _usable(prompt: Sequence[int], blocks: int) -> int:
        return max(0, min(blocks * PREFIX_BLOCK, len(prompt) - LEAST_PREFILLED))

    def save(self, tokens: Sequence[int], request: Request) -> None:
        """Keep the whole blocks of `tokens`, which the request's row holds from its beginning."""
        path = list(self._path(tokens, request.salt))
        kept = {block.number for block in path}
        while len(path) < len(tokens) // PREFIX_BLOCK:
            slot = self._take_slot(kept)
            if slot < 0:
                break
            start = len(path) * PREFIX_BLOCK
            self.copies.save(request.row, start, slot)
            parent = path[-1] if path else self._roots.setdefault(request.salt, _Block(-1, None, (), -1))
            block = _Block(next(self._numbers), parent, tuple(tokens[start : start + PREFIX_BLOCK]), slot)
            parent.children[block.tokens] = self._used[block.number] = block
            path.append(block)
            kept.add(block.number)
        self._touch(path)

    def _path(self, tokens: Sequence[int], salt: str) -> Iterator[_Block]:
        """The known blocks with which the tokens begin."""
        block = self._roots.get(salt)
        for start in range(0, len(tokens) - PREFIX_BLOCK + 1, PREFIX_BLOCK):
            if block is None or (block := block.children.get(tuple(tokens[start : start + PREFIX_BLOCK]))) is None:
                return
            yield block

    def _touch(self, path: Sequence[_Block]) -> None:
        """A chain was used: its last block counts as used first, so that none goes before those after it."""
        for block in reversed(path):
            self._used.move_to_end(block.number)

    def _take_slot(self, kept: set[int]) -> int:
        """Memory for one more block, the least recently used one's if need be; -1 where that is one of `kept`."""
        if self._free:
            return self._free.pop()
        number = next(iter(self._used), -1)
        if number < 0 or number in kept:
            return -1
        block = self._used.pop(number)
        parent = block.parent
        assert parent is not None
        del parent.children[block.tokens]
        if parent.parent is None and not parent.children:
            self._roots = {salt: root for salt, root in self._roots.items() if root is not parent}
        return block.slot


def stored_bytes(backend: Backend) -> int:
    """What one block takes in all, in bytes."""
    return block_bytes(backend) + BLOCK_OVERHEAD


def block_bytes(backend: Backend) -> int:
    """Keys and values of one block, in bytes."""
    return backend.kv_cache_bytes // (backend.max_seq * backend.max_batch) * PREFIX_BLOCK
