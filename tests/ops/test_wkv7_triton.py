"""wkv7 in Triton, interpreted where there is no GPU, against the recurrence one token at a time in fp64."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

pytest.importorskip("triton")

from rwkvpeft.ops.sequences import Sequences
from rwkvpeft.ops.triton_tools import interpreted
from rwkvpeft.ops.wkv7 import reference, triton_kernel
from rwkvpeft.ops.wkv7.triton_forward import chunk_length

RUN = triton_kernel.BACKEND.run
TRUTH = reference.BACKEND.run
DEVICE = "cpu" if interpreted() else "cuda"
TOLERANCE = {"da": 2e-5, "db": 2e-5, "dw": 2e-5}
"""Of outputs in fp32; 1e-5 for all others."""


def operands(tokens, *, size=16, heads=1, rows=1, state=True, logit=None, scale=1.0):
    shape = (rows, tokens, heads, size)
    removal = normalize(torch.randn(shape), dim=-1)
    made = {"r": torch.randn(shape), "w": torch.randn(shape) - 2, "k": torch.randn(shape), "v": torch.randn(shape)}
    made |= {"a": -removal, "b": removal * torch.rand(shape)}
    if logit is not None:
        made["w"] = torch.as_tensor(logit, dtype=torch.float32).expand(shape).clone()
    if state:
        made["state"] = torch.randn(rows, heads, size, size) * scale
    return {name: tensor.to(DEVICE) for name, tensor in made.items()}


def outcome(run, arguments, *, weigh_y=True, weigh_state=True, wanted=None, **options):
    """y, the final state, and the gradients of a weighted sum of them by name."""
    arguments = {n: x.detach().requires_grad_(wanted is None or n in wanted) for n, x in arguments.items()}
    asked = {name: x for name, x in arguments.items() if x.requires_grad}
    y, final = run(**arguments, **options)
    generator = torch.Generator().manual_seed(1)
    total = 0
    for output, weighed in ((y, weigh_y), (final, weigh_state)):
        noise = torch.randn(output.shape, generator=generator).to(output.device)
        if weighed:
            total = total + (output.double() * noise).sum()
    grads = torch.autograd.grad(total, list(asked.values()), materialize_grads=True)
    return {"y": y.detach(), "final": final.detach()} | {f"d{n}": x for n, x in zip(asked, grads, strict=True)}


def assert_close(found, expected, tolerance=None):
    assert found.keys() == expected.keys()
    for name, truth in expected.items():
        assert found[name].shape == truth.shape, name
        assert torch.isfinite(found[name]).all(), name
        error, size = (found[name].double() - truth).norm().item(), truth.norm().item()
        assert error <= (tolerance or TOLERANCE.get(name, 1e-5)) * size, f"{name}: {error:.1e} of {size:.1e}"


def check(arguments, **options):
    wide = {name: x.double() for name, x in arguments.items()}
    assert_close(outcome(RUN, arguments, **options), outcome(TRUTH, wide, **options))


@pytest.mark.parametrize("tokens", [0, 1, 15, 16, 17, 63, 64, 65, 100])
def test_chunks_equal_the_recurrence_at_every_length(tokens):
    check(operands(tokens))


@pytest.mark.slow
def test_a_long_sequence_equals_the_recurrence():
    check(operands(1000))


def test_rows_and_heads_in_odd_numbers_of_64_channels_equal_the_recurrence():
    check(operands(20, size=64, heads=3, state=False))


def test_heads_of_128_channels_equal_the_recurrence():
    check(operands(40, size=128))


# past 12 the fp64 recurrence loses digits of sigmoid's slope, and the decay changes by less than 6e-6
@pytest.mark.parametrize("logit", [12.0, -30.0, [12.0, -30.0] * 8], ids=["strongest", "none", "half of each"])
def test_decays_at_their_limits_are_exact(logit):
    check(operands(80, logit=logit))


@pytest.mark.slow
def test_a_token_repeated_512_times_with_hardly_any_decay_is_exact():
    arguments = operands(512, logit=-12.0)
    for name in ("r", "k", "v", "a"):
        arguments[name] = arguments[name][:, :1].expand(-1, 512, -1, -1).clone()
    arguments["b"] = arguments["a"] * -0.999
    check(arguments)


@pytest.mark.parametrize("size", [0.0, 1e-20, 1e4])
def test_keys_of_any_size_leave_everything_finite_and_exact(size):
    arguments = operands(20)
    arguments["k"] *= size
    if not size:
        arguments |= {name: torch.zeros_like(arguments[name]) for name in "ab"}
    check(arguments)


def test_large_states_are_exact():
    check(operands(70, scale=1e3))


def test_the_state_alone_gets_its_gradient_when_the_operands_are_frozen():
    check(operands(70), wanted={"state"})


def test_operands_get_their_gradients_when_the_state_is_frozen():
    check(operands(20), wanted=set("rwkvab"))


def test_the_final_state_alone_sends_gradients_to_all_that_made_it():
    check(operands(70), weigh_y=False)


def test_strides_and_expanded_states_make_no_difference():
    plain = operands(20, rows=2)
    plain["state"] = plain["state"][:1].expand(2, -1, -1, -1)
    strided = {n: x if n == "state" else torch.stack([x, x], -1)[..., 0] for n, x in plain.items()}
    assert not strided["r"].is_contiguous()
    check(strided)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 5e-3), (torch.float16, 1e-3)])
def test_16_bit_operands_are_read_as_they_are_and_gradients_rounded_to_them(dtype, tolerance):
    arguments = {n: x if n == "state" else x.to(dtype) for n, x in operands(70).items()}
    found = outcome(RUN, arguments)
    assert found["y"].dtype == found["dr"].dtype == dtype
    assert found["final"].dtype == found["dstate"].dtype == torch.float32
    assert_close(found, outcome(TRUTH, {n: x.double() for n, x in arguments.items()}), tolerance)


def test_autocast_makes_no_difference():
    arguments = operands(20)
    expected = outcome(RUN, arguments)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = outcome(RUN, arguments)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_two_runs_agree_to_the_last_bit():
    arguments = operands(70)
    first, second = outcome(RUN, arguments), outcome(RUN, arguments)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_packed_sequences_equal_each_alone():
    lengths = (5, 0, 64, 129)
    arguments = operands(sum(lengths))
    arguments["state"] = torch.randn(4, 1, 16, 16, device=DEVICE)
    sequences = Sequences(lengths)

    def apart(state, **given):
        read = [
            TRUTH(**{n: x[:, i:j] for n, x in given.items()}, state=state[s : s + 1])
            for s, (i, j) in enumerate(zip(sequences.offsets, sequences.offsets[1:], strict=False))
        ]
        return torch.cat([y for y, _ in read], 1), torch.cat([state for _, state in read])

    expected = outcome(apart, {n: x.double() for n, x in arguments.items()})
    assert_close(outcome(RUN, arguments, sequences=sequences), expected)


def test_a_sequence_cut_in_four_with_its_states_carried_equals_the_whole():
    arguments = operands(100)

    def cut(state, **given):
        read = []
        for i, j in ((0, 30), (30, 31), (31, 95), (95, 100)):
            y, state = RUN(**{n: x[:, i:j] for n, x in given.items()}, state=state)
            read.append(y)
        return torch.cat(read, 1), state

    assert_close(outcome(cut, arguments), outcome(TRUTH, {n: x.double() for n, x in arguments.items()}))


@pytest.mark.parametrize("packed", [False, True])
def test_operators_keep_what_they_promise_to_tracing(packed):
    given = list(operands(20, state=False).values())
    table = Sequences([3, 17]).chunk_tables(chunk_length(16, torch.float32), torch.device(DEVICE))
    tables = table if packed else (None, None)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(triton_kernel.wkv7_triton_forward, (*given, None, *tables), test_utils=tests)
    y, final, states = triton_kernel.wkv7_triton_forward(*given, None, *tables)
    for operands_wanted in (True, False):
        called = (*given, states, y, final, *tables, operands_wanted)
        torch.library.opcheck(triton_kernel.wkv7_triton_backward, called, test_utils=tests)
