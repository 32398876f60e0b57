"""Operators in PyTorch as calls of their own: what they promise of sizes, and that nothing around them changes them."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rwkvpeft.ops import Sequences, wkv5, wkv6, wkv7
from rwkvpeft.ops.opaque import BODIES, apart

OPERATORS = {"wkv5": wkv5, "wkv6": wkv6, "wkv7": wkv7}


class Calls(TorchDispatchMode):
    """Every call of an operator of ours, with what it gave."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func.namespace == "rwkvpeft":
            self.seen.append((func, args, made))
        return made


def run(operator, tokens=37, *, state=True, frozen=(), dtype=torch.float32):
    torch.manual_seed(1)
    shape, heads, size = (2, tokens, 3, 8), 3, 8
    names = "rwkvab" if operator == "wkv7" else "rkv"
    given = {name: torch.randn(shape) / 2 for name in names}
    if operator != "wkv7":
        given |= {"w": torch.randn(shape if operator == "wkv6" else (heads, size)), "u": torch.randn(heads, size)}
    if state:
        given["state"] = torch.randn(2, heads, size, size)
    given = {name: x.to(dtype).requires_grad_(name not in frozen) for name, x in given.items()}
    y, final = OPERATORS[operator](**given, op="torch")
    (y.float().sum() + final.float().square().sum()).backward()
    return [y, final, *(x.grad for x in given.values())]


def run_packed(operator, lengths, frozen=()):
    torch.manual_seed(1)
    shape = (1, sum(lengths), 3, 8)
    given = {name: torch.randn(shape) / 2 for name in ("rwkvab" if operator == "wkv7" else "rwkv")}
    given |= {"state": torch.randn(len(lengths), 3, 8, 8)}
    given |= {} if operator == "wkv7" else {"u": torch.randn(3, 8)}
    given |= {"w": torch.randn(3, 8)} if operator == "wkv5" else {}
    given = {name: x.requires_grad_(name not in frozen) for name, x in given.items()}
    y, final = OPERATORS[operator](**given, sequences=Sequences(lengths), op="torch")
    (y.sum() + final.square().sum()).backward()


def layout(made):
    return [(x.shape, x.stride() if x.numel() else None, x.dtype) for x in made]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 37, 64])
@pytest.mark.parametrize("frozen", ["", "rwkvabu"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_without_data_an_operator_makes_what_it_makes_of_data(operator, frozen, tokens, dtype):
    with Calls() as calls:
        run(operator, tokens, frozen=frozen, dtype=dtype)
    check_sizes(calls)


@pytest.mark.parametrize("frozen", ["", "rwkvabu"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_without_data_a_packed_row_is_of_the_same_sizes(operator, frozen):
    with Calls() as calls:
        run_packed(operator, (5, 0, 33, 70), frozen)
    check_sizes(calls)


def check_sizes(calls):
    assert {func._opname.rpartition("_")[2] for func, _, _ in calls.seen} == {"forward", "backward"}
    for func, args, made in calls.seen:
        without_data = torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: x.detach().to("meta"), args)
        assert layout(func(*without_data)) == layout(made)
        assert layout(BODIES[func](*without_data)) == layout(made)


@pytest.mark.parametrize("operator", OPERATORS)
def test_autocast_changes_nothing_in_an_operator(operator):
    expected = run(operator)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(operator)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class OnSecondGpu(torch.Tensor):
    device = torch.device("cuda", 1)


@pytest.mark.parametrize("given", [(None, OnSecondGpu()), ([None, OnSecondGpu()], torch.empty(0))])
def test_kernels_start_on_the_gpu_that_holds_their_first_tensor(monkeypatch, given):
    current = []

    @contextmanager
    def gpu(device):
        current.append(device)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", gpu)
    assert apart(lambda *_: list(current))(*given) == [torch.device("cuda", 1)]


def test_operators_without_any_tensor_are_computed_too():
    assert apart(lambda *_: "computed")(None, []) == "computed"
