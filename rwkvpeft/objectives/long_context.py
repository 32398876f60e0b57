"""Rows longer than memory: worked through in chunks that hand on their state.

``truncated`` cuts the gradient where one chunk ends and the next begins, as RWKV-PEFT does. ``exact`` does not: with
s_i the state after chunk i and L_i its part of the loss, ::

    forward    i = 1 .. n:  s_i, L_i = f(s_(i-1), chunk i),  of which only the s_i are kept
    backward   i = n .. 1:  f once more, now differentiated for  dL/dL_i  and  dL/ds_i,  which gives  dL/ds_(i-1)

which is back-propagation through the whole row, in the memory of one chunk and of the states between chunks (Chen et
al., Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174, along time instead of depth). The last chunk's
graph is kept from the forward pass, so that a row of one chunk costs nothing extra.

All chunks are one node of autograd's graph, whose inputs are the trained parameters: each parameter's gradient arrives
once for each batch, as from any other layer, and whoever waits for it (several devices, accumulation) sees no
difference. Letters: B rows, T tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rwkvpeft.config.groups import TrainConfig
from rwkvpeft.data.batches import DistillationBatch, TokenBatch
from rwkvpeft.errors import ContractError
from rwkvpeft.models.recompute import draws_random_numbers
from rwkvpeft.models.state import RecurrentState
from rwkvpeft.objectives.base import Loss, Objective, TokenObjective

Rows = TokenBatch | DistillationBatch

_AFTER_THE_STATES = ("ln_out.", "head.")


@dataclass(frozen=True)
class LongContext:
    """The loss of ``inner`` over rows of any length, with the activations of one chunk.

    Args:
        inner: the loss of one chunk.
        chunk: tokens of a chunk; the last one of a row may be shorter.
        exact: gradients are those of one long pass; otherwise they end at the borders of chunks.
        offload: states between chunks wait in main memory, on a GPU.
        late: work out truncated gradients in the backward pass too, where the incoming gradient is known, for about a
            third more time: fp16 loses gradients that are not scaled before.
    """

    inner: TokenObjective
    chunk: int
    exact: bool = False
    offload: bool = False
    late: bool = False

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Those of ``inner``."""
        return self.inner.metric_names

    def __call__(self, model: nn.Module, batch: Rows, normaliser: Tensor | None = None) -> Loss:
        """See ``Objective``. Raises: ContractError for a packed batch, whose documents end where chunks do not."""
        if batch.sequences is not None:
            raise ContractError("a packed row cannot be cut into chunks")
        tokens = batch.weights.sum()
        if normaliser is None:
            normaliser = tokens.where(tokens > 0, 1.0)
        work = _Work(self, model, batch, normaliser)
        if work.trained and torch.is_grad_enabled():
            total = cast(Tensor, _Through.apply(work, *work.trained.values()))
        else:
            with torch.no_grad():
                total = work.read(len(work.pieces))
        return Loss(total, tokens, work.metrics)


def in_chunks(objective: TokenObjective, config: TrainConfig) -> Objective:
    """The objective over rows of any length, if the settings ask for that."""
    long = config.long_context
    if not long.infctx:
        return objective
    return LongContext(
        objective,
        long.chunk_ctx,
        exact=long.infctx_grad == "exact",
        offload=long.infctx_offload,
        late=config.runtime.precision == "fp16",
    )


class _Through(torch.autograd.Function):
    """The work as one function of the trained parameters."""

    @staticmethod
    def forward(ctx: Any, work: _Work, *trained: Tensor) -> Tensor:
        ctx.work = work
        return work.forward()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.work.backward(grads[0])


class _Piece(NamedTuple):
    """A chunk of every row, and which part of the rows' positions it is."""

    batch: Rows
    share: float


class _Graph(NamedTuple):
    """One chunk's differentiable loss (), and the state's tensors before it (leaves) and after it, in one order."""

    loss: Tensor
    before: list[Tensor | None]
    after: list[Tensor | None]


