"""The bundle's tokenizer: text to token ids and back, with user text that can be kept free of special tokens."""

import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any

import tokenizers

from starling.engine.bundle.manifest import FILES
from starling.engine.errors import BundleError, PromptError, SamplingError, one_line, shown
from starling.engine.text.detokenizer import Detokenizer, DetokenizerFactory

# Unicode's private-use characters, 137,000 of them.
PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))

# A character that is a token of its own in every vocabulary with byte fallback: after it no space comes before a word.
_ANCHOR = "\x02"


class Tokenizer:
    """tokenizer.json, over the `tokenizers` library. All methods may be called from several threads at once."""

    def __init__(
        self, core: tokenizers.Tokenizer, special_tokens: Mapping[str, str], vocab: Mapping[str, int] | None = None
    ) -> None:
        """`vocab`: the id of every token, where it is known; the library takes tens of ms to make it."""
        core.no_truncation()
        core.no_padding()
        added = core.get_added_tokens_decoder()
        self._core = core
        self._added = {token_id: token.content for token_id, token in added.items()}
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.special_tokens: Mapping[str, str] = {
            role: text for role, text in special_tokens.items() if core.token_to_id(text) is not None
        }
        vocab = core.get_vocab(with_added_tokens=True) if vocab is None else vocab
        self._detokenizers = DetokenizerFactory(core, self.special_ids, vocab)
        self._special_pattern = literal_pattern(self._added[token_id] for token_id in self.special_ids)
        #: Characters of the longest token, markers and all: so many characters of a text are at least one token. (A
        #: token of bytes has one character for each; what a tokenizer drops from a text, seldom much, is not known.)
        self.longest_token = max(map(len, vocab), default=1)

    @classmethod
    def load(cls, folder: Path, vocab_size: int) -> "Tokenizer":
        """Read tokenizer.json of a bundle, and the names of its special tokens from the two files beside it.

        Raises BundleError where a file is missing or unreadable, or where a token's id is not below `vocab_size`:
        the model's embedding has no row for it, and a GPU would read beyond the table.
        """
        path = folder / "tokenizer.json"
        try:
            core = tokenizers.Tokenizer.from_str(FILES.text(path))
        except FileNotFoundError:
            raise BundleError(f"{path} is missing: export the model again") from None
        except BundleError:
            raise
        except Exception as error:  # the library raises bare Exception for a bad file
            raise BundleError(f"{path} is not a tokenizer.json: {one_line(error)}: export the model again") from error
        vocab = core.get_vocab(with_added_tokens=True)
        _check_ids(core, vocab, path, vocab_size)
        return cls(core, _special_token_names(folder), vocab)

    @property
    def added_tokens(self) -> Mapping[int, str]:
        """Id to text of every token that is cut out of the text before the model's own vocabulary is used."""
        return self._added

    def difference(self, other: "Tokenizer") -> str | None:
        """What is first not the same in the two vocabularies, ids and texts; None where all is."""
        mine, theirs = (one._core.get_vocab(with_added_tokens=True) for one in (self, other))
        if mine == theirs:
            return None
        token = min(
            (token for token in {*mine, *theirs} if mine.get(token) != theirs.get(token)),
            key=lambda token: mine.get(token, theirs.get(token, 0)),
        )
        return f"{shown(token)} is {_id(mine.get(token))} here and {_id(theirs.get(token))} there"

    def token_to_id(self, token: str) -> int | None:
        """The id of a token's exact text, None where there is none."""
        return self._core.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        """The vocabulary's text of an id, with its markers for spaces and bytes; None where there is none."""
        return self._core.id_to_token(token_id)

    def check_fits(self, characters: int, limit: int) -> None:
        """Raises PromptError for a text whose characters are more than `limit` tokens hold, were all the longest.

        It comes before what takes the longer the longer a text is: chat templates, encoding.
        """
        if characters > limit * self.longest_token:
            raise PromptError(
                f"the prompt has {characters:,} characters, more than {limit:,} tokens can hold",
                detail="shorten it, or raise --max-seq",
                client_detail="shorten it",
                code="context_length_exceeded",
            )

    def encode(self, text: str, *, add_special_tokens: bool = True, allow_special: bool = True) -> list[int]:
        """Ids of a text; with `add_special_tokens`, those that the checkpoint puts around it (BOS).

        A special token spelt out in the text becomes its id, or with `allow_special=False` ids of plain text.
        Raises PromptError where the text holds half a UTF-16 surrogate pair, as undecodable input bytes do.
        """
        if allow_special or not self._special_pattern.search(text):
            return self._encode(self._core, text, add_special_tokens)
        literals = Literals([text])
        plain = self.encode_with_literals(literals.hide(text, self._special_pattern), literals)
        before, behind = self.affixes
        return [*before, *plain, *behind] if add_special_tokens else plain

    def encode_pair(self, first: str, second: str) -> list[int]:
        """Ids of two texts with what the checkpoint puts around and between them. Raises PromptError as `encode`."""
        with _refusing_surrogates():
            return self._core.encode_batch_fast([(first, second)], add_special_tokens=True)[0].ids

    def offsets(self, text: str) -> list[int]:
        """How many characters of the text come before each token of `encode(text)`; a space before a word is its own.

        Tokens that are pieces of one character have that character's. Raises PromptError as `encode` does.
        """
        begins, end = [], 0
        for start, stop in self._encode_fully(self._core, text, add_special_tokens=True).offsets:
            # A token without characters is BOS or EOS. Byte-level tokenizers leave the space out of what they report.
            begins.append(min(start, end) if stop > start else end)
            end = max(end, stop)
        return begins

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of the ids, special tokens left out or by their names."""
        return self._core.decode(ids, skip_special_tokens=skip_special_tokens)

    def detokenizer(self, prompt_ids: Sequence[int] = (), shown: Sequence[str] = ()) -> Detokenizer:
        """A fresh incremental detokenizer. After `prompt_ids` the text continues theirs and keeps its first space.

        `shown` are special tokens that give their text, as the others do not.
        """
        ids = {token: text for text in shown if (token := self._core.token_to_id(text)) in self.special_ids}
        return self._detokenizers.make(prompt_ids, ids)

    @cached_property
    def special_ids_by_text(self) -> Mapping[str, int]:
        """The ids of the special tokens by their texts."""
        return {self._added[token]: token for token in self.special_ids}

    @property
    def strips_first_space(self) -> bool:
        """Whether a reply's first space is no part of its text, as with SentencePiece's vocabularies."""
        return self._detokenizers.strips_first_space

    def token_bytes(self) -> list[bytes]:
        """The bytes of every token's text by id, b"" for special tokens and gaps.

        Raises SamplingError for a tokenizer whose tokens have another text beside each other than alone.
        """
        found = self._detokenizers.token_bytes()
        if found is None:
            problem = "this bundle's tokenizer gives its tokens no bytes of their own, which a grammar needs"
            raise SamplingError(problem, detail="leave the grammar out", field="grammar")
        return found

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of a text that goes on within another one: no BOS, no space before it, no special tokens."""
        if not self._detokenizers.is_sentencepiece:
            return self.encode(text, add_special_tokens=False, allow_special=False)
        ids = self.encode(_ANCHOR + text, add_special_tokens=False, allow_special=False)
        end = next((i for i, token in enumerate(ids[:2]) if self.id_to_token(token) in (_ANCHOR, "<0x02>")), -1)
        return ids[end + 1 :]

    def encode_with_literals(self, text: str, literals: "Literals") -> list[int]:
        """Ids of a text in which `literals` hid strings: these become plain text, all other added tokens their ids.

        No BOS is added. A stretch between two added tokens that holds no hidden string gets exactly its usual ids; one
        that does is encoded anew as a whole, so that plain text is cut into tokens as if nothing were special.
        Raises PromptError as `encode` does.
        """
        if not literals:
            return self._encode(self._core, text, add_special_tokens=False)
        encoding = self._encode_fully(self._core, text, add_special_tokens=False)
        ids: list[int] = []
        done, end = 0, 0
        for index, start, stop in [*self._added_spans(encoding, text), (len(encoding.ids), len(text), len(text))]:
            stretch = text[end:start]
            plain = literals.reveal(stretch)
            ids += encoding.ids[done:index] if plain == stretch else self._encode_plain(plain, at_start=end == 0)
            ids += encoding.ids[index : index + 1]
            done, end = index + 1, stop
        return ids

    def _added_spans(self, encoding: tokenizers.Encoding, text: str) -> Iterator[tuple[int, int, int]]:
        """Index, first and end character of the added tokens; the characters include spaces that a token swallows."""
        for index, token_id in enumerate(encoding.ids):
            if token_id not in self._added:
                continue
            start, stop = encoding.token_to_chars(index) or (0, 0)
            # <unk> is an added token too, but mostly stands for a character that has no token.
            if self._added[token_id] in text[start:stop]:
                yield index, start, stop

    def _encode_plain(self, text: str, *, at_start: bool) -> list[int]:
        bare, anchor = self._bare
        if at_start:
            return self._encode(bare, text, add_special_tokens=False)
        # After the anchor the text is treated as after any added token: whether a word starts there is the same.
        return self._encode(bare, anchor + text, add_special_tokens=False)[1:]

    @cached_property
    def _bare(self) -> tuple[tokenizers.Tokenizer, str]:
        """A second instance, which takes no text for an added token but the anchor, a string no one can guess.

        Switching `encode_special_tokens` on the shared instance would change what other threads are encoding.
        """
        bare = tokenizers.Tokenizer.from_str(self._core.to_str())
        bare.add_special_tokens([tokenizers.AddedToken(text, normalized=False) for text in self._added.values()])
        bare.encode_special_tokens = True
        anchor = chr(PRIVATE_USE[-1][-1]) + secrets.token_hex(16)
        bare.add_tokens([tokenizers.AddedToken(anchor, normalized=False)])
        return bare, anchor

    @cached_property
    def affixes(self) -> tuple[list[int], list[int]]:
        """The ids that the post-processor puts before and after a text."""
        encoding = self._encode_fully(self._core, "a", add_special_tokens=True)
        inner = [i for i, special in enumerate(encoding.special_tokens_mask) if not special]
        return encoding.ids[: inner[0]], encoding.ids[inner[-1] + 1 :]

    # The library's `encode` holds Python's lock all the while, a second for a text of 1 MB, in which no other thread
    # runs: a server answers nobody. Its calls for batches release it.

    @staticmethod
    def _encode(core: tokenizers.Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
        """Ids alone, in half the time."""
        with _refusing_surrogates():
            return core.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    @staticmethod
    def _encode_fully(core: tokenizers.Tokenizer, text: str, add_special_tokens: bool) -> tokenizers.Encoding:
        with _refusing_surrogates():
            return core.encode_batch([text], add_special_tokens=add_special_tokens)[0]


def _id(number: int | None) -> str:
    return "no token" if number is None else f"token {number}"


@contextmanager
def _refusing_surrogates() -> Iterator[None]:
    try:
        yield
    except TypeError:  # the library's word for a lone surrogate
        raise PromptError("the text holds bytes that are not UTF-8 text", detail="convert it to UTF-8") from None


class Literals:
    """Strings hidden behind one private-use character each, so that they pass through a template as plain text.

    `texts` are all strings that the hidden ones will stand among: none of their characters is used.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._free = _free_characters(texts)
        self._chars: dict[str, str] = {}

    def __bool__(self) -> bool:
        return bool(self._chars)

    def hide(self, text: str, pattern: re.Pattern[str]) -> str:
        """The text with each match of the pattern replaced by its character."""
        return pattern.sub(lambda match: self._char(match[0]), text)

    def reveal(self, text: str) -> str:
        """The text with every hidden string in its place again."""
        return text.translate({ord(char): literal for literal, char in self._chars.items()})

    def _char(self, literal: str) -> str:
        if literal not in self._chars:
            self._chars[literal] = next(self._free)
        return self._chars[literal]


def _free_characters(texts: Iterable[str]) -> Iterator[str]:
    taken = set().union(*texts)  # not before a character is asked for, which is seldom
    yield from (char for block in PRIVATE_USE for char in map(chr, block) if char not in taken)


def literal_pattern(literals: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the strings, the longest where several fit; nothing where there are none."""
    return re.compile("|".join(map(re.escape, sorted(literals, key=len, reverse=True))) or "(?!)")


def _check_ids(core: tokenizers.Tokenizer, vocab: Mapping[str, int], path: Path, vocab_size: int) -> None:
    """Before anything is made with a place for each id: one id of a thousand million would cost gigabytes."""
    encoding = core.encode("")  # what the post-processor adds may stand in no vocabulary
    tokens = {**vocab, **dict(zip(encoding.tokens, encoding.ids, strict=True))}
    token, largest = max(tokens.items(), key=itemgetter(1), default=("", -1))
    if largest >= vocab_size:
        raise BundleError(
            f"{path} has token {token!r} with id {largest}, but the model knows ids below {vocab_size}: "
            "remove that token from the checkpoint's tokenizer and export again"
        )


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file's top-level object, {} where there is no such file. Raises BundleError where it is something else."""
    try:
        return FILES.json(path)
    except FileNotFoundError:
        return {}


def _special_token_names(folder: Path) -> dict[str, str]:
    """Role (bos_token, eos_token, ...) to token text; tokenizer_config.json goes before the older file."""
    names: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        for role, value in read_json_object(folder / file).items():
            text = value.get("content") if isinstance(value, dict) else value
            if role.endswith("_token") and isinstance(text, str):
                names[role] = text
    return names
