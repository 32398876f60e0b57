import pytest
import torch

from rwkvpeft.errors import ContractError
from rwkvpeft.ops import Sequences, wkv5, wkv6, wkv7

LENGTHS = (5, 0, 17, 40)


def operands(names, tokens, heads=2, size=8):
    return {name: torch.randn(1, tokens, heads, size, dtype=torch.float64, requires_grad=True) for name in names}


@pytest.mark.parametrize("op", ["torch", "reference"])
@pytest.mark.parametrize("wkv", [wkv5, wkv6, wkv7])
def test_packed_sequences_read_as_each_does_alone(wkv, op):
    tokens = sum(LENGTHS)
    given = operands("rwkvab" if wkv is wkv7 else "rwkv", tokens)
    if wkv is not wkv7:
        given["u"] = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    if wkv is wkv5:
        given["w"] = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    state = torch.randn(len(LENGTHS), 2, 8, 8, dtype=torch.float64, requires_grad=True)
    y, after = wkv(**given, state=state, sequences=Sequences(LENGTHS), op=op)
    start = 0
    for index, length in enumerate(LENGTHS):
        own = {name: x[:, start : start + length] if x.dim() == 4 else x for name, x in given.items()}
        alone, left = wkv(**own, state=state[index : index + 1], op=op)
        torch.testing.assert_close(y[:, start : start + length], alone)
        torch.testing.assert_close(after[index : index + 1], left)
        start += length


def test_chunks_never_lie_in_two_sequences():
    chunks, first = Sequences(LENGTHS).chunk_tables(16, torch.device("cpu"))
    assert chunks.tolist() == [[0, 0, 5], [2, 5, 16], [2, 21, 1], [3, 22, 16], [3, 38, 16], [3, 54, 8]]
    assert first.tolist() == [0, 1, 1, 3, 6]


def test_a_row_of_another_length_than_its_sequences_is_refused():
    given = {name: x.detach() for name, x in operands("rwkvab", 7).items()}
    with pytest.raises(ContractError, match="packed rows are"):
        wkv7(**given, sequences=Sequences([3, 3]), op="torch")
