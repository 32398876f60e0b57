"""Text to token ids and back.

Encoding World text is the Rust package's work. Decoding is done here from the table of token bytes: a text generated
token by token holds halves of characters and ids without meaning, and neither may stop a program. In every tokenizer
token 0 ends a document and spells nothing, but for utf-16le, where it is also the zero byte of every Latin letter, and
character vocabularies, which have no such token.

Source: the World vocabulary of RWKV (BlinkDL/RWKV-LM, ``rwkv_vocab_v20230424.txt``), greedy longest match over bytes.
"""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import cache, cached_property, lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rwkvpeft.data.vocabulary import read_characters, read_vocabulary, same_vocabulary
from rwkvpeft.errors import UserError

END_OF_DOCUMENT = 0
WORLD_VOCABULARY_SIZE = 65536

_FIX_INSTALL = "pip install pyrwkv-tokenizer"


class Tokenizer(ABC):
    """Ids 0 to ``vocab_size`` - 1; the joined bytes of a text's tokens are the text in ``encoding``.

    Attributes:
        name: what ``load_tokenizer`` was asked for.
        vocab_size: one more than the largest id the tokenizer can produce.
        encoding: Python's name of the encoding of texts, "utf-8" or "utf-16-le".
        end_token: what ends a document and stands for nothing else; None where there is no such token.
    """

    name: str
    vocab_size: int
    encoding = "utf-8"
    end_token: int | None = END_OF_DOCUMENT

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without a final 0. Raises: UserError if the text cannot be encoded."""

    @cached_property
    @abstractmethod
    def table(self) -> Sequence[bytes]:
        """The bytes of every id; ids that spell nothing have none."""

    def token_bytes(self, token: int) -> bytes:
        """What one token spells; b"" for token 0, for unused ids and for ids outside the vocabulary."""
        return self.table[token] if 0 <= token < len(self.table) else b""

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of any ids whatever; what is not a whole character becomes U+FFFD."""
        return b"".join(map(self.token_bytes, tokens)).decode(self.encoding, errors="replace")

    def to_bytes(self, text: str) -> bytes:
        """The text in ``encoding``. Raises: UserError for half of a surrogate pair."""
        try:
            return text.encode(self.encoding)
        except UnicodeEncodeError as reason:
            raise _surrogate_error(reason) from reason

    @cached_property
    def byte_lengths(self) -> npt.NDArray[np.int32]:
        """(vocab_size,) how many bytes each id spells."""
        return np.fromiter(map(len, self.table), dtype=np.int32, count=len(self.table))

    def spell(self, tokens: npt.NDArray[np.integer]) -> bytes:
        """The joined bytes of an array of ids below ``vocab_size``, many times faster than ``decode``."""
        # blocks whose index arrays stay in the processor's cache
        blocks = (tokens[start : start + 16384] for start in range(0, len(tokens), 16384))
        return b"".join(self._letters[self._letter_positions(block)].tobytes() for block in blocks)

    def _letter_positions(self, tokens: npt.NDArray[np.integer]) -> npt.NDArray[np.int32]:
        lengths = self.byte_lengths[tokens]
        ends = np.cumsum(lengths, dtype=np.int32)
        positions = np.repeat(self._letter_starts[tokens] - (ends - lengths), lengths)
        positions += np.arange(len(positions), dtype=np.int32)
        return positions

    @cached_property
    def _letters(self) -> npt.NDArray[np.uint8]:
        return np.frombuffer(b"".join(self.table), dtype=np.uint8)

    @cached_property
    def _letter_starts(self) -> npt.NDArray[np.int32]:
        return np.cumsum(self.byte_lengths, dtype=np.int32) - self.byte_lengths


class IncrementalDecoder:
    """Turns a stream of tokens into text as it comes, holding back characters that are not complete yet."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder(tokenizer.encoding)(errors="replace")

    def push(self, token: int) -> str:
        """The characters this token completes, often one word, sometimes none."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def finish(self) -> str:
        """U+FFFD if a character was left unfinished, otherwise nothing; the decoder can then start anew."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


@lru_cache(maxsize=4)
def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of that name, one object in a process; its tables are read when they are first needed.

    Args:
        name: "world"; "bytes" (UTF-8 bytes as ids); "utf-16le" (bytes of UTF-16LE as ids); or the path of a vocabulary
            file with a line ``ID LITERAL LENGTH`` for each token, or of a character vocabulary (.json).
    Raises:
        UserError: no such name or file. A vocabulary file is read here, and a broken line in it named.
    """
    if name == "world":
        return WorldTokenizer()
    if name == "bytes":
        return Utf8Tokenizer()
    if name == "utf-16le":
        return Utf16Tokenizer()
    path = Path(name)
    if not path.is_file():
        raise UserError(
            f"--tokenizer {name} is neither a name nor a file",
            expected="world, bytes, utf-16le or the path of a vocabulary file",
        )
    if path.suffix.lower() == ".json":
        return CharacterTokenizer(read_characters(path), name)
    if same_vocabulary(path, world_vocabulary_path()):
        return WorldTokenizer(name)
    return VocabularyTokenizer(path)


def world_vocabulary_path() -> Path:
    """The World vocabulary as the Rust tokenizer's package carries it. Raises: UserError if that is not installed."""
    try:
        import pyrwkv_tokenizer
    except ImportError as reason:
        raise UserError("the World tokenizer is not installed", found=str(reason), fix=_FIX_INSTALL) from reason
    return Path(pyrwkv_tokenizer.__file__).parent / "rwkv_vocab_v20230424.txt"


