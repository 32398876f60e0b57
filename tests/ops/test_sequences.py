"""Packed rows: every sequence reads, and is differentiated, as it is alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkvpeft.errors import ContractError
from rwkvpeft.ops import Sequences, wkv5, wkv6, wkv7

LENGTHS = (5, 0, 17, 40)
CHUNK = 32
OPERATORS = [wkv5, wkv6, wkv7]


def operands(wkv, tokens, sequences, heads=2, size=8, dtype=torch.float64):
    """Random arguments, a state for each sequence among them."""
    shape = (1, tokens, heads, size)
    shapes = dict.fromkeys("rwkvab" if wkv is wkv7 else "rwkv", shape) | {"state": (sequences, heads, size, size)}
    if wkv is not wkv7:
        shapes["u"] = (heads, size)
    if wkv is wkv5:
        shapes["w"] = (heads, size)
    scale = {"a": 0.2, "b": 0.2}
    return {name: (torch.randn(sizes, dtype=dtype) * scale.get(name, 1)).requires_grad_()
            for name, sizes in shapes.items()}


def packed(wkv, lengths, arguments, op):
    return wkv(**arguments, sequences=Sequences(lengths), op=op)


def apart(wkv, lengths, arguments, op):
    """Each sequence in a call of its own."""
    read, left, start = [], [], 0
    for index, length in enumerate(lengths):
        own = {name: x[:, start : start + length] if x.dim() == 4 else x for name, x in arguments.items()}
        own["state"] = arguments["state"][index : index + 1]
        y, after = wkv(**own, op=op)
        read.append(y)
        left.append(after)
        start += length
    return torch.cat(read, 1), torch.cat(left)


def assert_packed_is_apart(wkv, lengths, op, frozen=(), **tolerance):
    arguments = operands(wkv, sum(lengths), len(lengths))
    for name in frozen:
        arguments[name].requires_grad_(False)
    wanting = [x for x in arguments.values() if x.requires_grad]
    results = []
    for run in (packed, apart):
        y, after = run(wkv, lengths, arguments, op)
        generator = torch.Generator().manual_seed(1)
        seeds = [torch.randn(x.shape, generator=generator).to(x) for x in (y, after)]
        grads = torch.autograd.grad([y, after], wanting, seeds, materialize_grads=True)
        results.append([y, after, *grads])
    torch.testing.assert_close(*results, **tolerance)


@pytest.mark.parametrize("op", ["torch", "reference"])
@pytest.mark.parametrize("lengths", [LENGTHS, (CHUNK,), (1, 1, 1), (0, 2 * CHUNK + 1, CHUNK, 0), (70,)])
@pytest.mark.parametrize("wkv", OPERATORS)
def test_packed_sequences_read_as_each_does_alone(wkv, lengths, op):
    assert_packed_is_apart(wkv, lengths, op, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("wkv", OPERATORS)
@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(0, 2 * CHUNK + 3), min_size=1, max_size=6))
def test_packed_sequences_of_any_lengths_read_as_each_does_alone(wkv, lengths):
    assert_packed_is_apart(wkv, lengths, "torch", rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("wkv", OPERATORS)
def test_packed_states_may_be_trained_alone(wkv):
    everything = [name for name in operands(wkv, 1, 1) if name != "state"]
    assert_packed_is_apart(wkv, LENGTHS, "torch", frozen=everything)


@pytest.mark.parametrize("wkv", OPERATORS)
def test_packed_sequences_start_from_nothing_without_a_state(wkv):
    arguments = operands(wkv, sum(LENGTHS), len(LENGTHS))
    zeros = arguments | {"state": torch.zeros_like(arguments["state"])}
    results = []
    for given_ in (arguments | {"state": None}, zeros):
        y, after = packed(wkv, LENGTHS, given_, "torch")
        (y.square().sum() + after.square().sum()).backward()
        results.append([y, after, *(x.grad.clone() for name, x in arguments.items() if name != "state")])
        for x in arguments.values():
            x.grad = None
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("wkv", OPERATORS)
def test_an_expanded_state_serves_all_packed_sequences(wkv):
    arguments = operands(wkv, sum(LENGTHS), 1)
    tuned = arguments.pop("state")
    grads = []
    for run in (packed, apart):
        y, after = run(wkv, LENGTHS, arguments | {"state": tuned.expand(len(LENGTHS), -1, -1, -1)}, "torch")
        grads.append(torch.autograd.grad(y.square().sum() + after.sum(), tuned)[0])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("wkv", OPERATORS)
def test_half_precision_is_calculated_in_float32_in_packed_rows_too(wkv):
    arguments = {name: x.detach().bfloat16() for name, x in operands(wkv, sum(LENGTHS), len(LENGTHS)).items()}
    y, after = packed(wkv, LENGTHS, arguments, "torch")
    assert (y.dtype, after.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close((y, after), apart(wkv, LENGTHS, arguments, "torch"), rtol=1e-2, atol=1e-2)


def test_chunks_never_lie_in_two_sequences():
    chunks, first = Sequences(LENGTHS).chunk_tables(16, torch.device("cpu"))
    assert chunks.tolist() == [[0, 0, 5], [2, 5, 16], [2, 21, 1], [3, 22, 16], [3, 38, 16], [3, 54, 8]]
    assert first.tolist() == [0, 1, 1, 3, 6]


def test_side_by_side_the_sequences_that_go_on_are_the_first():
    cut = Sequences((2, 0, 5, 3)).side_by_side(2, torch.device("cpu"))
    assert cut.counts == (3, 2, 1)
    assert cut.order.tolist() == [2, 3, 0, 1]
    rest = 10
    assert cut.slots.view(-1, 2).tolist() == [[2, 3], [7, 8], [0, 1], [4, 5], [9, rest], [6, rest]]
    assert cut.places.tolist() == [4, 5, 0, 1, 6, 7, 10, 2, 3, 8]
    assert cut.after.tolist() == [3, 4, 8, 5, 7, 6]


def test_a_row_of_another_length_than_its_sequences_is_refused():
    arguments = operands(wkv7, 7, 2)
    with pytest.raises(ContractError, match="packed rows are"):
        packed(wkv7, [3, 3], arguments, "torch")
