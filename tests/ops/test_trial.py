"""What a backend's trial measures, and what it lets pass."""

from __future__ import annotations

import pytest
import torch

from rwkvpeft.ops.contract import Needs
from rwkvpeft.ops.trial import COARSE, OPERANDS, complaint, errors_of, limit_of, milliseconds
from rwkvpeft.registry import BACKENDS, find

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def needs(dtype=torch.float32, training=True):
    return Needs("cpu", dtype, 16, training)


def reference(operator):
    return find(BACKENDS[operator], "reference", flag="--op").run


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operator", BACKENDS)
def test_a_right_program_passes_in_every_precision(operator, dtype):
    assert complaint(errors_of(reference(operator), operator, needs(dtype), "cpu"), dtype) == ""


@pytest.mark.parametrize("operator", BACKENDS)
def test_every_operand_and_both_states_are_looked_at(operator):
    errors = errors_of(reference(operator), operator, needs(), "cpu")
    gradients = {f"gradient of {name}" for name in [*OPERANDS[operator], "state"]}
    assert set(errors) == {"y", "final state", *gradients}


def test_without_training_gradients_are_not_asked_for():
    assert set(errors_of(reference("wkv7"), "wkv7", needs(training=False), "cpu")) == {"y", "final state"}


class Scaled(torch.autograd.Function):
    """Identity whose gradient is a tenth too large."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.1


@pytest.mark.parametrize("name", ["r", "w", "k", "v", "a", "b", "state"])
def test_one_wrong_gradient_is_found_and_named(name):
    def faulty(**operands):
        return reference("wkv7")(**(operands | {name: Scaled.apply(operands[name])}))

    found = complaint(errors_of(faulty, "wkv7", needs(torch.bfloat16), "cpu"), torch.bfloat16, COARSE)
    assert found.startswith(f"gradient of {name} is wrong by 1.0e-01")


def test_a_transposed_final_state_is_found():
    def faulty(**operands):
        y, state = reference("wkv6")(**operands)
        return y, state.mT

    assert "final state" in complaint(errors_of(faulty, "wkv6", needs(), "cpu"), torch.float32)


def test_what_is_not_finite_is_wrong_without_measure():
    def faulty(**operands):
        y, state = reference("wkv5")(**operands)
        return torch.where(y == y.max(), torch.nan, y), state

    errors = errors_of(faulty, "wkv5", needs(), "cpu")
    assert errors["y"] == float("inf")
    assert complaint(errors, torch.float32, COARSE).startswith("y is wrong by inf")


def test_the_decays_gradient_may_be_a_little_coarser_than_what_is_read():
    assert limit_of("gradient of w", torch.bfloat16) > limit_of("gradient of r", torch.bfloat16) == limit_of(
        "y", torch.bfloat16
    )


class Event:
    """A pretended CUDA event: between two of them lie as many milliseconds as runs were made."""

    runs = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self, stream):
        self.at = Event.runs

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return float(end.at - self.at)


def test_a_run_is_timed_forward_and_backward_at_its_own_sizes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    seen = []

    class Count(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            Event.runs += 1
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            Event.runs += 1
            return grad

    def counted(**operands):
        seen.append((operands["v"].shape, operands["v"].dtype, operands["state"]))
        y, state = reference("wkv6")(**operands)
        return Count.apply(y), state

    sizes = Needs("cpu", torch.bfloat16, 16, training=True, batch=2, tokens=5, heads=3)
    assert milliseconds(counted, "wkv6", sizes, torch.device("cpu")) == 2.0
    assert set(seen) == {(torch.Size([2, 5, 3, 16]), torch.bfloat16, None)}
