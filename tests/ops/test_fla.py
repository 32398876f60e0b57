"""The boundary to flash-linear-attention, against its own recurrences as its documentation writes them.

Its kernels need a GPU. In their place stand functions of the same signatures that go token by token in its layout:
log decays, states of (keys, values), offsets of the sequences, a scale of 1 / sqrt(N) unless told.
"""

from __future__ import annotations

import importlib
import itertools
import sys
import types

import pytest
import torch
from torch.nn.functional import normalize

from rwkvpeft.ops.sequences import Sequences, taking_sequences
from rwkvpeft.registry import BACKENDS, find

pytest.importorskip("triton")

HEADS, SIZE = 2, 16


def _walk(tokens, first_state, shape, cu_seqlens, read):
    """Run ``read(state, row, token) -> (y, state)`` over every sequence."""
    batch, length, heads, size = shape
    spans = [(row, 0, length) for row in range(batch)]
    if cu_seqlens is not None:
        offsets = cu_seqlens.tolist()
        spans = [(0, start, stop) for start, stop in itertools.pairwise(offsets)]
        assert all(start < stop for _, start, stop in spans), "an empty sequence shifts the numbers of the others"
    rows, states = {}, []
    for index, (row, start, stop) in enumerate(spans):
        state = torch.zeros(heads, size, size) if first_state is None else first_state[index].float()
        for token in range(start, stop):
            rows[row, token], state = read(state, row, token)
        states.append(state)
    y = torch.stack([torch.stack([rows[row, token] for token in range(length)]) for row in range(batch)])
    return y.to(tokens.dtype), torch.stack(states)


def chunk_rwkv7(
    r, w, k, v, a, b, scale=1.0, initial_state=None, output_final_state=False, cu_seqlens=None,
    cu_seqlens_cpu=None, safe_gate=False, chunk_size=None, lower_bound=None, **kwargs,
):
    assert not kwargs
    assert w.dtype == torch.float32
    assert len({x.dtype for x in (r, k, v, a, b)}) == 1
    assert safe_gate
    assert lower_bound <= w.min()
    seen.append({"chunk_size": chunk_size, "cu_seqlens_cpu": cu_seqlens_cpu})
    r, k, a, b, value = (x.float() for x in (r, k, a, b, v))

    def read(state, row, t):
        at = row, t
        answer = (state * a[at][..., None]).sum(-2, keepdim=True)
        state = state * w[at].exp()[..., None] + k[at][..., None] * value[at][..., None, :] + answer * b[at][..., None]
        return torch.einsum("hk,hkv->hv", r[at] * scale, state), state

    y, after = _walk(v, initial_state, v.shape, cu_seqlens, read)
    return y, after if output_final_state else None


def chunk_rwkv6(
    r, k, v, w, u, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None, cu_seqlens_cpu=None,
):
    scale = r.shape[-1] ** -0.5 if scale is None else scale
    r, key, value = (x.float() for x in (r, k, v))

    def read(state, row, t):
        at = row, t
        written = key[at][..., None] * value[at][..., None, :]
        y = torch.einsum("hk,hkv->hv", r[at] * scale, state + u[..., None] * written)
        return y, state * w[at].exp()[..., None] + written

    y, after = _walk(v, initial_state, v.shape, cu_seqlens, read)
    return y, after if output_final_state else None


def chunk_rwkv7_of_version_0_4_0(r, w, k, v, a, b, scale=1.0, initial_state=None, output_final_state=True,
                                 cu_seqlens=None, head_first=False):
    return chunk_rwkv7(r, w, k, v, a, b, scale, initial_state, output_final_state, cu_seqlens,
                       safe_gate=True, lower_bound=-1.0)


seen = []


@pytest.fixture
def fla(monkeypatch):
    """The functions above in the package's place; ``fla(operator)`` is our backend on them."""
    parts = {"fla": {}, "fla.ops": {}, "fla.ops.rwkv7": {"chunk_rwkv7": chunk_rwkv7},
             "fla.ops.rwkv6": {"chunk_rwkv6": chunk_rwkv6}}
    for name, contents in parts.items():
        module = types.ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    modules = [f"rwkvpeft.ops.{operator}.fla_kernel" for operator in BACKENDS]
    for name in modules:
        monkeypatch.delitem(sys.modules, name, raising=False)
    seen.clear()
    yield lambda operator: importlib.import_module(f"rwkvpeft.ops.{operator}.fla_kernel").BACKEND
    for name in modules:
        sys.modules.pop(name, None)


