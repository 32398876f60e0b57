"""Forward pass, loss and backward pass of a micro-batch, recorded once as a CUDA graph and replayed for every other.

A small model spends more time on launching kernels than on running them; a replay launches them all at once. A
recording knows addresses, not tensors: batches are copied into the same tensors, gradients are added in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from rwkvpeft.config.groups import DataConfig, RuntimeConfig
from rwkvpeft.models.recompute import draws_random_numbers

_WARM_UP = 3
"""Batches that run as they are before the recording: kernels are compiled, and libraries take their memory, then."""


class Graphs(Protocol):
    """What a device can record."""

    def aside(self, work: Callable[[], None]) -> None:
        """Do the work as a recording would, so that nothing is done for the first time while recording."""
        ...

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record the work without doing it; the result does it.

        Raises: RuntimeError if it holds something that cannot be recorded.
        """
        ...


class CudaGraphs:
    """Graphs of the current CUDA device."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None

    def aside(self, work: Callable[[], None]) -> None:
        """See ``Graphs``: on a stream other than the default one, which cannot be recorded."""
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()
        torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """See ``Graphs``."""
        graph = torch.cuda.CUDAGraph()
        # the thread that loads batches may go on using the device
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            work()
        return graph.replay


def why_not(runtime: RuntimeConfig, data: DataConfig, model: nn.Module, device_type: str) -> str | None:
    """Why the steps of a run cannot be replayed; None if they can, as far as is known before the first."""
    if device_type != "cuda":
        return f"a run on {device_type} has none"
    if runtime.precision == "fp16":
        return "the gradient scaler of fp16 looks at each step's gradients"
    if runtime.devices * runtime.num_nodes > 1:
        return "several devices add up their gradients while the backward pass runs"
    if data.dataload == "pack" or data.length_buckets:
        return f"batches of {'--length_buckets' if data.length_buckets else '--dataload pack'} differ in shape"
    if draws_random_numbers(model):
        return "dropout, noise or a layer of another package draws random numbers"
    return None


class GraphedStep:
    """Does the same work on batch after batch: as it is at first, then by replaying.

    Args:
        work: tensors of a batch to a loss without gradient, (); adds to gradients in place, and must not make the
            processor wait for the device.
        trained: whose gradients it adds to. None of them may be set to None afterwards.
        report: takes a line when something cannot be replayed.
    """

    def __init__(
        self,
        work: Callable[..., Tensor],
        trained: Sequence[nn.Parameter],
        graphs: Graphs,
        report: Callable[[str], None],
    ) -> None:
        self._work = work
        self._trained = trained
        self._graphs = graphs
        self._report = report
        self._inputs: list[Tensor] | None = None
        self._loss = torch.zeros(())
        self._warm_ups = 0
        self._replay: Callable[[], None] | None = None
        self._addresses: list[int] = []
        self._gave_up = False
        self._told_of_shapes = False

    def __call__(self, *batch: Tensor) -> Tensor:
        """The loss of ``batch``, whose gradients have been added."""
        if self._replay is not None and self._addresses != self._find_addresses():
            self._give_up("trained parameters or their gradients moved in memory")
        if self._gave_up:
            return self._work(*batch)
        if not self._take(batch):
            return self._work(*batch)
        if self._warm_ups < _WARM_UP:
            self._warm_ups += 1
            self._graphs.aside(self._run)
            return self._loss.clone()
        if self._replay is None:
            self._record()
        if self._replay is None:
            return self._work(*batch)
        self._replay()
        # the next replay writes into the same place
        return self._loss.clone()

    def _run(self) -> None:
        assert self._inputs is not None
        self._loss = self._work(*self._inputs)

    def _take(self, batch: Sequence[Tensor]) -> bool:
        """Copy ``batch`` to where the work looks for it, unless it has other shapes than the first one."""
        if self._inputs is None:
            self._inputs = [tensor.clone() for tensor in batch]
            return True
        if [tensor.shape for tensor in batch] != [tensor.shape for tensor in self._inputs]:
            if not self._told_of_shapes:
                self._report("--cuda_graph: batches of other shapes than the first are not replayed")
            self._told_of_shapes = True
            return False
        for place, tensor in zip(self._inputs, batch, strict=True):
            place.copy_(tensor)
        return True

    def _record(self) -> None:
        # a gradient made while recording would be overwritten by each replay instead of added to
        for parameter in self._trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        try:
            self._replay = self._graphs.record(self._run)
        except RuntimeError as error:
            self._give_up(str(error).strip().partition("\n")[0])
        self._addresses = self._find_addresses()

    def _find_addresses(self) -> list[int]:
        grads = [parameter.grad for parameter in self._trained]
        return [tensor.data_ptr() for tensor in [*self._trained, *grads] if tensor is not None]

    def _give_up(self, reason: str) -> None:
        self._report(f"--cuda_graph: steps are not replayed: {reason}")
        self._gave_up, self._replay = True, None
