"""Steps that are recorded and replayed, with a recording that does the same work again in place of a CUDA graph."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rwkvpeft.adapters.lora import LoraLinear
from rwkvpeft.config.groups import DataConfig, RuntimeConfig
from rwkvpeft.models.layers import Linear
from rwkvpeft.training import make_module as made
from rwkvpeft.training.graphed_step import GraphedStep, why_not


class Again:
    """A recording that remembers the work. ``refuses``: what cannot be recorded."""

    def __init__(self, refuses=None):
        self.refuses = refuses
        self.asides = self.records = self.replays = 0

    def aside(self, work):
        self.asides += 1
        work()

    def record(self, work):
        self.records += 1
        if self.refuses:
            raise RuntimeError(self.refuses)

        def replay():
            self.replays += 1
            work()

        return replay


class Step:
    """A replayed step of one parameter, and where its work found its input."""

    def __init__(self, graphs):
        self.weight = nn.Parameter(torch.tensor([2.0, 3.0]))
        self.places, self.lines = [], []
        self.run = GraphedStep(self.work, [self.weight], graphs, self.lines.append)

    def work(self, x, share):
        self.places.append(x.data_ptr())
        loss = (self.weight * x).sum()
        (loss * share).backward()
        return loss.detach()

    def __call__(self, *x):
        return self.run(torch.tensor(x), torch.tensor(0.5)).item()


def test_the_first_batches_run_as_they_are_and_the_rest_are_replayed():
    graphs = Again()
    step = Step(graphs)
    assert [step(1.0, float(index)) for index in range(6)] == [2.0 + 3 * index for index in range(6)]
    assert (graphs.asides, graphs.records, graphs.replays) == (3, 1, 3)
    assert not step.lines


def test_every_batch_is_copied_to_where_the_first_one_was():
    step = Step(Again())
    for index in range(5):
        step(1.0, float(index))
    assert len(set(step.places)) == 1


def test_gradients_add_up_in_place_over_warm_up_and_replays():
    step = Step(Again())
    step(1.0, 0.0)
    grad = step.weight.grad
    for _ in range(5):
        step(0.0, 4.0)
    assert step.weight.grad is grad
    assert grad.tolist() == [0.5, 10.0]


def test_a_gradient_that_nothing_made_yet_is_there_before_the_recording():
    step = Step(Again())
    for _ in range(3):
        step(1.0, 1.0)
    step.weight.grad = None
    step(1.0, 1.0)
    place = step.weight.grad.data_ptr()
    step(1.0, 1.0)
    assert step.weight.grad.data_ptr() == place
    assert step.weight.grad.tolist() == [1.0, 1.0]


def test_a_loss_stays_when_the_next_batch_is_replayed():
    step = Step(Again())
    losses = [step.run(torch.tensor([float(index), 0.0]), torch.tensor(1.0)) for index in range(6)]
    assert torch.stack(losses).tolist() == [0, 2, 4, 6, 8, 10]


def test_a_batch_of_another_shape_is_computed_as_it_is_and_said_once():
    graphs = Again()
    step = Step(graphs)
    step.weight.data = torch.tensor([2.0])
    for _ in range(4):
        step(1.0)
    assert step(1.0, 1.0) == 4.0
    assert step(2.0, 1.0) == 6.0
    assert step(5.0) == 10.0
    assert graphs.replays == 2
    assert step.weight.grad.tolist() == [0.5 * 14]
    assert step.lines == ["--cuda_graph: batches of other shapes than the first are not replayed"]


def test_what_cannot_be_recorded_is_said_once_and_computed_as_it_is():
    graphs = Again(refuses="operation not permitted when stream is capturing\nmore")
    step = Step(graphs)
    assert [step(1.0, 0.0) for _ in range(6)] == [2.0] * 6
    assert step.weight.grad.tolist() == [3.0, 0.0]
    assert graphs.records == 1
    assert step.lines == [
        "--cuda_graph: steps are not replayed: operation not permitted when stream is capturing"
    ]


@pytest.mark.parametrize("moved", ["grad", "data"])
def test_nothing_is_replayed_once_a_gradient_or_parameter_has_moved(moved):
    graphs = Again()
    step = Step(graphs)
    for _ in range(5):
        step(1.0, 1.0)
    setattr(step.weight, moved, torch.tensor([7.0, 7.0]))
    step(1.0, 1.0)
    assert graphs.replays == 2
    assert "moved" in step.lines[0]


def linear(dropout=0.0):
    return LoraLinear(Linear(4, 4).requires_grad_(False), 2, 1.0, dropout)


@pytest.mark.parametrize(
    ("settings", "dropout", "device", "reason"),
    [
        ({}, 0.0, "cuda", None),
        ({}, 0.0, "cpu", "on cpu"),
        ({}, 0.1, "cuda", "dropout"),
        ({"precision": "fp16"}, 0.0, "cuda", "fp16"),
        ({"devices": 2}, 0.0, "cuda", "several devices"),
    ],
)
def test_runs_that_cannot_be_replayed_are_known_beforehand(settings, dropout, device, reason):
    found = why_not(RuntimeConfig(**settings), DataConfig(), linear(dropout), device)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize("rows", [{"dataload": "pack"}, {"length_buckets": True}])
def test_batches_of_many_shapes_are_not_replayed(rows):
    assert "shape" in why_not(RuntimeConfig(), DataConfig(**rows), linear(), "cuda")


LORA = {"peft": "lora", "peft_config": {"r": 2}}
UNEVEN = {"epoch_steps": 5, "epoch_count": 2, "accumulate_grad_batches": 2, "logit_penalty": 0.3}


@pytest.mark.parametrize("method", [{"peft": "none"}, LORA])
def test_a_replayed_run_trains_like_any_other(train, tmp_path, monkeypatch, method):
    _, expected, _ = train(folder="plain", **UNEVEN, **method)
    graphs = Again()
    monkeypatch.setattr(made, "why_not", lambda *_: None)
    monkeypatch.setattr(made, "CudaGraphs", lambda: graphs)
    _, model, lines = train(folder="replayed", cuda_graph=True, **UNEVEN, **method)
    assert graphs.replays == 7
    assert not [line for line in lines if "cuda_graph" in line]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, expected.get_parameter(name), rtol=1e-4, atol=1e-6, msg=name)
    logs = [[json.loads(line) for line in (tmp_path / folder / "loss_data.jsonl").read_text().splitlines()]
            for folder in ("plain", "replayed")]
    for left, right in zip(*logs, strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-5)
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-4)


def test_a_run_that_cannot_be_replayed_says_so_and_trains(train):
    result, _, lines = train(cuda_graph=True)
    assert result.steps == 8
    assert [line for line in lines if "cuda_graph" in line] == [
        "--cuda_graph: steps are not replayed: a run on cpu has none"
    ]


class Waits(TorchDispatchMode):
    """Remembers calls whose result the processor must know."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero", "equal"}:
            self.found.add(name)
        return function(*args, **(kwargs or {}))


MISS = {"peft": "miss", "peft_config": {"r": 2}}


@pytest.mark.parametrize("method", [{"peft": "none"}, LORA, {"peft": "state"}, MISS])
def test_a_replayed_step_never_waits_for_the_device(train, monkeypatch, method):
    waits = Waits()

    class Watched(Again):
        def record(self, work):
            def replay():
                with waits:
                    work()
                self.replays += 1

            return replay

    graphs = Watched()
    monkeypatch.setattr(made, "why_not", lambda *_: None)
    monkeypatch.setattr(made, "CudaGraphs", lambda: graphs)
    train(cuda_graph=True, logit_penalty=1e-4, **method)
    assert graphs.replays
    assert not waits.found
