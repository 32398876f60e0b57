"""wkv5 and wkv6 in Triton, interpreted, against the recurrences one token at a time in fp64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from rwkvpeft.ops.sequences import Sequences
from rwkvpeft.ops.wkv5 import reference as reference5
from rwkvpeft.ops.wkv5 import triton_kernel as triton5
from rwkvpeft.ops.wkv6 import reference as reference6
from rwkvpeft.ops.wkv6 import triton_kernel as triton6

FOUND = {"wkv5": triton5.BACKEND.run, "wkv6": triton6.BACKEND.run}
TRUTH = {"wkv5": reference5.BACKEND.run, "wkv6": reference6.BACKEND.run}
TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 3e-3}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPERATORS = pytest.mark.parametrize("operator", FOUND)


def operands(operator, tokens, *, size=16, heads=1, rows=1, state=True):
    shape = (rows, tokens, heads, size)
    made = {"r": torch.randn(shape), "w": torch.randn(shape if operator == "wkv6" else shape[2:]) - 2}
    made |= {"k": torch.randn(shape), "v": torch.randn(shape), "u": torch.randn(heads, size)}
    if state:
        made["state"] = torch.randn(rows, heads, size, size)
    return {name: tensor.to(DEVICE) for name, tensor in made.items()}


def outcome(run, arguments, *, weigh_y=1.0, weigh_state=1.0, wanted=None, **options):
    """y, the final state, and the gradients of a weighted sum of both by name."""
    arguments = {n: x.detach().requires_grad_(wanted is None or n in wanted) for n, x in arguments.items()}
    asked = {name: x for name, x in arguments.items() if x.requires_grad}
    y, final = run(**arguments, **options)
    generator = torch.Generator().manual_seed(1)
    outputs = []
    for output, weight in ((y, weigh_y), (final, weigh_state)):
        noise = torch.randn(output.shape, generator=generator)
        if weight and output.requires_grad:
            outputs.append((output.double() * noise.to(output.device) * weight).sum())
    grads = torch.autograd.grad(sum(outputs), list(asked.values()), materialize_grads=True)
    return {"y": y.detach(), "final": final.detach()} | {f"d{n}": x for n, x in zip(asked, grads, strict=True)}


def assert_close(found, expected, tolerance):
    """Frobenius error, relative; of a decay's gradient also to that of r, for it vanishes with strong decays."""
    assert found.keys() == expected.keys()
    for name, truth in expected.items():
        assert found[name].shape == truth.shape
        assert found[name].isfinite().all(), name
        allowed = tolerance * 1.6 if name == "dw" else tolerance
        error = (found[name].double() - truth).norm().item()
        scale = truth.norm().item()
        if name == "dw" and "dr" in expected:
            scale = max(scale, 1e-4 * expected["dr"].norm().item())
        assert error <= allowed * scale, f"{name}: {error / max(scale, 1e-30):.1e}"


def check(operator, arguments, *, tolerance=1e-5, **options):
    exact = {name: tensor.double() for name, tensor in arguments.items()}
    found = outcome(FOUND[operator], arguments, **options)
    assert_close(found, outcome(TRUTH[operator], exact, **options), tolerance)
    return found


@OPERATORS
@pytest.mark.parametrize("tokens", [0, 1, 15, 31, 32, 33, 100])
def test_values_and_gradients_are_those_of_the_recurrence_at_every_length(operator, tokens):
    check(operator, operands(operator, tokens))


@OPERATORS
def test_rows_and_heads_are_apart(operator):
    check(operator, operands(operator, 33, heads=2, rows=2))


@OPERATORS
@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 64, 128])
def test_heads_have_any_size_of_the_models(operator, size):
    check(operator, operands(operator, 33, size=size))


@pytest.mark.slow
@OPERATORS
def test_a_long_sequence_is_as_exact_as_a_short_one(operator):
    check(operator, operands(operator, 1000))


@OPERATORS
def test_a_sequence_without_a_state_starts_from_nothing(operator):
    check(operator, operands(operator, 40, state=False))


@OPERATORS
@pytest.mark.parametrize("exponent", [5.0, -30.0])
def test_the_strongest_and_the_weakest_decays_are_exact(operator, exponent):
    arguments = operands(operator, 40)
    arguments["w"].fill_(exponent)
    check(operator, arguments)


@OPERATORS
def test_strong_decays_do_not_disturb_weak_ones_in_neighbouring_channels(operator):
    arguments = operands(operator, 40)
    arguments["w"].copy_(torch.where(torch.arange(16) % 2 == 0, 5.0, -8.0))
    check(operator, arguments)


def test_strong_decays_do_not_disturb_weak_ones_in_neighbouring_tokens():
    arguments = operands("wkv6", 40)
    arguments["w"].uniform_(-8, 5)
    found = check("wkv6", arguments)
    arguments["w"][:, ::2] = 4.0
    arguments["w"][:, 1::2] = -8.0
    assert not torch.equal(check("wkv6", arguments)["dw"], found["dw"])