def operands(operator, batch=2, tokens=9, dtype=torch.float32):
    shape = (batch, tokens, HEADS, SIZE)
    drawn = {name: torch.randn(shape) for name in "rkv"}
    if operator == "wkv7":
        removal = normalize(torch.randn(shape), dim=-1)
        drawn |= {"w": 4 * torch.randn(shape), "a": -removal, "b": removal * torch.rand(shape)}
    else:
        drawn |= {"w": torch.randn(shape[2:] if operator == "wkv5" else shape), "u": torch.randn(shape[2:])}
    return {name: x.to(dtype).requires_grad_() for name, x in drawn.items()}


def results(run, inputs, state, **more):
    torch.manual_seed(1)
    y, after = run(**inputs, state=state, **more)
    wanted = [*inputs.values(), *([] if state is None else [state])]
    grads = torch.autograd.grad([y, after], wanted, [torch.randn(y.shape).to(y), torch.randn(after.shape)])
    return [y, after, *grads]


def agree(found, expected):
    return all(torch.allclose(x, y, rtol=1e-4, atol=1e-4) for x, y in zip(found, expected, strict=True))


def reference(operator):
    return find(BACKENDS[operator], "reference", flag="--op")


@pytest.mark.parametrize("operator", BACKENDS)
@pytest.mark.parametrize("with_state", [True, False])
def test_values_states_and_gradients_are_ours(fla, operator, with_state):
    state = torch.randn(2, HEADS, SIZE, SIZE, requires_grad=True) if with_state else None
    inputs = operands(operator)
    assert agree(results(fla(operator).run, inputs, state), results(reference(operator).run, inputs, state))


@pytest.mark.parametrize("operator", BACKENDS)
def test_an_expanded_state_and_strided_operands_are_taken(fla, operator):
    state = torch.randn(1, HEADS, SIZE, SIZE, requires_grad=True)
    inputs = {name: x.mT.contiguous().mT.detach().requires_grad_() for name, x in operands(operator).items()}
    found, expected = (
        results(lambda state, run=run, **rest: run(state=state.expand(2, -1, -1, -1), **rest), inputs, state)
        for run in (fla(operator).run, reference(operator).run)
    )
    assert agree(found, expected)


@pytest.mark.parametrize("operator", BACKENDS)
@pytest.mark.parametrize("lengths", [[5, 3, 1], [0, 4, 0, 5, 0], [0, 0]])
@pytest.mark.parametrize("with_state", [True, False])
def test_a_packed_row_is_its_sequences_alone(fla, operator, lengths, with_state):
    inputs = operands(operator, batch=1, tokens=sum(lengths))
    state = torch.randn(len(lengths), HEADS, SIZE, SIZE, requires_grad=True) if with_state else None
    found, expected = (
        taking_sequences(operator, backend)(**inputs, state=state, sequences=Sequences(lengths))
        for backend in (fla(operator), reference(operator))
    )
    assert agree(found, expected)
    if with_state:
        grads = [torch.autograd.grad(pair, state, [torch.ones_like(x) for x in pair]) for pair in (found, expected)]
        assert agree(*grads)


@pytest.mark.parametrize("operator", BACKENDS)
def test_no_tokens_leave_the_state_as_it_is(fla, operator):
    state = torch.randn(2, HEADS, SIZE, SIZE)
    y, after = fla(operator).run(**operands(operator, tokens=0), state=state)
    assert y.shape == (2, 0, HEADS, SIZE)
    assert torch.equal(after, state)


@pytest.mark.parametrize("operator", BACKENDS)
def test_sixteen_bit_operands_of_two_dtypes_come_as_one_and_the_state_in_fp32(fla, operator):
    inputs = operands(operator, dtype=torch.bfloat16)
    inputs["r"] = inputs["r"].detach().float().requires_grad_()
    found = results(fla(operator).run, inputs, None)
    assert found[0].dtype == torch.bfloat16
    assert found[1].dtype == torch.float32
    assert [grad.dtype for grad in found[2:]] == [x.dtype for x in inputs.values()]


def test_a_version_without_fast_paths_is_called_without_them(fla, monkeypatch):
    backend = fla("wkv7")
    module = sys.modules["rwkvpeft.ops.wkv7.fla_kernel"]
    monkeypatch.setattr(module, "chunk_rwkv7", chunk_rwkv7_of_version_0_4_0)
    inputs = operands("wkv7")
    assert agree(backend.run(**inputs), reference("wkv7").run(**inputs))
    assert seen == [{"chunk_size": None, "cu_seqlens_cpu": None}]


def test_chunks_of_64_are_asked_for_where_the_compiler_can(fla, monkeypatch):
    backend = fla("wkv7")
    module = sys.modules["rwkvpeft.ops.wkv7.fla_kernel"]
    for can, size in ((True, 64), (False, None)):
        monkeypatch.setattr(module, "_COMPILES_CHUNK_64", can)
        backend.run(**operands("wkv7"))
        assert seen.pop()["chunk_size"] == size
