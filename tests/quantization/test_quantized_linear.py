"""A quantised linear is the product with its dequantised weight, and keeps nothing for the backward pass."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from rwkvpeft.errors import ContractError
from rwkvpeft.models.layers import Linear
from rwkvpeft.quantization import fp8
from rwkvpeft.quantization.format import build_format
from rwkvpeft.quantization.linear import QuantizedLinear


@pytest.fixture
def linear(format):
    return QuantizedLinear.from_weight(torch.randn(24, 40), format)


@pytest.mark.parametrize("axes", [(), (3,), (2, 3), (0, 3)])
def test_output_and_gradient_are_those_of_the_dequantised_weight(linear, axes):
    x = torch.randn(*axes, 40, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(*axes, 24, dtype=torch.float64)
    weight = linear.dequantized(torch.float64)
    y = linear(x)
    torch.testing.assert_close(y, x @ weight.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(y, x, grad)[0], grad @ weight, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_output_has_the_dtype_of_the_input(linear, dtype):
    x = torch.randn(2, 40, dtype=dtype, requires_grad=True)
    y = linear(x)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype) == (dtype, dtype)


def test_nothing_is_saved_for_the_backward_pass(linear):
    saved = []
    x = torch.randn(5, 40, requires_grad=True)
    with saved_tensors_hooks(lambda tensor: saved.append(tensor.shape), lambda packed: packed):
        linear(x)
    assert not saved


def test_gradients_pass_a_recomputed_block(linear):
    x = torch.randn(5, 40, requires_grad=True)
    (expected,) = torch.autograd.grad(linear(x).tanh().sum(), x)
    recomputed = checkpoint(lambda x: linear(x).tanh(), x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(recomputed.sum(), x)[0], expected, rtol=0, atol=0)


def test_one_layer_may_be_used_twice_in_a_graph(format):
    linear = QuantizedLinear.from_weight(torch.randn(8, 8), format)
    weight = linear.dequantized()
    x = torch.randn(3, 8, requires_grad=True)
    found = torch.autograd.grad(linear(linear(x).tanh()).sum(), x)[0]
    expected = torch.autograd.grad((((x @ weight.T).tanh()) @ weight.T).sum(), x)[0]
    torch.testing.assert_close(found, expected)


def test_without_gradients_the_output_is_the_same(linear):
    x = torch.randn(3, 40, requires_grad=True)
    with torch.no_grad():
        y = linear(x)
    assert not y.requires_grad
    torch.testing.assert_close(y, linear(x), rtol=0, atol=0)


def test_it_is_a_linear_without_a_parameter(linear):
    assert isinstance(linear, torch.nn.Linear)
    assert list(linear.parameters()) == []
    assert (linear.weight.shape, linear.weight.requires_grad) == ((24, 40), False)


@pytest.mark.parametrize("change", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()])
def test_changing_the_dtype_of_a_model_does_not_change_its_packed_weights(linear, change):
    before = {name: tensor.clone() for name, tensor in linear.packed().items()}
    change(torch.nn.Sequential(linear))
    for name, tensor in linear.packed().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_a_device_is_followed(linear):
    assert {tensor.device.type for tensor in linear.to("meta").packed().values()} == {"meta"}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda linear: pickle.loads(pickle.dumps(linear))])
def test_a_copy_is_the_same_layer_with_its_own_tensors(linear, copied):
    other = copied(linear)
    assert torch.equal(other.weight, linear.weight)
    for name, tensor in linear.packed().items():
        assert other.packed()[name].data_ptr() != tensor.data_ptr()


def test_a_state_dict_restores_the_weight(linear, format):
    buffer = io.BytesIO()
    torch.save(linear.state_dict(), buffer)
    buffer.seek(0)
    other = QuantizedLinear.from_weight(torch.randn(24, 40), format)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other.weight, linear.weight)


def test_parts_of_another_size_are_a_broken_promise(format):
    with pytest.raises(ContractError, match=format.name):
        QuantizedLinear(41, 24, format, format.quantize(torch.randn(24, 40)))


def test_a_plain_linear_answers_to_the_same_two_questions():
    linear = Linear(4, 3)
    torch.nn.init.normal_(linear.weight)
    x = torch.randn(2, 4, dtype=torch.bfloat16)
    assert isinstance(linear, torch.nn.Linear)
    assert torch.equal(linear(x), x @ linear.dequantized(torch.bfloat16).T)
    assert not linear.dequantized().requires_grad


class _Recorder:
    """Stands for ``torch._scaled_mm``, which no processor without fp8 units has."""

    def __call__(self, a, b, *, scale_a, scale_b, out_dtype):
        assert a.dtype == b.dtype == torch.float8_e4m3fn
        assert (scale_a.shape, scale_b.shape) == ((len(a), 1), (1, b.shape[1]))
        assert a.stride(1) == b.stride(0) == 1
        return ((a.float() * scale_a) @ (b.float() * scale_b)).to(out_dtype)


def test_the_fp8_product_rounds_activations_row_by_row(monkeypatch):
    monkeypatch.setattr(fp8, "has_fp8_product", lambda device: True)
    monkeypatch.setattr(torch, "_scaled_mm", _Recorder())
    linear = QuantizedLinear.from_weight(torch.randn(32, 48), build_format("fp8"))
    x = torch.randn(2, 5, 48).bfloat16()
    x[0, 0] *= 1000
    x[1, 1] = 0
    expected = x.float() @ linear.weight.T
    error = (linear(x) - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1)
    assert linear(x).dtype == torch.bfloat16
    assert 0 < error.max() < 0.06


@pytest.mark.parametrize(("shape", "dtype"), [((32, 40), torch.bfloat16), ((40, 32), torch.float16),
                                              ((32, 48), torch.float32)])
def test_sizes_and_dtypes_without_an_fp8_product_are_dequantised(monkeypatch, shape, dtype):
    monkeypatch.setattr(fp8, "has_fp8_product", lambda device: True)
    monkeypatch.delattr(torch, "_scaled_mm")
    linear = QuantizedLinear.from_weight(torch.randn(shape), build_format("fp8"))
    x = torch.randn(3, shape[1], dtype=dtype)
    torch.testing.assert_close(linear(x), x @ linear.dequantized(dtype).T, rtol=0, atol=0)


def test_a_cpu_has_no_fp8_product():
    assert not fp8.has_fp8_product(torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_what_the_dequantised_weight_gives(format):
    weight, x = torch.randn(64, 128), torch.randn(3, 128).bfloat16()
    here = QuantizedLinear.from_weight(weight, format)
    there = QuantizedLinear.from_weight(weight.cuda(), format)
    torch.testing.assert_close(there.weight.cpu(), here.weight, rtol=1e-5, atol=1e-5)
    expected = x.float() @ here.weight.T
    assert (there(x.cuda()).cpu().float() - expected).norm() / expected.norm() < 0.06
