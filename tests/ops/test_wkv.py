"""The chunked operators against the recurrence one token at a time, and what every backend promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from rwkvpeft.errors import ContractError
from rwkvpeft.ops import wkv5, wkv6, wkv7
from rwkvpeft.registry import BACKENDS

OPERATORS = {"wkv5": wkv5, "wkv6": wkv6, "wkv7": wkv7}
LENGTHS = (0, 1, 15, 16, 17, 63, 64, 257)
DECAYS = ("normal", "strong", "weak", "mixed")
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
MIXED = {"wkv5": (5.0, -8.0), "wkv6": (5.0, -8.0), "wkv7": (10.0, -14.0)}
CENTRES = {"wkv5": (-3.0, 3.0, -8.0), "wkv6": (-3.0, 3.0, -8.0), "wkv7": (-2.0, 10.0, -12.0)}


def operands(operator, tokens, *, batch=2, heads=1, size=8, decay="normal", state=True, dtype=torch.float64):
    """Random arguments, every value exact in float32."""
    shape = (batch, tokens, heads, size)
    w_shape = (heads, size) if operator == "wkv5" else shape
    if decay == "mixed":
        strong, weak = MIXED[operator]
        w = torch.where(torch.arange(size) % 2 == 0, strong, weak).expand(w_shape).clone()
    else:
        w = torch.randn(w_shape) + CENTRES[operator][("normal", "strong", "weak").index(decay)]
    given_ = {"r": torch.randn(shape), "w": w, "k": torch.randn(shape), "v": torch.randn(shape)}
    if operator == "wkv7":
        removal = normalize(torch.randn(shape), dim=-1)
        given_ |= {"a": -removal, "b": removal * torch.rand(shape)}
    else:
        given_["u"] = torch.randn(heads, size)
    if state:
        given_["state"] = torch.randn(batch, heads, size, size)
    return {name: x.to(dtype).requires_grad_() for name, x in given_.items()}


def outcome(operator, arguments, op, *, weights_seed=1, state_weight=1.0):
    """y, the final state and the gradients of a random weighted sum of both, by name."""
    y, final = OPERATORS[operator](**arguments, op=op)
    generator = torch.Generator().manual_seed(weights_seed)
    weight_y = torch.randn(y.shape, generator=generator).to(y)
    weight_state = torch.randn(final.shape, generator=generator).to(final) * state_weight
    total = (y * weight_y).sum() + (final * weight_state).sum()
    grads = torch.autograd.grad(total, list(arguments.values()), materialize_grads=True)
    return {"y": y, "final": final} | {f"d{name}": x for name, x in zip(arguments, grads, strict=True)}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float):
    for name, reference in expected.items():
        if not reference.numel():
            assert found[name].shape == reference.shape
            continue
        largest = reference.abs().max().item()
        # all others being about 1, a gradient of 1e-6 (every decay near its strongest) holds no more digits than this
        scale = max(largest, 1e-4) if largest else 1.0
        error = (found[name].double() - reference.double()).abs().max().item() / scale
        assert error <= tolerance, f"{name}: {error:.1e}"


def cast(arguments, dtype):
    return {name: x.detach().to(dtype).requires_grad_() for name, x in arguments.items()}


def check_chunks(operator, arguments):
    expected = outcome(operator, arguments, "reference")
    for dtype, tolerance in TOLERANCE.items():
        assert_close(outcome(operator, cast(arguments, dtype), "torch"), expected, tolerance)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_chunks_equal_the_recurrence_at_every_length(operator, tokens):
    check_chunks(operator, operands(operator, tokens))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("state", [True, False])
def test_chunks_equal_the_recurrence_for_every_decay(operator, decay, state):
    check_chunks(operator, operands(operator, 70, decay=decay, state=state, heads=2))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("size", [8, 64, 128])
def test_chunks_equal_the_recurrence_for_a_single_head_of_any_size(operator, size):
    check_chunks(operator, operands(operator, 40, batch=1, size=size))


@pytest.mark.slow
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("size", [8, 64, 128])
def test_chunks_equal_the_recurrence_in_every_combination(operator, decay, state, size):
    for tokens in LENGTHS:
        check_chunks(operator, operands(operator, tokens, decay=decay, state=state, size=size))


@pytest.mark.parametrize("operator", OPERATORS)
def test_chunks_stay_exact_where_decays_of_every_strength_follow_each_other(operator):
    arguments = operands(operator, 100, size=16)
    with torch.no_grad():
        arguments["w"].uniform_(-8, 5)
    expected = outcome(operator, arguments, "reference")
    assert_close(outcome(operator, arguments, "torch"), expected, 1e-9)
    assert_close(outcome(operator, cast(arguments, torch.float32), "torch"), expected, 1e-5)


@pytest.mark.parametrize("operator", OPERATORS)
@settings(max_examples=20, deadline=None)
@given(tokens=st.integers(2, 70), data=st.data(), strength=st.sampled_from(DECAYS))
def test_a_sequence_cut_in_two_gives_the_same_values_and_gradients(operator, tokens, data, strength):
    cut = data.draw(st.integers(0, tokens))
    arguments = operands(operator, tokens, heads=2, decay=strength)
    whole = outcome(operator, arguments, "torch")

    def in_two_pieces(**given_):
        state, pieces = given_.pop("state"), []
        for piece in (slice(0, cut), slice(cut, tokens)):
            part = {name: x[:, piece] if x.dim() == 4 else x for name, x in given_.items() if name != "op"}
            y, state = OPERATORS[operator](**part, state=state, op="torch")
            pieces.append(y)
        return torch.cat(pieces, 1), state

    OPERATORS["cut"] = in_two_pieces
    try:
        assert_close(outcome("cut", arguments, "torch"), whole, 1e-9)
    finally:
        del OPERATORS["cut"]


@pytest.mark.parametrize("operator", OPERATORS)
def test_one_token_without_gradients_equals_the_recurrence(operator):
    for state in (True, False):
        arguments = cast(operands(operator, 1, state=state, heads=2), torch.float32)
        with torch.no_grad():
            expected, found = (OPERATORS[operator](**arguments, op=op) for op in ("reference", "torch"))
        assert found[0].shape == expected[0].shape
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("operator", OPERATORS)
def test_half_precision_inputs_are_calculated_in_float32(operator):
    exact = cast(cast(operands(operator, 40, size=16), torch.bfloat16), torch.float64)
    expected = outcome(operator, exact, "reference")
    half = cast(exact, torch.bfloat16)
    half["state"] = half["state"].detach().float().requires_grad_()
    y, final = OPERATORS[operator](**half, op="torch")
    assert y.dtype == torch.bfloat16
    assert final.dtype == torch.float32
    assert_close({"final": final}, {"final": expected["final"]}, 1e-5)
    found = outcome(operator, half, "torch")
    assert all(found[f"d{name}"].dtype == x.dtype for name, x in half.items())
    assert_close(found, expected, 1e-2)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("op", ["torch", "reference"])
def test_strided_inputs_and_an_expanded_state_are_as_good_as_contiguous_ones(operator, op):
    plain = operands(operator, 37, heads=2)
    plain["state"] = torch.randn(1, 2, 8, 8, dtype=torch.float64).expand(2, -1, -1, -1).requires_grad_()
    strided = {}
    for name, x in plain.items():
        strided[name] = x if name == "state" else x.detach().mT.contiguous().mT.requires_grad_()
    assert not strided["r"].is_contiguous()
    assert_close(outcome(operator, strided, op), outcome(operator, plain, op), 1e-12)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("case", ["zero keys", "one repeated key"])
def test_gradients_are_exact_for_keys_that_carry_nothing_new(operator, case):
    arguments = operands(operator, 70, decay="weak")
    with torch.no_grad():
        for name in ("k", "a", "b"):
            if name in arguments:
                arguments[name].copy_(0 * arguments[name] if case == "zero keys" else arguments[name][:, :1])
    expected = outcome(operator, arguments, "reference")
    assert_close(outcome(operator, arguments, "torch"), expected, 1e-9)
    found = outcome(operator, cast(arguments, torch.float32), "torch")
    assert all(x.isfinite().all() for x in found.values())
    assert_close(found, expected, 1e-4)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("w", [-1e4, 1e4])
def test_an_absurd_decay_gives_finite_values(operator, w):
    arguments = operands(operator, 40, dtype=torch.float32)
    with torch.no_grad():
        arguments["w"].fill_(w)
    assert all(x.isfinite().all() for x in outcome(operator, arguments, "torch").values())


@pytest.mark.parametrize("operator", OPERATORS)
def test_only_the_gradients_asked_for_are_given(operator):
    arguments = operands(operator, 33)
    expected = outcome(operator, arguments, "torch")
    for name in arguments:
        frozen = {other: x.detach().requires_grad_(other == name) for other, x in arguments.items()}
        y, final = OPERATORS[operator](**frozen, op="torch")
        generator = torch.Generator().manual_seed(1)
        total = (y * torch.randn(y.shape, generator=generator).to(y)).sum()
        total = total + (final * torch.randn(final.shape, generator=generator).to(final)).sum()
        (grad,) = torch.autograd.grad(total, frozen[name])
        assert_close({"grad": grad}, {"grad": expected[f"d{name}"]}, 1e-12)


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_loss_of_the_final_state_alone_has_gradients(operator):
    arguments = operands(operator, 40)
    results = []
    for op in ("reference", "torch"):
        _, final = OPERATORS[operator](**arguments, op=op)
        grads = torch.autograd.grad(final.square().sum(), list(arguments.values()), materialize_grads=True)
        results.append(dict(zip(arguments, grads, strict=True)))
    assert_close(results[1], results[0], 1e-9)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("op", ["torch", "reference"])
def test_a_wrong_shape_is_named(operator, op):
    assert op in BACKENDS[operator]
    arguments = operands(operator, 4)
    arguments["k"] = arguments["k"][:, :3]
    with pytest.raises(ContractError, match="k must be"):
        OPERATORS[operator](**arguments, op=op)
