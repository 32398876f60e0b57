"""Stored words of a teacher, beside the rows of data they are about.

Letters: B rows, T tokens, K tokens that are told apart.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rwkvpeft.data.batches import Batch, DistillationBatch
from rwkvpeft.data.collate import TokenCollator, Weight, token_batch
from rwkvpeft.data.label_index import fingerprint_of, places_of, read_index, read_sizes, sizes_of
from rwkvpeft.data.mixing import MixedRows
from rwkvpeft.data.packing import PackedRows
from rwkvpeft.data.row import Row
from rwkvpeft.data.rows import SCANNED_TOKENS, DocumentRows, RowDataset
from rwkvpeft.data.source import TokenSource
from rwkvpeft.data.splitting import DocumentsOf
from rwkvpeft.data.tensor_file import TensorFile
from rwkvpeft.errors import ContractError, UserError

IDS, LOGPROBS, TAIL = "teacher_ids", "teacher_logprobs", "teacher_tail"

# each is an open file; systems allow a process about a thousand
_OPEN_SHARDS = 64
_AGAIN = "the labels of these data: python -m rwkvpeft.teacher with the same --data_file and --tokenizer"


class TeacherLabels:
    """A folder of labels, of which documents are read; can be sent to data workers.

    Args:
        top_k: tokens that are told apart; the others that are stored are added to the rest. 0, or more than are
            stored: all that are.
        temperature: must be one of those stored.
    Raises: UserError if the folder is not one of labels, is not complete, or has no such temperature.
    """

    def __init__(self, folder: Path | str, *, top_k: int, temperature: float) -> None:
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        missing = next((n for n in range(self.index.shards) if not self.index.has_shard(self.folder, n)), None)
        if missing is not None:
            raise UserError(
                f"the labels in {folder} are not complete",
                found=f"shard {missing} of {self.index.shards} is missing or not whole",
                fix="the same command python -m rwkvpeft.teacher once more, which goes on where it was stopped",
            )
        if temperature not in self.index.temperatures:
            stored = " ".join(f"{value:g}" for value in self.index.temperatures)
            raise UserError(
                f"--distill_temperature {temperature:g} is not stored in {folder}, and what all other tokens have "
                "cannot be told from another",
                found=stored,
                fix=f"--distill_temperature {self.index.temperatures[0]:g}, or python -m rwkvpeft.teacher "
                f"--temperature {stored} {temperature:g}",
            )
        self.temperature = temperature
        self._row = self.index.temperatures.index(temperature)
        self.top_k = min(top_k, self.index.top_k) or self.index.top_k
        self.sizes = read_sizes(self.folder, self.index)
        self._starts = places_of(self.sizes, self.index.ctx_len)
        self._open: OrderedDict[int, TensorFile] = OrderedDict()

    def require(self, sources: Sequence[TokenSource], ctx_len: int) -> None:
        """Refuse labels of other data, or of shorter rows than ``ctx_len``. All tokens are compared here, but for very
        many, of which each is when it is read.

        Raises: UserError.
        """
        sizes = sizes_of(sources)
        names = ", ".join(source.name for source in sources)
        if not np.array_equal(sizes, self.sizes):
            raise UserError(f"the labels in {self.folder} are not those of {names}",
                            found=f"labels of {len(self.sizes)} documents with {self.index.tokens} tokens",
                            expected=f"{len(sizes)} documents with {int(sizes.sum(dtype=np.int64))} tokens", fix=_AGAIN)
        if self.index.tokens <= SCANNED_TOKENS and fingerprint_of(sources) != self.index.data_fingerprint:
            raise UserError(f"the labels in {self.folder} are not those of {names}",
                            found="documents as long, with other tokens", fix=_AGAIN)
        known = self.index.ctx_len
        if known and ctx_len > known and int(sizes.max(initial=0)) > known + 1:
            raise UserError(f"the labels in {self.folder} end after {known} tokens of each document",
                            found=f"--ctx_len {ctx_len}", fix=f"--ctx_len {known}, or labels made without --ctx_len")

    def of(self, document: int, inputs: NDArray[np.int64], length: int) -> dict[str, NDArray[Any]]:
        """What the teacher says after each of the first tokens of a document.

        Args:
            inputs: (t,) these tokens.
            length: places of the arrays; those behind ``inputs`` hold zeros.
        Returns: ``teacher_ids`` (length, K) int32, ``teacher_logprobs`` (length, K) and ``teacher_tail`` (length,)
            fp32, at the temperature.
        Raises: UserError if the labels are of other tokens; FileChanged if a shard is not what it was.
        """
        start = int(self._starts[document])
        if start + len(inputs) > int(self._starts[document + 1]):
            raise ContractError(f"{len(inputs)} labels of document {document}")
        k = self.top_k
        found = {
            IDS: np.zeros((length, k), np.int32),
            LOGPROBS: np.zeros((length, k), np.float32),
            TAIL: np.zeros(length, np.float32),
        }
        done = 0
        while done < len(inputs):
            shard, first = divmod(start + done, self.index.shard_places)
            count = min(len(inputs) - done, self.index.shard_places - first)
            part = slice(done, done + count)
            self._fill({name: array[part] for name, array in found.items()}, shard, first, inputs[part], document)
            done += count
        return found

    def _fill(
        self, found: Mapping[str, NDArray[Any]], shard: int, first: int, inputs: NDArray[np.int64], document: int
    ) -> None:
        """Read labels that lie in one shard, from its place ``first`` on."""
        file, stop, k = self._shard(shard), first + len(inputs), self.top_k
        if not np.array_equal(file.read("tokens", first, stop), inputs):
            raise UserError(f"the labels in {self.folder} are of other tokens than the data, in document {document}",
                            fix=_AGAIN)
        at_1 = file.read("logprobs", first, stop).astype(np.float32)
        logprobs = at_1 / np.float32(self.temperature)
        logprobs -= file.read_row("normalisers", self._row, first, stop)[:, None]
        tail = file.read_row("tails", self._row, first, stop)
        found[IDS][:] = file.read("ids", first, stop)[:, :k]
        if found[IDS].min() < 0 or found[IDS].max() >= self.index.vocab_size:
            raise UserError(f"{file.path} holds a token that the teacher does not know", fix="labels made anew")
        found[LOGPROBS][:] = logprobs[:, :k]
        left_out = logprobs[:, k:]
        found[TAIL][:] = np.logaddexp(tail, np.logaddexp.reduce(left_out, axis=1)) if left_out.size else tail

    def _shard(self, shard: int) -> TensorFile:
        if shard not in self._open:
            while len(self._open) >= _OPEN_SHARDS:
                self._open.popitem(last=False)
            path, layouts = self.index.shard_path(self.folder, shard), self.index.shard_layouts(shard)
            self._open[shard] = TensorFile(path, layouts)
        self._open.move_to_end(shard)
        return self._open[shard]


class LabelCollator(TokenCollator):
    """Rows of tokens with a teacher's words beside them."""

    def batch(self, joined: Row, step_weight: Weight) -> Batch:
        """A ``DistillationBatch``."""
        tokens, beside = token_batch(joined, step_weight), joined.beside or {}
        ids, logprobs, tail = (torch.from_numpy(beside[name]) for name in (IDS, LOGPROBS, TAIL))
        return DistillationBatch(*tokens[:4], ids, logprobs, tail, tokens.sequences)


