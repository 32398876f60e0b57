"""A data file becomes rows to train on, checked before anything is trained."""

from __future__ import annotations

import re
from dataclasses import replace
from fractions import Fraction
from typing import NamedTuple, TypeVar

from rwkvpeft.config.data_files import data_files, format_of
from rwkvpeft.config.groups import DataConfig
from rwkvpeft.data.mixing import MixedDocuments, MixedRows
from rwkvpeft.data.packing import PackedRows
from rwkvpeft.data.prime import is_prime, magic_prime
from rwkvpeft.data.row import Joining, Row
from rwkvpeft.data.rows import DocumentRows, RowDataset, WindowRows
from rwkvpeft.data.rules import mask_rule
from rwkvpeft.data.sampling import mix
from rwkvpeft.data.source import TokenSource
from rwkvpeft.data.splitting import shared_out, split_source, without_copies
from rwkvpeft.data.tokenizer import load_tokenizer
from rwkvpeft.errors import UserError
from rwkvpeft.registry import SOURCES, find

__all__ = ["Row", "RowDataset", "open_dataset", "open_source", "open_split", "open_stream"]

# a document that is packed is not padded before
_JOININGS: dict[str, Joining] = {"pad": "equal", "only": "alone", "pack": "alone"}
_SPLIT_SEED = 0
_Rows = TypeVar("_Rows", WindowRows, DocumentRows)

_SHOWN = 160
_READ_TOKENS = 4096
_DIAGNOSED_DOCUMENTS = 200


def open_dataset(config: DataConfig, *, ctx_len: int, vocab_size: int, seed: int) -> RowDataset:
    """Open the data of a run and refuse what cannot be trained on.

    Args:
        config: the files, their format, how they become rows and what is trained. ``config.ctx_len`` is not read.
        ctx_len: tokens in a row, the resolved value.
        vocab_size: token ids of the model; the data may hold no other.
        seed: of the order of rows.
    Raises:
        UserError: no such file, a damaged one, a token id the model does not have, too few tokens for ``get``, a
            magic prime that does not fit, or nothing that would be trained.
    """
    return _rows(config, _open_parts(config, vocab_size), ctx_len, seed)


def open_split(
    config: DataConfig, share: float, *, ctx_len: int, vocab_size: int, seed: int
) -> tuple[RowDataset, RowDataset]:
    """``open_dataset`` without some of the documents, and the rows of those documents. No document is in both, nor is
    a copy of one.

    Which documents are held out does not depend on ``seed``: another run holds out the same.

    Args:
        share: below 1 the share of each file's documents that is held out, otherwise how many of all files together.
        config, ctx_len, vocab_size, seed: as of ``open_dataset``.
    Raises: UserError as ``open_dataset`` does, also if nothing in either part would be trained or a file has too few
        documents.
    """
    kept, held_out = split_parts(_open_parts(config, vocab_size), share)
    return _rows(config, kept, ctx_len, seed), _rows(replace(config, magic_prime=0), held_out, ctx_len, seed)


def split_parts(parts: list[Part], share: float) -> tuple[list[Part], list[Part]]:
    """The parts without what is held out of each, and that; some parts may have nothing held out. Arguments and errors
    are those of ``open_split``."""
    shares: list[float] = [share] * len(parts)
    if share >= 1:
        shares = [*shared_out(round(share), [len(part.source) for part in parts])]
    kept, held_out = [], []
    for part, own in zip(parts, shares, strict=True):
        trained, other = split_source(part.source, own, _SPLIT_SEED) if own else (part.source, None)
        kept.append(part._replace(source=trained))
        if other is not None:
            held_out.append(part._replace(source=other))
    apart = [part.source for part in held_out]
    return [part._replace(source=without_copies(part.source, apart)) for part in kept], held_out


def open_source(config: DataConfig) -> TokenSource:
    """The documents of a ``--data_file`` of one part. A path in .jsonl is read so, whatever ``--data_type`` is.

    Raises: UserError as the sources do, and for several parts.
    """
    files = data_files(config.data_file)
    if len(files) > 1:
        raise UserError("--data_file names several files where one is needed", found=config.data_file)
    return _open_file(config, files[0].path)


def open_stream(config: DataConfig, *, ctx_len: int, vocab_size: int) -> RowDataset:
    """Windows of all of a text, of ``ctx_len`` tokens or as many as the shortest file has.

    Args:
        config: with ``--dataload get``.
    Raises: UserError as ``open_dataset`` does.
    """
    parts = _open_parts(config, vocab_size)
    shortest = min(part.source.n_tokens for part in parts)
    return _rows(config, parts, max(1, min(ctx_len, shortest - 1)), seed=0)


class Part(NamedTuple):
    """A part of ``--data_file``: its path, its share relative to the other parts, and its documents."""

    path: str
    share: Fraction
    source: TokenSource


def _open_parts(config: DataConfig, vocab_size: int) -> list[Part]:
    parts = [Part(*part, _open_file(config, part.path)) for part in data_files(config.data_file)]
    if config.magic_prime and len(parts) > 1:
        raise UserError(
            "--magic_prime is the order of one data set",
            found=f"{len(parts)} files in --data_file",
            fix="one file, or leave --magic_prime out",
        )
    for part in parts:
        part.source.check(vocab_size)
    return parts