class _Work:
    """One batch on its way through the model, forward and, once, backward."""

    def __init__(self, settings: LongContext, model: nn.Module, batch: Rows, normaliser: Tensor) -> None:
        self.settings = settings
        self.model = model
        self.normaliser = normaliser
        self.device = batch.input_ids.device
        self.pieces = _pieces(batch, settings.chunk)
        self.trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
        self._first = _first_trained(self.trained)
        # they share the parameters' memory, and gather the gradients of all chunks without anyone noticing
        self._stand_ins: dict[str, Tensor] = {}
        self._states: list[RecurrentState | None] = []
        self._generators: list[list[Tensor]] = []
        self._last: _Graph | None = None
        # figures of the chunks that were read so far, each for the first time
        self.metrics: dict[str, Tensor] = {}

    @property
    def _late(self) -> bool:
        return self.settings.exact or self.settings.late

    def read(self, count: int, *, keep: bool = False) -> Tensor:
        """The loss () of the first ``count`` chunks, without gradient; ``keep`` what the backward pass starts from.

        The state behind them, and the one before each of them if it is kept, end up in ``_states``.
        """
        repeats = keep and self.model.training and draws_random_numbers(self.model)
        total = torch.zeros((), device=self.device)
        state: RecurrentState | None = None
        for piece in self.pieces[:count]:
            if keep:
                self._states.append(None if state is None else state.map(self._put_aside))
            if repeats:
                self._generators.append(_random_states(self.device))
            loss, state = self.settings.inner.part(self.model, piece.batch, self.normaliser, state, piece.share)
            total = total + loss.total
            self._count(loss)
            state = state.map(_alone)
        self._states.append(state)
        return total

    def forward(self) -> Tensor:
        """The loss () of all chunks, and what the backward pass needs."""
        self._stand_ins = {name: tensor.detach().requires_grad_() for name, tensor in self.trained.items()}
        work = self._read_to_the_last if self._late else self._read_and_differentiate
        return cast(Tensor, self._with_stand_ins(work))

    def _read_to_the_last(self) -> Tensor:
        total = self.read(len(self.pieces) - 1, keep=True)
        loss, self._last = self._differentiable(len(self.pieces) - 1, self._states.pop())
        self._count(loss)
        return total + self._last.loss.detach()

    def _read_and_differentiate(self) -> Tensor:
        total = torch.zeros((), device=self.device)
        state: RecurrentState | None = None
        for index in range(len(self.pieces)):
            loss, state = self._differentiate(index, state)
            total = total + loss
        return total

    def _differentiate(self, index: int, state: RecurrentState | None) -> tuple[Tensor, RecurrentState]:
        loss, after = self._part(index, state)
        after = after.map(_alone)
        self._count(loss)
        if loss.total.requires_grad:
            loss.total.backward()
        return loss.total.detach(), after

    def _part(self, index: int, state: RecurrentState | None) -> tuple[Loss, RecurrentState]:
        piece = self.pieces[index]
        with torch.enable_grad():
            return self.settings.inner.part(self.model, piece.batch, self.normaliser, state, piece.share)

    def _count(self, loss: Loss) -> None:
        for name, value in loss.metrics.items():
            self.metrics[name] = self.metrics[name] + value if name in self.metrics else value

    def backward(self, grad: Tensor) -> list[Tensor | None]:
        """Gradients of the trained parameters; ``grad`` () is that of the loss. Raises: ContractError if repeated."""
        if not self._stand_ins:
            raise ContractError("rows in chunks are differentiated once: nothing is kept for a second time")
        if self._late:
            self._with_stand_ins(lambda: self._go_back(grad))
        found = [stand_in.grad for stand_in in self._stand_ins.values()]
        self._stand_ins = {}
        if not self._late:
            for gradient in found:
                if gradient is not None:
                    gradient.mul_(grad)
        return found

    def _go_back(self, grad: Tensor) -> None:
        behind: list[Tensor | None] = []
        for index in range(len(self.pieces) - 1, -1, -1):
            behind = self._go_back_through(self._graph(index), grad, behind)

    def _go_back_through(self, graph: _Graph, grad: Tensor, behind: list[Tensor | None]) -> list[Tensor | None]:
        """Differentiate a chunk; ``behind`` and the result are gradients of the states after and before it."""
        ends = [(graph.loss, grad), *zip(graph.after, behind, strict=bool(graph.after))]
        wanted = [(end, g) for end, g in ends if end is not None and end.requires_grad and g is not None]
        if wanted:
            torch.autograd.backward([end for end, _ in wanted], [g for _, g in wanted])
        return [None if start is None else start.grad for start in graph.before]

    def _graph(self, index: int) -> _Graph:
        if self._last is not None:
            graph, self._last = self._last, None
            return graph
        state = self._states.pop()
        if not self._generators:
            return self._differentiable(index, state)[1]
        now = _random_states(self.device)
        _set_random_states(self.device, self._generators[index])
        graph = self._differentiable(index, state)[1]
        _set_random_states(self.device, now)
        return graph

    def _differentiable(self, index: int, state: RecurrentState | None) -> tuple[Loss, _Graph]:
        before = None if state is None else self._leaves(state)
        loss, after = self._part(index, before)
        starts = [] if before is None else _tensors(before)
        ends = _tensors(after) if self.settings.exact and index < len(self.pieces) - 1 else []
        return loss, _Graph(loss.total, starts, ends)

    def _leaves(self, state: RecurrentState) -> RecurrentState:
        """The state on the model's device; what depends on a trained parameter wants a gradient, if it is exact."""
        device = self.device
        moved = state.map(lambda tensor: tensor.to(device, non_blocking=True).detach())
        if self.settings.exact:
            for block in moved.blocks[self._first :]:
                for tensor in block:
                    if tensor is not None:
                        tensor.requires_grad_()
        return moved

    def _put_aside(self, tensor: Tensor) -> Tensor:
        if not (self.settings.offload and tensor.is_cuda):
            return tensor
        place = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return place.copy_(tensor, non_blocking=True)

    def _with_stand_ins(self, work: Callable[[], Any]) -> Any:
        around = _Around(self.model)
        named = {f"model.{name}": tensor for name, tensor in self._stand_ins.items()}
        return torch.func.functional_call(around, named, (work,))


class _Around(nn.Module):
    """Calls a function while others stand in for the model's parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], Any]) -> Any:
        return work()


def _pieces(batch: Rows, chunk: int) -> list[_Piece]:
    tokens = batch.input_ids.shape[1]
    return [_Piece(part, part.input_ids.shape[1] / tokens) for part in batch.cut(chunk)]


def _first_trained(names: Iterable[str]) -> int:
    """The first block whose state depends on a trained parameter; one that is not of a block may be below all."""
    within = [re.match(r"blocks\.(\d+)\.", name) for name in names if not name.startswith(_AFTER_THE_STATES)]
    return min((int(found[1]) if found else 0 for found in within), default=2**31)


def _alone(tensor: Tensor) -> Tensor:
    """A copy, which keeps neither a graph nor the activations that a state may be a part of."""
    return tensor.detach().clone()


def _tensors(state: RecurrentState) -> list[Tensor | None]:
    return [tensor for block in state.blocks for tensor in block]


def _random_states(device: torch.device) -> list[Tensor]:
    """Where the generators stand that a model on ``device`` draws from."""
    states = [torch.get_rng_state()]
    if device.type not in ("cpu", "meta"):
        states.append(getattr(torch, device.type).get_rng_state())
    return states


def _set_random_states(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        getattr(torch, device.type).set_rng_state(state)
