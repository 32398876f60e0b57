"""The chunked wkv7 kernels, compiled for the CPU, against the recurrence in fp64 on the same bf16 inputs."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from rwkvpeft.ops import cuda_build
from rwkvpeft.ops.sequences import Sequences, taking_sequences
from rwkvpeft.ops.wkv7 import cuda_chunked, cuda_kernel
from rwkvpeft.ops.wkv7.reference import BACKEND as REFERENCE

_spec = importlib.util.spec_from_file_location("cuda_on_cpu", Path(__file__).parent / "on_cpu.py")
on_cpu = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(on_cpu)

pytestmark = pytest.mark.skipif(on_cpu.compiler() is None, reason="needs g++")

N = 64
TOLERANCES = {"y": 5e-3, "final": 5e-3, "r": 5e-3, "w": 6e-3, "k": 5e-3, "v": 5e-3, "a": 8e-3, "b": 8e-3,
              "state": 5e-3}
REPEATED = {**TOLERANCES, "y": 8e-3, "final": 8e-3, "r": 8e-3, "w": 1e-2, "k": 8e-3, "v": 8e-3, "a": 6e-2, "b": 6e-2}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return on_cpu.compile_library(tmp_path_factory.mktemp("chunked"), on_cpu.SHIM / "chunked.cpp")


@pytest.fixture(autouse=True)
def _on_cpu(library, monkeypatch):
    monkeypatch.setattr(cuda_build, "extension", lambda: on_cpu.ChunkedOnCpu(library))


def _inputs(batch, tokens, heads, kind="plain"):
    def normal():
        return torch.randn(batch, tokens, heads, N)

    logits = {"floor": torch.full_like(normal(), 30.0), "none": torch.full_like(normal(), -30.0)}.get(kind, normal())
    if kind == "half":
        logits = torch.where(torch.arange(N) % 2 == 0, 30.0, -30.0).expand(batch, tokens, heads, N)
    unit = torch.nn.functional.normalize(normal(), dim=-1)
    gate = torch.sigmoid(normal())
    key = normal()
    if kind == "repeated":
        logits = torch.full_like(unit, -12.0)
        unit, gate = unit[:, :1].expand_as(unit), torch.full_like(unit, 0.999)
    if kind == "zero keys":
        unit, key = torch.zeros_like(unit), torch.zeros_like(key)
    operands = {"r": normal(), "w": logits, "k": key, "v": normal(), "a": -unit, "b": unit * gate}
    return {name: x.to(torch.bfloat16).contiguous().requires_grad_() for name, x in operands.items()}


def _state(count, heads, norm=64.0):
    state = torch.randn(count, heads, N, N)
    return (state * (norm / state[0, 0].norm())).requires_grad_()


def _chunked(operands, state, sequences=None):
    if operands["v"].shape[1] > cuda_chunked.CHUNK:  # then they are the backend's choice
        return cuda_kernel.BACKEND.run(**operands, state=state, sequences=sequences)
    return cuda_chunked.run(list(operands.values()), state, sequences)


def _results(run, operands, state, dy, dfinal, dtype=None):
    """Everything a call computes: y, the final state, and the gradients of the operands and the state."""
    leaves = {name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in operands.items()}
    given = None if state is None else state.detach().to(dtype or state.dtype).requires_grad_()
    y, final = run(leaves, given)
    read = [(y, dy), (final, dfinal)]
    outputs = [output for output, grad in read if grad is not None]
    grads = [grad.to(output.dtype) for output, grad in read if grad is not None]
    inputs = [*leaves.values(), *([] if given is None else [given])]
    found = torch.autograd.grad(outputs, inputs, grads, allow_unused=True)
    return dict(zip(["y", "final", *leaves, "state"], [y.detach(), final.detach(), *found], strict=False))


def _check(operands, state, dy, dfinal, tolerances=TOLERANCES, sequences=None):
    truth = taking_sequences("wkv7", REFERENCE)
    found = _results(lambda x, s: _chunked(x, s, sequences), operands, state, dy, dfinal)
    expected = _results(lambda x, s: truth(**x, state=s, sequences=sequences), operands, state, dy, dfinal,
                        torch.float64)
    errors = {}
    for name, right in expected.items():
        right = torch.zeros_like(found[name], dtype=torch.float64) if right is None else right
        size = right.norm().item()
        error = (found[name].double() - right).norm().item()
        errors[name] = error / size if size > 0 else error
    assert {name: error for name, error in errors.items() if not error <= tolerances[name]} == {}


def _upstream(batch, tokens, heads):
    return torch.randn(batch, tokens, heads, N).to(torch.bfloat16), torch.randn(batch, heads, N, N)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 33, 65, 100])
def test_any_number_of_tokens_gives_what_the_recurrence_gives(tokens):
    _check(_inputs(1, tokens, 1), _state(1, 1), *_upstream(1, tokens, 1))


@pytest.mark.parametrize("kind", ["floor", "none", "half", "zero keys"])
def test_extreme_inputs_give_what_the_recurrence_gives(kind):
    _check(_inputs(1, 33, 1, kind), _state(1, 1), *_upstream(1, 33, 1))


def test_one_token_repeated_gives_what_the_recurrence_gives():
    _check(_inputs(1, 65, 1, "repeated"), _state(1, 1), *_upstream(1, 65, 1), REPEATED)


def test_a_large_state_gives_what_the_recurrence_gives():
    _check(_inputs(1, 33, 1), _state(1, 1, norm=1e3), *_upstream(1, 33, 1))


def test_heads_and_rows_stay_apart():
    _check(_inputs(3, 17, 1), _state(3, 1), *_upstream(3, 17, 1))
    _check(_inputs(1, 17, 3), _state(1, 3), *_upstream(1, 17, 3))


def test_the_final_state_alone_passes_gradients_back():
    _, dfinal = _upstream(1, 20, 1)
    _check(_inputs(1, 20, 1), _state(1, 1), None, dfinal)


def test_no_state_is_a_state_of_zeros():
    operands, (dy, dfinal) = _inputs(1, 20, 1), _upstream(1, 20, 1)
    without = _results(lambda x, s: _chunked(x, s), operands, None, dy, dfinal)
    zeros = _results(lambda x, s: _chunked(x, s), operands, torch.zeros(1, 1, N, N), dy, dfinal)
    assert all(torch.equal(found, zeros[name]) for name, found in without.items())


def test_the_state_alone_can_be_trained():
    operands, state, (dy, dfinal) = _inputs(1, 40, 1), _state(1, 1), _upstream(1, 40, 1)
    every = _results(lambda x, s: _chunked(x, s), operands, state, dy, dfinal)["state"]
    y, final = _chunked({name: x.detach() for name, x in operands.items()}, state)
    (alone,) = torch.autograd.grad([y, final], [state], [dy, dfinal])
    assert torch.equal(alone, every)


def test_packed_sequences_give_what_each_gives_alone():
    lengths = [5, 0, 16, 20]
    operands, state = _inputs(1, sum(lengths), 2), _state(len(lengths), 2)
    dy = torch.randn(1, sum(lengths), 2, N).to(torch.bfloat16)
    _check(operands, state, dy, torch.randn(len(lengths), 2, N, N), sequences=Sequences(lengths))


def test_no_tokens_leave_the_state_as_it_was():
    state = _state(2, 1)
    y, final = _chunked(_inputs(2, 0, 1), state)
    (dstate,) = torch.autograd.grad([final], [state], [2 * torch.ones_like(final)])
    assert y.shape == (2, 0, 1, N)
    assert torch.equal(final, state)
    assert torch.equal(dstate, 2 * torch.ones_like(state))


def test_two_runs_agree_to_the_bit():
    operands, state, (dy, dfinal) = _inputs(1, 33, 1), _state(1, 1), _upstream(1, 33, 1)
    one, other = (_results(lambda x, s: _chunked(x, s), operands, state, dy, dfinal) for _ in range(2))
    assert all(torch.equal(found, other[name]) for name, found in one.items())


def test_tensors_may_begin_at_any_byte():
    def moved(x):
        return torch.cat([x.new_zeros(1), x.detach().flatten()])[1:].view(x.shape).requires_grad_()

    operands, state, upstream = _inputs(1, 33, 1), _state(1, 1), _upstream(1, 33, 1)
    where = {name: moved(x) for name, x in operands.items()}
    expected = _results(lambda x, s: _chunked(x, s), operands, state, *upstream)
    y, final = _chunked(where, moved_state := moved(state))
    inputs = [*where.values(), moved_state]
    found = torch.autograd.grad([y, final], inputs, [moved(x).detach() for x in upstream])
    assert all(torch.equal(*both) for both in zip([y, final, *found], expected.values(), strict=True))


@pytest.mark.parametrize("order", on_cpu.ORDERS.values(), ids=on_cpu.ORDERS)
@pytest.mark.parametrize("lengths", [None, [21, 0, 44]])
def test_the_order_of_threads_changes_no_bit(library, order, lengths):
    sequences = lengths and Sequences(lengths)
    count = len(lengths or [1])
    operands, state = _inputs(1, 65, 2), _state(count, 2)
    dy, dfinal = torch.randn(1, 65, 2, N).to(torch.bfloat16), torch.randn(count, 2, N, N)

    def run():
        found = _results(lambda x, s: _chunked(x, s, sequences), operands, state, dy, dfinal)
        y, final = _chunked({name: x.detach() for name, x in operands.items()}, state, sequences)
        return [*found.values(), *torch.autograd.grad([y, final], [state], [dy, dfinal])]

    expected = run()
    with on_cpu.schedule(library, order):
        assert all(torch.equal(*both) for both in zip(run(), expected, strict=True))


def test_without_gradients_nothing_is_kept():
    operands, state = _inputs(1, 20, 1), _state(1, 1)
    with torch.no_grad():
        y, final = _chunked(operands, state)
    kept_y, kept_final = _chunked(operands, state)
    assert torch.equal(y, kept_y)
    assert torch.equal(final, kept_final)


def test_the_operators_keep_their_promises_to_pytorch():
    operands, state = [x.detach() for x in _inputs(1, 17, 1).values()], _state(1, 1).detach()
    forward = torch.ops.rwkvpeft.wkv7_cuda_chunked_forward.default
    backward = torch.ops.rwkvpeft.wkv7_cuda_chunked_backward.default
    *_, kept = forward(*operands, state, None, None, True)
    dy, dfinal = _upstream(1, 17, 1)
    checks = ["test_schema", "test_faketensor"]
    torch.library.opcheck(forward, (*operands, state, None, None, True), test_utils=checks)
    torch.library.opcheck(backward, (dy, dfinal, operands, kept, None, None, True, False), test_utils=checks)


def test_short_calls_and_other_types_are_left_to_the_sequential_kernels():
    def operands(tokens, dtype=torch.bfloat16, size=N):
        return [torch.empty(1, tokens, 1, size, dtype=dtype)] * 6

    assert cuda_chunked.serves(*operands(17))
    assert not cuda_chunked.serves(*operands(16))
    assert not cuda_chunked.serves(*operands(17, torch.float32))
    assert not cuda_chunked.serves(*operands(17, size=128))
    assert not cuda_chunked.serves(*operands(17)[:5], torch.empty(1, 17, 1, N))
