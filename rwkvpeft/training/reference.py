"""``--reference start``: what the model said of all answers before it learned from them, worked out once and kept.

All processes share the work, before the first step; the file is the first one's. A run that is taken up reads it: the
weights it was made with are gone by then. Letters: N rows, A answers to each prompt.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from rwkvpeft.checkpoints.files import load_tensors, save_tensors
from rwkvpeft.data.loader import evaluation_batches
from rwkvpeft.data.pair_files import Pairs
from rwkvpeft.errors import UserError
from rwkvpeft.models.backbone import Rwkv
from rwkvpeft.objectives.base import Provided
from rwkvpeft.objectives.preference.base import Preference
from rwkvpeft.objectives.preference.scores import score_answers
from rwkvpeft.training.module import RwkvModule
from rwkvpeft.training.resting import at_rest

_SECONDS_BETWEEN_LINES = 10.0
_LOGPROBS, _STAMP = "logprobs", "stamp"


class KeepReference(pl.Callback):
    """Lays the reference's log-probabilities beside the rows before the first of them is read.

    Args:
        rows: the rows of the run by a word for each kind, which names its file: "" for what is trained on.
        folders: where files may be that an earlier run wrote; the first is where this one writes.
        stamp: what the log-probabilities depend on, as plain values: fingerprints of the weights that training starts
            from and of the data, and all settings that change what the model computes or how rows are cut.
        micro_bsz: rows that are worked on at once.
        report: takes a line of text for the user.
    """

    def __init__(
        self,
        rows: Mapping[str, Pairs],
        folders: Sequence[Path],
        stamp: Mapping[str, Any],
        *,
        micro_bsz: int,
        report: Callable[[str], None],
    ) -> None:
        super().__init__()
        self._rows = rows
        self._folders = folders
        self._stamp = dict(stamp)
        self._micro_bsz = micro_bsz
        self._report = report

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read what was kept, or work it out.

        Raises: UserError if the run is taken up and its file is gone or of other weights, data or settings, or if the
            model gives no finite numbers.
        """
        assert isinstance(pl_module, RwkvModule)
        for kind, rows in self._rows.items():
            name = f"reference{'_' + kind if kind else ''}.pth"
            stamp = {**self._stamp, "answers": rows.answers, "rows": len(rows)}
            here = self._kept(name, stamp) if trainer.is_global_zero else (None, "")
            kept, found = trainer.strategy.broadcast(here)
            if kept is None:
                if pl_module.progress.rows:
                    raise UserError(
                        f"the run cannot be taken up without {self._folders[0] / name}: the weights that it compares "
                        "with are gone",
                        found=found,
                        fix="put it back with the data and settings it was made with, or --resume none to start anew",
                    )
                kept = self._work_out(trainer, pl_module, rows)
                if trainer.is_global_zero:
                    save_reference(self._folders[0] / name, kept, stamp)
            rows.reference = kept

    def _kept(self, name: str, stamp: Mapping[str, Any]) -> tuple[NDArray[np.float32] | None, str]:
        """The content of the first file that suits, or None and what was found instead."""
        found = "no such file"
        for path in (folder / name for folder in self._folders):
            if path.exists():
                kept, differs = load_reference(path, stamp)
                if kept is not None:
                    self._report(f"reference: log-probabilities of {len(kept):,} prompts' answers from {path}")
                    return kept, ""
                found = f"one of another {', '.join(differs)}"
        return None, found

    def _work_out(self, trainer: pl.Trainer, module: RwkvModule, rows: Pairs) -> NDArray[np.float32]:
        objective, model, sharing = module.objective, module.model, module.sharing
        assert isinstance(objective, Preference)
        assert isinstance(model, Rwkv)

        def work() -> Tensor:
            return logprobs_of_rows(
                model, rows, objective.provided, micro_bsz=self._micro_bsz, rank=trainer.global_rank,
                world_size=trainer.world_size, equally_many=sharing.splits_weights, report=self._report,
            )

        with at_rest(model, module.seed):
            mine = sharing.run(trainer, work)
        # of each row one process has the numbers, and all others zeros
        whole: Tensor = trainer.strategy.reduce(mine.to(model.emb.weight.device), reduce_op="sum")
        if not whole.isfinite().all():
            raise UserError("log-probabilities of the model as it is are not finite", fix="--precision bf16 or fp32")
        return whole.cpu().numpy()


def logprobs_of_rows(
    model: Rwkv,
    rows: Pairs,
    provided: Provided,
    *,
    micro_bsz: int,
    rank: int = 0,
    world_size: int = 1,
    equally_many: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> Tensor:
    """What the model says of the answers as it is, (N, A) fp32 on the CPU: sums over their scored tokens.

    Args:
        rank: works on every ``world_size``-th batch of ``micro_bsz`` rows; the other rows are zeros.
        equally_many: work on as many batches as every other rank.
        report: takes a line now and then about how far it is.
    """
    found = torch.zeros(len(rows), rows.answers)
    batches = evaluation_batches(rows, micro_bsz, rank, world_size, equally_many=equally_many)
    device = model.emb.weight.device
    began = said = time.monotonic()
    for number, batch in enumerate(batches):
        start = (number * world_size + rank) * micro_bsz
        with torch.no_grad():
            logprobs = score_answers(model, batch.on(device), provided).logprobs
        # a batch beyond the last is there for the other ranks' sake
        found[start : start + micro_bsz] = logprobs.float().cpu()[: max(len(rows) - start, 0)]
        done, now = min(start + world_size * micro_bsz, len(rows)), time.monotonic()
        if now - said >= _SECONDS_BETWEEN_LINES:
            said = now
            left = (now - began) * (len(rows) / done - 1)
            report(f"reference: {done:,} of {len(rows):,} prompts, {left / 60:.1f} min left")
    return found


def save_reference(path: Path, logprobs: NDArray[np.float32], stamp: Mapping[str, Any]) -> None:
    """Write log-probabilities (N, A) and what they depend on; whole or not at all.

    Raises: UserError if the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = torch.frombuffer(bytearray(_as_text(stamp), "utf-8"), dtype=torch.uint8)
    save_tensors(path, {_LOGPROBS: torch.from_numpy(logprobs), _STAMP: text})


def load_reference(path: Path, stamp: Mapping[str, Any]) -> tuple[NDArray[np.float32] | None, list[str]]:
    """The log-probabilities of a file, or None and which words of its stamp differ.

    Raises: UserError if it is no such file.
    """
    tensors = load_tensors(path)
    try:
        logprobs = tensors[_LOGPROBS].clone()
        found = json.loads(bytes(tensors[_STAMP].tolist()))
        wanted = json.loads(_as_text(stamp))
        differs = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
        if logprobs.dtype != torch.float32 or not logprobs.isfinite().all():
            raise ValueError("numbers that are no log-probabilities")
        if not differs and tuple(logprobs.shape) != (stamp["rows"], stamp["answers"]):
            raise ValueError(f"numbers of {tuple(logprobs.shape)}")
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as reason:
        raise UserError(
            f"{path} holds no log-probabilities of a reference", found=reason, fix="delete it, or choose another folder"
        ) from reason
    return (None, differs) if differs else (logprobs.numpy(), [])


def _as_text(stamp: Mapping[str, Any]) -> str:
    return json.dumps(dict(stamp), sort_keys=True)
