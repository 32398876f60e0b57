"""``--data_type utf-8``, ``utf-16le`` and ``dummy``: one text, of which each character is a token.

The characters that occur, in their own order, are the vocabulary; it is written to ``vocab.json`` in ``proj_dir`` when
training begins, and read from there when it goes on. With a named --tokenizer the text is tokenised with that instead.

Source: RWKV-LM, ``RWKV-v4neo/src/dataset.py``; its ``dummy`` is a text of sums.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from rwkvpeft.config.check_sources import TEXTS
from rwkvpeft.config.groups import DataConfig
from rwkvpeft.data.source import TokenSource
from rwkvpeft.data.tokenizer import CharacterTokenizer, Tokenizer, load_tokenizer
from rwkvpeft.data.vocabulary import write_characters
from rwkvpeft.errors import UserError
from rwkvpeft.reading import open_file

_DUMMY_SUMS = 100_000
_DUMMY_RANGE = 10_000
_LARGEST = np.iinfo(np.int32).max


class TextSource(TokenSource):
    """One text as one document."""

    def __init__(self, name: str, text: str, tokenizer: Tokenizer) -> None:
        """Raises: UserError if the text is empty or too long, or holds what the tokenizer does not know."""
        self.name = name
        try:
            tokens = tokenizer.encode(text)
        except UserError as reason:
            raise UserError(f"{name}: {reason.what}", found=reason.found, expected=reason.expected) from reason
        if tokens and tokenizer.end_token is not None:
            tokens.append(tokenizer.end_token)
        if not 0 < len(tokens) <= _LARGEST:
            what = "too long for one text" if tokens else "empty"
            raise UserError(f"{name} is {what}", found=f"{len(tokens)} tokens")
        self.stream = np.array(tokens, dtype=np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32)
        self.stream.flags.writeable = False
        self.starts = np.zeros(1, dtype=np.int64)
        self.sizes = np.array([len(tokens)], dtype=np.int32)


def open_text(config: DataConfig) -> TextSource:
    """The text of ``--data_file``, or the sums of ``dummy``, in the vocabulary that ``--tokenizer`` names.

    Raises: UserError if the file cannot be read in its encoding, is empty, or does not fit the vocabulary.
    """
    text = _text(config)
    name = "dummy" if config.data_type == "dummy" else config.data_file
    return TextSource(name, text, _tokenizer(config, text))


def data_tokenizer(config: DataConfig) -> Tokenizer:
    """The tokenizer of a run's data, also where it is still to be made of them; ``vocab_size`` ids are what a model of
    these data needs.

    A text whose ``--tokenizer`` is the path of a .json file that is not there yet has a vocabulary of its characters.

    Raises: UserError as ``load_tokenizer``, or if the text cannot be read.
    """
    return _tokenizer(config, _text(config)) if is_to_be_made(config) else load_tokenizer(config.tokenizer)


def keep_vocabulary(config: DataConfig) -> None:
    """Write the vocabulary that was made of a text where ``--tokenizer`` says, for what reads the model later.

    Raises: UserError if it cannot be written.
    """
    if is_to_be_made(config):
        write_characters(Path(config.tokenizer), _characters(_text(config)))


def is_to_be_made(config: DataConfig) -> bool:
    """Whether the tokenizer of the data has to be made of them."""
    name = config.tokenizer
    return config.data_type in TEXTS and name.lower().endswith(".json") and not Path(name).exists()


def read_text(path: str, encoding: str) -> str:
    """A text file, with \\n for every kind of line end. Raises: UserError if it cannot be read in ``encoding``."""
    try:
        with io.TextIOWrapper(open_file(path), encoding=encoding) as file:
            return file.read()
    except UnicodeDecodeError as reason:
        raise UserError(
            f"{path} is not {encoding}",
            found=f"{reason.reason} at byte {reason.start}",
            fix="--data_type utf-16le" if encoding == "utf-8" else "--data_type utf-8",
        ) from reason
    except OSError as reason:
        raise UserError(f"cannot read {path}", found=reason.strerror, fix="check the path") from reason


def _tokenizer(config: DataConfig, text: str) -> Tokenizer:
    if is_to_be_made(config):
        return CharacterTokenizer(_characters(text), config.tokenizer)
    return load_tokenizer(config.tokenizer)


def _characters(text: str) -> list[str]:
    return sorted(set(text))


def _text(config: DataConfig) -> str:
    return _sums() if config.data_type == "dummy" else read_text(config.data_file, config.data_type)


def _sums() -> str:
    pairs = ((number % _DUMMY_RANGE, number * number % _DUMMY_RANGE) for number in range(_DUMMY_SUMS))
    return "".join(f".{one}+{other}={one + other}." for one, other in pairs)
