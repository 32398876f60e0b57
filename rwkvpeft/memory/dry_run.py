"""One training step on tensors without data, and how many bytes would have been alive at its worst moment.

The step is the real one: forward, loss and backward of the model, its adapters and its operator, with or without
checkpointing. What it allocates is counted when it is made and when it is let go.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rwkvpeft.data.batches import TokenBatch
from rwkvpeft.models.backbone import Rwkv
from rwkvpeft.objectives.base import Objective
from rwkvpeft.objectives.long_context import LongContext
from rwkvpeft.ops.opaque import BODIES
from rwkvpeft.ops.sequences import Sequences

Most = Literal["of all", "beside gradients"]


class Moment(NamedTuple):
    """Bytes alive beside the weights at one moment, and how many of them were gradients of trained parameters."""

    bytes: int
    gradients: int

    @property
    def beside(self) -> int:
        """Bytes that are not gradients."""
        return self.bytes - self.gradients


def run_step(
    model: Rwkv,
    objective: Objective,
    rows: int,
    tokens: int,
    *,
    accumulates: bool,
    documents: Sequence[int] = (),
) -> dict[tuple[str, Most], Moment]:
    """Run one step of an outline; it has gradients afterwards.

    Args:
        rows, tokens: of the micro-batch.
        accumulates: whether gradients of earlier micro-batches are there already.
        documents: tokens of each document of a packed row, which all rows then are like, one behind another; ``tokens``
            is not read.
    Returns: the worst moments of each phase: ``forward`` (with the loss), ``last block`` (until its backward pass is
        over) and ``backward`` (of all others); of all chunks, if the objective works in chunks. Of a phase that is
        where there is most of everything, and where there is most beside the gradients.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tally = Tally([*model.parameters(), *model.buffers()])
    gathered = sum(parameter.nbytes for parameter in trained) if isinstance(objective, LongContext) else 0
    with tally:
        if accumulates:
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
                tally.gradients += parameter.nbytes
        else:
            for parameter in trained:
                parameter.register_post_accumulate_grad_hook(tally.add_gradient)
        model.emb.register_forward_pre_hook(lambda *_: tally.begin(gathered))
        model.ln_out.register_forward_hook(tally.watch_output)
        model.blocks[-1].register_forward_pre_hook(tally.watch_input)
        sequences = Sequences(rows * tuple(documents)) if documents else None
        size = (rows, tokens) if sequences is None else (1, sequences.tokens)
        ids = torch.empty(size, dtype=torch.int64, device="meta")
        weights = torch.empty(size, device="meta")
        batch = TokenBatch(ids, ids, weights, weights.sum(), sequences)
        objective(model, batch, batch.step_weight).total.backward()
    return tally.worst


def bytes_kept(model: Rwkv, rows: int, tokens: int) -> int:
    """What is there beside the weights of an outline when its blocks and its final norm have run forward.

    Args:
        rows, tokens: of the micro-batch.
    """
    tally = Tally([*model.parameters(), *model.buffers()])
    with tally:
        # named, so that its graph lives until the figure is read; the states do not
        hidden = model.hidden(torch.empty(rows, tokens, dtype=torch.int64, device="meta"))[0]
    assert hidden.requires_grad
    return tally.alive


class Tally(TorchDispatchMode):
    """Bytes of all storages made while it is active and still alive; the ``worst`` moments of each ``phase``."""

    def __init__(self, at_rest: list[Tensor]) -> None:
        super().__init__()
        self.alive = 0
        self.gradients = 0
        self._gathered = 0
        self.phase = "forward"
        self.worst: dict[tuple[str, Most], Moment] = {}
        self._known = {tensor.untyped_storage()._cdata for tensor in at_rest}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.nonzero.default and args[0].is_meta:
            # which tokens are trained is not known: as many as there are
            made = torch.empty(args[0].numel(), args[0].dim(), dtype=torch.int64, device="meta")
        elif func in BODIES:
            with self:
                made = BODIES[func](*args, **(kwargs or {}))
        else:
            made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.alive += storage.nbytes()
        weakref.finalize(storage, self._remove, key, storage.nbytes())
        now = Moment(self.alive, self.gradients)
        self._keep(now, "of all", now.bytes, lambda moment: moment.bytes)
        self._keep(now, "beside gradients", now.beside, lambda moment: moment.beside)

    def _keep(self, now: Moment, most: Most, size: int, size_of: Callable[[Moment], int]) -> None:
        before = self.worst.get((self.phase, most))
        if before is None or size > size_of(before):
            self.worst[self.phase, most] = now

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size

    def add_gradient(self, parameter: Tensor) -> None:
        """Count a gradient that has just arrived."""
        assert parameter.grad is not None
        self.gradients += parameter.grad.nbytes

    def begin(self, gathered: int) -> None:
        """Tokens are read, by a chunk if not the first time: it finds ``gathered`` bytes of gradients of others."""
        if self.phase != "forward":
            self.phase = "forward"
            self.gradients += gathered - self._gathered
            self._gathered = gathered

    def watch_output(self, norm: nn.Module, inputs: tuple[Any, ...], hidden: Tensor) -> None:
        """The gradient of what the blocks give marks the begin of their backward pass."""
        if hidden.requires_grad:
            hidden.register_hook(self._enter_last_block)

    def _enter_last_block(self, gradient: Tensor) -> None:
        self.phase = "last block"

    def watch_input(self, block: nn.Module, inputs: tuple[Any, ...]) -> None:
        """The gradient of the last block's input marks the end of its backward pass."""
        if inputs[0].requires_grad:
            inputs[0].register_hook(self._leave_last_block)

    def _leave_last_block(self, gradient: Tensor) -> None:
        self.phase = "backward"
