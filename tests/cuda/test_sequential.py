"""The sequential CUDA kernels, run on the CPU, against the recurrence one token at a time in fp64."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rwkvpeft.ops import cuda_build
from rwkvpeft.ops.contract import Needs
from rwkvpeft.ops.trial import relative_error, sample_operands
from rwkvpeft.ops.wkv5 import cuda_kernel as wkv5_kernel
from rwkvpeft.ops.wkv5 import reference as wkv5_reference
from rwkvpeft.ops.wkv6 import cuda_kernel as wkv6_kernel
from rwkvpeft.ops.wkv6 import reference as wkv6_reference
from rwkvpeft.ops.wkv7 import cuda_kernel as wkv7_kernel
from rwkvpeft.ops.wkv7 import reference as wkv7_reference

_spec = importlib.util.spec_from_file_location("cuda_on_cpu", Path(__file__).parent / "on_cpu.py")
on_cpu = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(on_cpu)

if on_cpu.compiler() is None:
    pytest.skip("needs g++", allow_module_level=True)

KERNELS = {
    "wkv5": (wkv5_kernel.BACKEND.run, wkv5_reference.BACKEND.run),
    "wkv6": (wkv6_kernel.BACKEND.run, wkv6_reference.BACKEND.run),
    "wkv7": (wkv7_kernel.BACKEND.run, wkv7_reference.BACKEND.run),
}
SMALL = Needs("cpu", torch.float32, 64, True, batch=1, tokens=20, heads=2)
LIMITS = {"w": 2e-5, "a": 2e-5, "b": 2e-5}
IN_16_BITS = {torch.bfloat16: 5e-3, torch.float16: 1e-3}

operators = pytest.mark.parametrize("operator", KERNELS)


@pytest.fixture(scope="module", autouse=True)
def kernels(tmp_path_factory):
    """The kernels compiled for the CPU, in place of those built for a GPU."""
    found = on_cpu.OnCpu(on_cpu.compile_library(tmp_path_factory.mktemp("kernels")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_build, "extension", lambda: found)
        patch.setattr(wkv7_kernel.cuda_chunked, "serves", lambda *_: False)
        yield found


def operands(operator, needs=SMALL, state=1.0, **replaced):
    given = sample_operands(operator, needs, "cpu")
    with torch.no_grad():
        for name, change in replaced.items():
            given[name].copy_(change(given[name]))
    if state is not None:
        size = needs.head_size
        drawn = torch.randn(needs.batch, needs.heads, size, size, generator=torch.Generator().manual_seed(1))
        given["state"] = (drawn * state).requires_grad_()
    return given


def results(run, given, dtype=None, seeds=("y", "final"), wanted=None):
    """y, the final state, and the gradients of a random weighted sum of those of them that are in ``seeds``."""
    given = {name: x.detach().to(dtype or x.dtype).requires_grad_(wanted is None or name in wanted)
             for name, x in given.items()}
    found = dict(zip(("y", "final"), run(**given), strict=True))
    generator = torch.Generator().manual_seed(2)
    weights = {name: torch.randn(x.shape, generator=generator).to(given["v"].dtype if dtype is None else torch.float32)
               for name, x in found.items()}
    total = sum((found[name].double() * weights[name].double()).sum() for name in seeds)
    leaves = {name: x for name, x in given.items() if x.requires_grad}
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return found | dict(zip(leaves, grads, strict=True))


def check(operator, given, limit=None, **how):
    program, truth = KERNELS[operator]
    expected = results(truth, given, torch.float64, **how)
    found = results(program, given, **how)
    assert found.keys() == expected.keys()
    for name, result in expected.items():
        assert found[name].shape == result.shape
        if not result.any():
            assert not found[name].any(), name
            continue
        error = relative_error(found[name], result)
        assert error <= (limit or LIMITS.get(name, 1e-5)), f"{name}: {error:.1e}"


@operators
@pytest.mark.parametrize("tokens", [0, 1, 15, 16, 17, 65])
def test_kernels_equal_the_recurrence_at_every_length(operator, tokens):
    check(operator, operands(operator, replace(SMALL, tokens=tokens)))


@operators
def test_kernels_equal_the_recurrence_without_a_state(operator):
    check(operator, operands(operator, state=None))


@operators
@pytest.mark.parametrize("logit", [12.0, -30.0])  # the truth itself loses digits of a larger logit's slope
def test_kernels_equal_the_recurrence_at_the_ends_of_the_decay(operator, logit):
    strongest = 5.0 if logit > 0 else -20.0
    change = logit if operator == "wkv7" else strongest
    check(operator, operands(operator, w=lambda w: torch.full_like(w, change)))


@operators
def test_channels_that_forget_at_once_leave_their_neighbours_exact(operator):
    strong, weak = (12.0, -30.0) if operator == "wkv7" else (5.0, -8.0)
    mixed = torch.where(torch.arange(64) % 2 == 0, strong, weak)
    check(operator, operands(operator, replace(SMALL, tokens=40), w=lambda w: mixed.expand_as(w)))


@operators
def test_the_same_token_over_and_over_costs_no_digits(operator):
    given = operands(operator, replace(SMALL, heads=1, tokens=100), w=lambda w: torch.full_like(w, -8.0))
    with torch.no_grad():
        for name in set(given) - {"state", "u"} - ({"w"} if operator == "wkv5" else set()):
            given[name].copy_(given[name][:, :1].clone().expand_as(given[name]))
        if "b" in given:
            given["b"].copy_(given["a"] * -0.999)
    check(operator, given, limit=3e-5)


@operators
def test_a_state_far_larger_than_the_operands_costs_no_digits(operator):
    check(operator, operands(operator, state=1e3))


@operators
def test_a_gradient_of_the_final_state_alone_reaches_every_operand(operator):
    check(operator, operands(operator), seeds=("final",))


@operators
def test_a_gradient_of_the_outputs_alone_reaches_every_operand(operator):
    check(operator, operands(operator), seeds=("y",))


@operators
def test_a_state_alone_can_want_a_gradient(operator):
    check(operator, operands(operator), wanted=("state",))


@operators
def test_heads_of_128_channels_equal_the_recurrence(operator):
    check(operator, operands(operator, replace(SMALL, head_size=128, heads=1)))


@operators
@pytest.mark.parametrize("dtype", IN_16_BITS)
def test_16_bit_operands_are_calculated_in_fp32(operator, dtype):
    check(operator, operands(operator, replace(SMALL, dtype=dtype)), limit=IN_16_BITS[dtype])


@operators
def test_operands_of_different_dtypes_lose_nothing(operator):
    given = operands(operator)
    given["k"] = given["k"].detach().bfloat16().requires_grad_()
    given["v"] = given["v"].detach().double().float().requires_grad_()
    program, truth = KERNELS[operator]
    expected, found = results(truth, given, torch.float64), results(program, given)
    assert found["k"].dtype == torch.bfloat16
    assert relative_error(found["y"], expected["y"]) < 1e-5
    assert relative_error(found["v"], expected["v"]) < 1e-5


@operators
def test_operands_may_lie_in_any_order_and_the_state_be_one_for_all(operator):
    needs = replace(SMALL, batch=2, tokens=5)
    given = operands(operator, needs, state=None)
    given = {name: x if x.dim() == 2 else x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
             for name, x in given.items()}
    one = torch.randn(2, 64, 64, requires_grad=True)
    program, truth = KERNELS[operator]
    found, expected = (run(**given, state=one.expand(2, -1, -1, -1)) for run in (program, truth))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    grads = [torch.autograd.grad(y.sum(), one)[0] for y, _ in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@operators
def test_a_state_and_its_gradient_may_begin_at_any_byte(operator):
    def moved(x):
        return torch.cat([x.new_zeros(1), x.detach().flatten()])[1:].view(x.shape)

    given = operands(operator)
    where = {name: moved(x).requires_grad_() if name == "state" else x for name, x in given.items()}
    results_of = [KERNELS[operator][0](**each) for each in (given, where)]
    upstream = torch.randn_like(results_of[0][1])
    grads = [torch.autograd.grad(final, each["state"], grad)[0]
             for (_, final), each, grad in zip(results_of, (given, where), (upstream, moved(upstream)), strict=True)]
    assert torch.equal(results_of[0][1], results_of[1][1])
    assert torch.equal(*grads)


@operators
def test_two_runs_are_bitwise_equal(operator):
    given = operands(operator, replace(SMALL, batch=2))
    first, second = (results(KERNELS[operator][0], given) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@operators
@pytest.mark.parametrize("order", on_cpu.ORDERS.values(), ids=on_cpu.ORDERS)
def test_the_order_of_threads_changes_no_bit(operator, kernels, order):
    given = operands(operator, replace(SMALL, tokens=37))
    expected = results(KERNELS[operator][0], given)
    with on_cpu.schedule(kernels.library, order):
        found = results(KERNELS[operator][0], given)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@operators
def test_a_sequence_in_pieces_gives_the_same_gradients(operator):
    given = operands(operator, replace(SMALL, tokens=37))
    run = KERNELS[operator][0]

    def in_pieces(state, **rest):
        read = []
        for piece in (slice(0, 16), slice(16, 21), slice(21, 37)):
            y, state = run(**{name: x[:, piece] if x.dim() == 4 else x for name, x in rest.items()}, state=state)
            read.append(y)
        return torch.cat(read, 1), state

    whole, pieces = results(run, given), results(in_pieces, given)
    for name, result in whole.items():
        assert relative_error(pieces[name], result) < 2e-5, name


@operators
def test_without_gradients_nothing_is_kept(operator, kernels, monkeypatch):
    kept = []
    real = getattr(kernels, f"{operator}_forward")
    monkeypatch.setattr(kernels, f"{operator}_forward", lambda *given: (kept.append(given), real(*given)))
    given = {name: x.detach() for name, x in operands(operator).items()}
    KERNELS[operator][0](**given)
    assert kept[0][-1] is None


@operators
def test_the_operators_are_declared_as_pytorch_wants_them(operator):
    given = {name: x.detach().contiguous() for name, x in operands(operator, replace(SMALL, tokens=3)).items()}
    state = given.pop("state")
    name = "wkv7_cuda_forward" if operator == "wkv7" else "wkv_diagonal_cuda_forward"
    call = getattr(torch.ops.rwkvpeft, name)
    torch.library.opcheck(call, (*given.values(), state, True), test_utils=("test_schema", "test_faketensor"))