def _open_file(config: DataConfig, path: str) -> TokenSource:
    kind = format_of(path, config.data_type)
    source: TokenSource = find(SOURCES, kind, flag="--data_type")(replace(config, data_file=path, data_type=kind))
    return source


def _rows(config: DataConfig, parts: list[Part], ctx_len: int, seed: int) -> RowDataset:
    if config.dataload == "get":
        windows = [_windows(config, part.source, ctx_len, seed_of(seed, number)) for number, part in enumerate(parts)]
        return windows[0] if len(parts) == 1 else MixedRows(windows, *mixture(parts))
    each = [_documents(config, part.source, ctx_len, seed_of(seed, number)) for number, part in enumerate(parts)]
    documents = each[0] if len(parts) == 1 else MixedDocuments(each, *mixture(parts))
    if config.dataload == "pack":
        return PackedRows(documents, seed=seed, shuffle=bool(config.data_shuffle))
    return documents


def mixture(parts: list[Part]) -> tuple[list[Fraction], list[str]]:
    """Shares and names of the parts."""
    return [part.share for part in parts], [part.path for part in parts]


def seed_of(seed: int, number: int) -> int:
    """Parts of one size are not to be drawn in one order."""
    return mix(seed, number) if number else seed


def _windows(config: DataConfig, source: TokenSource, ctx_len: int, seed: int) -> WindowRows:
    _check_length(source, ctx_len)
    _check_magic_prime(source, config.magic_prime, ctx_len)
    rows = WindowRows(
        source,
        mask_rule(config),
        ctx_len,
        seed=seed,
        shuffle=bool(config.data_shuffle),
        magic_prime=config.magic_prime,
    )
    return _checked(rows, config)


def _documents(config: DataConfig, source: TokenSource, ctx_len: int, seed: int) -> DocumentRows:
    rows = DocumentRows(
        source,
        mask_rule(config),
        ctx_len,
        seed=seed,
        shuffle=bool(config.data_shuffle),
        joining="padded" if config.length_buckets else _JOININGS[config.dataload],
    )
    return _checked(rows, config)


def _checked(rows: _Rows, config: DataConfig) -> _Rows:
    rows.tokenizer = config.tokenizer
    if rows.report().trained_tokens == 0:
        raise _nothing_trained(rows, config)
    return rows


def _check_length(source: TokenSource, ctx_len: int) -> None:
    if source.n_tokens <= ctx_len:
        raise UserError(
            f"{source.name} is too short for --dataload get",
            found=f"{source.n_tokens} tokens",
            expected=f"at least --ctx_len + 1 = {ctx_len + 1}",
            fix=f"--ctx_len {source.n_tokens - 1}, or --dataload pad" if source.n_tokens > 1 else "more data",
        )


def _check_magic_prime(source: TokenSource, prime: int, ctx_len: int) -> None:
    fits = prime * ctx_len < source.n_tokens
    if not prime or (fits and prime % 3 == 2 and is_prime(prime)):
        return
    right = magic_prime(source.n_tokens, ctx_len)
    raise UserError(
        f"--magic_prime {prime} does not fit {source.name}",
        found=f"{source.n_tokens} tokens, {source.n_tokens // ctx_len} windows of --ctx_len {ctx_len}",
        expected="a prime of the form 3k + 2 that is smaller than the number of windows",
        fix=f"--magic_prime {right}" if right else "leave --magic_prime out, these data are too short for one",
    )


def _nothing_trained(dataset: WindowRows | DocumentRows, config: DataConfig) -> UserError:
    """The error that says why, with the first document shown."""
    source = dataset.source
    text = load_tokenizer(config.tokenizer).decode(source.read(0, _READ_TOKENS).tolist())
    why, fix = _cause(dataset, config, text)
    return UserError(
        f"nothing in {source.name} would be trained with --loss_mask {config.loss_mask}: {why}",
        found=f"first document: {_shortened(text)}",
        expected="at least one trained token",
        fix=fix,
    )


def _cause(dataset: WindowRows | DocumentRows, config: DataConfig, text: str) -> tuple[str, str]:
    """Why nothing is trained, and what to do."""
    if config.loss_mask not in ("qa", "last", "se"):
        return "no document has two tokens", "longer documents"
    source = dataset.source
    for document in range(min(len(source), _DIAGNOSED_DOCUMENTS)):
        size = int(source.sizes[document])
        targets = dataset.rule.weights(source, document, size)[1:]
        if targets.any():
            place = f"document {document}, token {int((targets > 0).argmax()) + 1} of {size}"
            return f"the first trained token lies beyond --ctx_len {dataset.ctx_len} ({place})", f"--ctx_len {size - 1}"
    if config.loss_mask == "se":
        return f"no document holds the text {config.mask_id['mask0']!r}", "--mask_id with the texts of your data"
    spoken = source.spoken(0)
    if spoken is not None and any(voice.is_answer for voice in spoken.voices):
        return "no assistant's turn has words of a weight above 0", 'turns without "train": false and "weight": 0'
    if re.search(r"\nAssistant:", text):
        return "a turn begins after a blank line, and here after a single newline", "a blank line before each turn"
    return (
        'no document has "Assistant:" or "Response:" at its beginning or after a blank line',
        "the chat layout (User: ..., a blank line, Assistant: ...), or --loss_mask none",
    )


def _shortened(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")