@OPERATORS
@pytest.mark.parametrize("exponent", [1e4, -1e4])
def test_an_absurd_decay_gives_finite_values(operator, exponent):
    arguments = operands(operator, 33)
    arguments["w"].fill_(exponent)
    assert all(tensor.isfinite().all() for tensor in outcome(FOUND[operator], arguments).values())


@OPERATORS
def test_keys_of_zero_leave_the_state_to_its_decay(operator):
    arguments = operands(operator, 40)
    arguments["k"].zero_()
    check(operator, arguments)


@OPERATORS
def test_a_large_state_is_read_exactly(operator):
    arguments = operands(operator, 40)
    arguments["state"] *= 1e3
    check(operator, arguments)


@OPERATORS
@pytest.mark.parametrize("wanted", ["state", "r", "w", "u"])
def test_a_gradient_asked_for_alone_is_the_same(operator, wanted):
    check(operator, operands(operator, 20), wanted=[wanted])


@OPERATORS
def test_a_loss_of_the_final_state_alone_has_gradients(operator):
    check(operator, operands(operator, 40), weigh_y=0)


@OPERATORS
def test_a_loss_of_what_is_read_alone_has_gradients(operator):
    check(operator, operands(operator, 40), weigh_state=0)


@OPERATORS
def test_strides_and_an_expanded_state_change_nothing(operator):
    plain = operands(operator, 17, heads=2, rows=2)
    plain["state"] = plain["state"][:1].expand(2, -1, -1, -1)
    strided = {name: tensor if name == "state" else tensor.mT.contiguous().mT for name, tensor in plain.items()}
    assert not strided["r"].is_contiguous()
    expected = outcome(FOUND[operator], plain)
    for name, tensor in outcome(FOUND[operator], strided).items():
        assert torch.equal(tensor, expected[name]), name


@OPERATORS
def test_packed_sequences_are_as_if_each_were_alone(operator):
    lengths = [5, 0, 32, 33]
    arguments = operands(operator, sum(lengths))
    arguments["state"] = torch.randn(len(lengths), 1, 16, 16).to(DEVICE)

    def apart(*, state, **rest):
        read, states, start = [], [], 0
        for index, length in enumerate(lengths):
            own = {n: x[:, start : start + length] if x.dim() == 4 else x for n, x in rest.items()}
            y, after = FOUND[operator](**own, state=state[index : index + 1])
            read.append(y)
            states.append(after)
            start += length
        return torch.cat(read, 1), torch.cat(states)

    packed = outcome(FOUND[operator], arguments, sequences=Sequences(lengths))
    expected = {name: tensor.double() for name, tensor in outcome(apart, arguments).items()}
    assert_close(packed, expected, 1e-6)


@OPERATORS
def test_a_sequence_cut_in_four_gives_the_same_values_and_gradients(operator):
    arguments = operands(operator, 80)

    def in_four(*, state, **rest):
        read = []
        for start in range(0, 80, 20):
            y, state = FOUND[operator](
                **{n: x[:, start : start + 20] if x.dim() == 4 else x for n, x in rest.items()}, state=state
            )
            read.append(y)
        return torch.cat(read, 1), state

    expected = {name: tensor.double() for name, tensor in outcome(FOUND[operator], arguments).items()}
    assert_close(outcome(in_four, arguments), expected, 2e-6)


@OPERATORS
def test_two_runs_are_equal_to_the_last_bit(operator):
    arguments = operands(operator, 20, heads=2)
    first, second = outcome(FOUND[operator], arguments), outcome(FOUND[operator], arguments)
    assert all(torch.equal(first[name], second[name]) for name in first)


@OPERATORS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once_on_its_way_out(operator, dtype):
    arguments = {n: x if n == "state" else x.to(dtype) for n, x in operands(operator, 40).items()}
    found = check(operator, arguments, tolerance=TOLERANCE[dtype])
    assert found["final"].dtype == found["dstate"].dtype == torch.float32
    assert {found[name].dtype for name in ("y", "dr", "dw", "dk", "dv", "du")} == {dtype}


@OPERATORS
def test_autocast_changes_nothing(operator):
    arguments = operands(operator, 33)
    expected = outcome(FOUND[operator], arguments)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = outcome(FOUND[operator], arguments)
    assert all(torch.equal(found[name], expected[name]) for name in found)


@OPERATORS
def test_tensors_without_data_have_the_sizes_of_the_outcome(operator):
    arguments = operands(operator, 20, heads=2)
    expected = outcome(FOUND[operator], arguments)
    empty = {name: tensor.to("meta").requires_grad_() for name, tensor in arguments.items()}
    y, final = FOUND[operator](**empty)
    grads = torch.autograd.grad([y, final], list(empty.values()), [y, final])
    for tensor, truth in zip([y, final, *grads], expected.values(), strict=True):
        assert (tensor.shape, tensor.dtype) == (truth.shape, truth.dtype)