def with_labels(dataset: RowDataset, labels: TeacherLabels) -> RowDataset:
    """The dataset, whose rows now have a teacher's words beside them, and whose batches hold them.

    Raises: UserError if the labels are not those of its data, or its rows are windows that begin anywhere.
    """
    parts = _documents_of(dataset)
    labels.require([_whole(part.source) for part in parts], dataset.ctx_len)
    first = 0
    for part in parts:
        numbers = part.source.documents if isinstance(part.source, DocumentsOf) else None
        part.beside = _Beside(labels, first, numbers)
        first += len(_whole(part.source))
    dataset.collator = LabelCollator(dataset.joining)
    return dataset


class _Beside:
    """Finds the labels of a part's documents. Args: ``first``: the part's first document among all that have labels;
    ``numbers``: of the part's documents in their file, None for all."""

    def __init__(self, labels: TeacherLabels, first: int, numbers: NDArray[np.int64] | None) -> None:
        self._labels = labels
        self._first = first
        self._numbers = numbers

    def __call__(self, document: int, inputs: NDArray[np.int64], length: int) -> Mapping[str, NDArray[Any]]:
        number = document if self._numbers is None else int(self._numbers[document])
        return self._labels.of(self._first + number, inputs, length)


def _documents_of(dataset: RowDataset) -> list[DocumentRows]:
    if isinstance(dataset, PackedRows):
        return _documents_of(dataset.documents)
    if isinstance(dataset, MixedRows):
        return [documents for part in dataset.parts for documents in _documents_of(part)]
    if isinstance(dataset, DocumentRows):
        return [dataset]
    raise UserError(
        "a teacher's stored labels are of documents from their beginning, and windows of --dataload get begin anywhere",
        found="--dataload get",
        fix="--dataload pad or pack, or the model itself as --teacher MODEL.pth",
    )


def _whole(source: TokenSource) -> TokenSource:
    return source.source if isinstance(source, DocumentsOf) else source
