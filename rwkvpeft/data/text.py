"""``--data_type utf-8``, ``utf-16le`` and ``dummy``: one text, of which each character is a token.

The characters that occur, in their own order, are the vocabulary; it is written to ``vocab.json`` in ``proj_dir`` when
training begins, and read from there when it goes on. With a named --tokenizer the text is tokenised with that instead.

Source: RWKV-LM, ``RWKV-v4neo/src/dataset.py``; its ``dummy`` is a text of sums.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rwkvpeft.config.groups import DataConfig
from rwkvpeft.data.source import Tokens, TokenSource
from rwkvpeft.data.tokenizer import CharacterTokenizer, Tokenizer, load_tokenizer
from rwkvpeft.data.vocabulary import write_characters
from rwkvpeft.errors import UserError

_DUMMY_SUMS = 100_000
_DUMMY_RANGE = 10_000
_LARGEST = np.iinfo(np.int32).max


class TextSource(TokenSource):
    """One text as one document. ``vocabulary`` is what its tokens are of, ``is_new`` if it was made of this text."""

    def __init__(self, name: str, text: str, vocabulary: Tokenizer, is_new: bool) -> None:
        """Raises: UserError if the text is empty or too long, or holds what the vocabulary does not."""
        self.name = name
        self.vocabulary = vocabulary
        self.is_new = is_new
        try:
            tokens = _encode(text, vocabulary)
        except UserError as reason:
            raise UserError(f"{name}: {reason.what}", found=reason.found, expected=reason.expected) from reason
        if not 0 < len(tokens) <= _LARGEST:
            raise UserError(f"{name} is {'too long for one text' if len(tokens) else 'empty'}", found=len(tokens))
        tokens.flags.writeable = False
        self.stream = tokens
        self.starts = np.zeros(1, dtype=np.int64)
        self.sizes = np.array([len(tokens)], dtype=np.int32)


def open_text(config: DataConfig) -> TextSource:
    """The text of ``--data_file``, or the sums of ``dummy``, in the vocabulary that ``--tokenizer`` names.

    A path of a ``vocab.json`` that is not there yet means: the characters of this text.

    Raises: UserError if the file cannot be read in its encoding, is empty, or does not fit the vocabulary.
    """
    is_dummy = config.data_type == "dummy"
    text = _sums() if is_dummy else read_text(config.data_file, config.data_type)
    name = "dummy" if is_dummy else config.data_file
    if not _is_to_be_made(config.tokenizer):
        return TextSource(name, text, load_tokenizer(config.tokenizer), is_new=False)
    return TextSource(name, text, CharacterTokenizer(sorted(set(text)), config.tokenizer), is_new=True)


def write_vocabulary(source: TokenSource) -> None:
    """Write the ``vocab.json`` of a text if it was made of it. Raises: UserError if that cannot be written."""
    if isinstance(source, TextSource) and source.is_new and isinstance(source.vocabulary, CharacterTokenizer):
        write_characters(Path(source.vocabulary.name), source.vocabulary.characters)


def vocabulary_size(config: DataConfig) -> int:
    """How many token ids a model of these data needs: those of the text's vocabulary, else of ``--tokenizer``.

    Raises: UserError as ``open_text`` and ``load_tokenizer``.
    """
    if config.data_type in ("utf-8", "utf-16le", "dummy"):
        return open_text(config).vocabulary.vocab_size
    return load_tokenizer(config.tokenizer).vocab_size


def read_text(path: str, encoding: str) -> str:
    """A text file, with \\n for every kind of line end. Raises: UserError if it cannot be read in ``encoding``."""
    try:
        return Path(path).read_text(encoding=encoding)
    except UnicodeDecodeError as reason:
        raise UserError(
            f"{path} is not {encoding}",
            found=f"{reason.reason} at byte {reason.start}",
            fix="--data_type utf-16le" if encoding == "utf-8" else "--data_type utf-8",
        ) from reason
    except OSError as reason:
        raise UserError(f"cannot read {path}", found=reason.strerror, fix="check the path") from reason


def _is_to_be_made(tokenizer: str) -> bool:
    return tokenizer.lower().endswith(".json") and not Path(tokenizer).exists()


def _encode(text: str, vocabulary: Tokenizer) -> Tokens:
    tokens = vocabulary.encode(text)
    if vocabulary.end_token is not None:
        tokens.append(vocabulary.end_token)
    return np.array(tokens, dtype=np.uint16 if vocabulary.vocab_size <= 1 << 16 else np.int32)


def _sums() -> str:
    pairs = ((number % _DUMMY_RANGE, number * number % _DUMMY_RANGE) for number in range(_DUMMY_SUMS))
    return "".join(f".{one}+{other}={one + other}." for one, other in pairs)