class WorldTokenizer(Tokenizer):
    """The vocabulary of the official models: ids 1 to 65529 spell something, the rest up to 65535 nothing."""

    vocab_size = WORLD_VOCABULARY_SIZE

    def __init__(self, name: str = "world") -> None:
        self.name = name

    def encode(self, text: str) -> list[int]:
        """Greedy longest match, in Rust."""
        try:
            return _world_encoder()(text)
        except UnicodeEncodeError as reason:
            raise _surrogate_error(reason) from reason

    @cached_property
    def table(self) -> Sequence[bytes]:
        """The vocabulary file's tokens by id."""
        return _world_table()


# once per process: the search tree of the Rust tokenizer takes 240 MB and half a second
@cache
def _world_encoder() -> Callable[[str], list[int]]:
    path = world_vocabulary_path()
    import pyrwkv_tokenizer

    encode: Callable[[str], list[int]] = pyrwkv_tokenizer.WorldTokenizer(str(path)).encode
    return encode


@cache
def _world_table() -> list[bytes]:
    table = read_vocabulary(world_vocabulary_path())
    return table + [b""] * (WORLD_VOCABULARY_SIZE - len(table))


class VocabularyTokenizer(Tokenizer):
    """Any vocabulary in the World file's format. Tokens that another vocabulary lacks are spelled with shorter ones."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._table = read_vocabulary(path)
        self.vocab_size = len(self._table)
        self._ids = {spelling: token for token, spelling in enumerate(self._table) if spelling}
        by_head: dict[bytes, set[int]] = {}
        for spelling in self._ids:
            by_head.setdefault(spelling[:2], set()).add(len(spelling))
        # under a token's first two bytes: the lengths to try, longest first
        self._lengths = {head: tuple(sorted(lengths, reverse=True)) for head, lengths in by_head.items()}

    @cached_property
    def table(self) -> Sequence[bytes]:
        """The vocabulary file's tokens by id."""
        return self._table

    def encode(self, text: str) -> list[int]:
        """Greedy longest match. Raises: UserError also if the vocabulary lacks a byte of the text."""
        source = self.to_bytes(text)
        tokens: list[int] = []
        position = 0
        while position < len(source):
            token, position = self._longest(source, position)
            tokens.append(token)
        return tokens

    def _longest(self, source: bytes, position: int) -> tuple[int, int]:
        """The longest token that matches at ``position``, and where the next one begins."""
        lengths = self._lengths.get(source[position : position + 2], ())
        for length in (*lengths, 1):
            token = self._ids.get(source[position : position + length])
            if token is not None:
                return token, min(position + length, len(source))
        raise UserError(
            f"the vocabulary {self.name} has no token for byte 0x{source[position]:02x}",
            found=source[position : position + 8].decode("utf-8", errors="replace"),
            expected="a vocabulary that holds every single byte",
        )


class _ByteTokenizer(Tokenizer):
    """Every byte is a token."""

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        """The bytes of the text."""
        return list(self.to_bytes(text))

    @cached_property
    def table(self) -> Sequence[bytes]:
        """Single bytes."""
        return [bytes([value]) for value in range(256)]


class Utf8Tokenizer(_ByteTokenizer):
    """UTF-8 bytes as ids, for small demonstration models. Byte 0 is the end of a document, so no text may hold it."""

    name = "bytes"

    def encode(self, text: str) -> list[int]:
        """The bytes of the text. Raises: UserError also if the text holds a NUL character."""
        if "\0" in text:
            where = text.index("\0")
            raise UserError(f"character {where} of the text is NUL, which --tokenizer bytes keeps for a document's end")
        return super().encode(text)

    @cached_property
    def table(self) -> Sequence[bytes]:
        """Single bytes, the end of a document excepted."""
        return [b"", *(bytes([value]) for value in range(1, 256))]


class Utf16Tokenizer(_ByteTokenizer):
    """Bytes of UTF-16LE as ids, two or four to a character."""

    name = "utf-16le"
    encoding = "utf-16-le"
    # a zero byte is half of most letters and ends nothing
    end_token = None


class CharacterTokenizer(Tokenizer):
    """One id for each character that a text has, as RWKV-LM makes it for text files; no id ends a document.

    Args:
        characters: by id, each once.
        name: path of the vocab.json they stand in.
    """

    end_token = None

    def __init__(self, characters: Sequence[str], name: str) -> None:
        self.name = name
        self.characters = tuple(characters)
        self.vocab_size = len(self.characters)
        self._ids = {character: token for token, character in enumerate(self.characters)}

    def encode(self, text: str) -> list[int]:
        """An id a character. Raises: UserError naming the first character that the vocabulary lacks."""
        try:
            return [self._ids[character] for character in text]
        except KeyError as unknown:
            character = unknown.args[0]
            raise UserError(
                f"the vocabulary {self.name} lacks the character {character!r}",
                found=f"character {text.index(character)} of the text",
                expected=f"{self.vocab_size} characters, those of the text the vocabulary was made of",
            ) from unknown

    @cached_property
    def table(self) -> Sequence[bytes]:
        """The characters in UTF-8."""
        return [character.encode() for character in self.characters]


def _surrogate_error(reason: UnicodeEncodeError) -> UserError:
    found = f"\\u{ord(reason.object[reason.start]):04x}"
    return UserError(f"the text holds half of a surrogate pair, {found} at character {reason.start}")
