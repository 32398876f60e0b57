"""A data file becomes rows to train on, checked before anything is trained."""

from __future__ import annotations

import re
from pathlib import Path

from rwkvpeft.config.groups import DataConfig
from rwkvpeft.data.prime import is_prime, magic_prime
from rwkvpeft.data.rows import DocumentRows, Row, RowDataset, WindowRows
from rwkvpeft.data.rules import mask_rule
from rwkvpeft.data.source import TokenSource
from rwkvpeft.data.tokenizer import load_tokenizer
from rwkvpeft.errors import UserError
from rwkvpeft.registry import SOURCES, find

__all__ = ["Row", "RowDataset", "open_dataset", "open_source"]

_SHOWN = 160
_READ_TOKENS = 4096
_DIAGNOSED_DOCUMENTS = 200


def open_dataset(config: DataConfig, *, ctx_len: int, vocab_size: int, seed: int) -> RowDataset:
    """Open the data of a run and refuse what cannot be trained on.

    Args:
        config: the file, its format, how it becomes rows and what is trained. ``config.ctx_len`` is not read.
        ctx_len: tokens in a row, the resolved value.
        vocab_size: token ids of the model; the data may hold no other.
        seed: of the order of rows.
    Raises:
        UserError: no such file, a damaged one, a token id the model does not have, too few tokens for ``get``, a
            magic prime that does not fit, or nothing that would be trained.
    """
    source = open_source(config)
    source.check(vocab_size)
    rule = mask_rule(config)
    shuffle = bool(config.data_shuffle)
    dataset: RowDataset
    if config.dataload == "get":
        _check_length(source, ctx_len)
        _check_magic_prime(source, config.magic_prime, ctx_len)
        dataset = WindowRows(
            source, rule, ctx_len, seed=seed, shuffle=shuffle, magic_prime=config.magic_prime
        )
    else:
        dataset = DocumentRows(source, rule, ctx_len, seed=seed, shuffle=shuffle, pads=config.dataload == "pad")
    dataset.tokenizer = config.tokenizer
    if dataset.report().trained_tokens == 0:
        raise _nothing_trained(dataset, config)
    return dataset


def open_source(config: DataConfig) -> TokenSource:
    """The documents of ``--data_file``. A path that ends in .jsonl is read as jsonl whatever ``--data_type`` says.

    Raises: UserError as the sources do.
    """
    kind = "jsonl" if Path(config.data_file).suffix.lower() == ".jsonl" else config.data_type
    source: TokenSource = find(SOURCES, kind, flag="--data_type")(config)
    return source


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


def _nothing_trained(dataset: RowDataset, config: DataConfig) -> UserError:
    """The error that says why, with the first document shown."""
    source = dataset.source
    text = load_tokenizer(config.tokenizer).decode(source.read(0)[:_READ_TOKENS].tolist())
    why, fix = _cause(dataset, config, text)
    return UserError(
        f"nothing in {source.name} would be trained with --loss_mask {config.loss_mask}: {why}",
        found=f"first document: {_shortened(text)}",
        expected="at least one trained token",
        fix=fix,
    )


def _cause(dataset: RowDataset, config: DataConfig, text: str) -> tuple[str, str]:
    """Why nothing is trained, and what to do."""
    if config.loss_mask not in ("qa", "se"):
        return "no document has two tokens", "longer documents"
    source = dataset.source
    for document in range(min(len(source), _DIAGNOSED_DOCUMENTS)):
        size = int(source.sizes[document])
        targets = dataset.rule.weights(source, document, size)[1:]
        if targets.any():
            place = f"document {document}, token {int(targets.argmax()) + 1} of {size}"
            return f"the first trained token lies beyond --ctx_len {dataset.ctx_len} ({place})", f"--ctx_len {size - 1}"
    if config.loss_mask == "se":
        return f"no document holds the text {config.mask_id['mask0']!r}", "--mask_id with the texts of your data"
    if re.search(r"\nAssistant:", text):
        return "a turn begins after a blank line, and here after a single newline", "a blank line before each turn"
    return (
        'no document has "Assistant:" or "Response:" at its beginning or after a blank line',
        "the chat layout (User: ..., a blank line, Assistant: ...), or --loss_mask none",
    )


def _shortened(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")
