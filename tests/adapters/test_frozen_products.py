"""LoRA's and MiSS's products beside a frozen linear: exact gradients, and nothing kept but what is promised."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from rwkvpeft.adapters.lora import LoraLinear
from rwkvpeft.adapters.miss import MissLinear
from rwkvpeft.models.layers import Linear
from rwkvpeft.models.recompute import keeps
from rwkvpeft.quantization.format import build_format
from rwkvpeft.quantization.linear import QuantizedLinear

IN, OUT, RANK = 12, 10, 5


def plain_base(dtype=torch.float64, in_features=IN, out_features=OUT):
    base = Linear(in_features, out_features).requires_grad_(False).to(dtype)
    nn.init.normal_(base.weight)
    return base


def quantised_base(dtype=torch.float64, in_features=IN, out_features=OUT):
    return QuantizedLinear.from_weight(torch.randn(out_features, in_features), build_format("int8"))


def lora(base):
    return filled(LoraLinear(base, RANK, 1.5))


def miss(base):
    return filled(MissLinear(base, RANK, base.out_features))


def mini_miss(base):
    return filled(MissLinear(base, RANK, base.out_features // 2))


def wide_miss(base):
    return filled(MissLinear(base, base.in_features + 8, base.out_features))


def filled(layer):
    for parameter in layer.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return layer


def trained(layer):
    return [parameter for parameter in layer.parameters() if parameter.requires_grad]


def left_to_autograd(layer, x):
    weight = layer.base.dequantized(x.dtype)
    if isinstance(layer, LoraLinear):
        thin = x @ layer.lora_A.to(x.dtype).T
        return x @ weight.T + layer.scaling * thin @ layer.lora_B.to(x.dtype).T
    rank, columns = layer.miss.shape
    folded = F.pad(x, (0, -x.shape[-1] % rank)).unflatten(-1, (-1, rank)).sum(-2)
    return x @ weight.T + (folded @ layer.miss.to(x.dtype)).repeat(*[1] * (x.dim() - 1), len(weight) // columns)


LAYERS = [lora, miss, mini_miss, wide_miss]


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("base", [plain_base, quantised_base])
def test_gradients_are_those_of_finite_differences(make, base):
    layer = make(base()).double()
    x = torch.randn(2, 3, IN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *trained(layer)))


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("base", [plain_base, quantised_base])
@pytest.mark.parametrize("shape", [(IN,), (0, IN), (2, 3, IN)])
def test_outputs_and_gradients_are_autograds_own(make, base, shape):
    layer = make(base()).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    ours, expected = layer(x), left_to_autograd(layer, x)
    torch.testing.assert_close(ours, expected)
    grad, leaves = torch.randn_like(expected), [x, *trained(layer)]
    torch.testing.assert_close(torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(expected, leaves, grad))


@pytest.mark.parametrize("make", LAYERS)
def test_inputs_that_do_not_lie_in_order_are_taken(make):
    layer = make(plain_base()).double()
    x = torch.randn(3, IN, 2, dtype=torch.float64).transpose(1, 2)
    torch.testing.assert_close(layer(x), left_to_autograd(layer, x))


def kept_shapes(layer, x):
    """Shapes of what the forward pass keeps and that is neither the input nor a parameter."""
    given = {tensor.data_ptr() for tensor in (x, *layer.parameters(), *layer.buffers())}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append((tensor.data_ptr(), tuple(tensor.shape))), lambda _: None
    ):
        layer(x)
    return [shape for pointer, shape in kept if pointer not in given], {pointer for pointer, _ in kept}


@pytest.mark.parametrize("base", [plain_base, quantised_base])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_keeps_its_thin_product_and_the_input_it_was_given(base, dtype):
    layer = lora(base(dtype))
    x = torch.randn(2, 7, IN, dtype=dtype, requires_grad=True)
    shapes, pointers = kept_shapes(layer, x)
    assert shapes == [(14, RANK)]
    assert pointers >= {x.data_ptr(), layer.lora_A.data_ptr(), layer.lora_B.data_ptr()}


@pytest.mark.parametrize("base", [plain_base, quantised_base])
@pytest.mark.parametrize("make", [miss, mini_miss])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_miss_keeps_the_folded_input_and_not_the_input(base, make, dtype):
    layer = make(base(dtype))
    x = torch.randn(2, 7, IN, dtype=dtype, requires_grad=True)
    shapes, pointers = kept_shapes(layer, x)
    assert shapes == [(14, RANK)]
    assert x.data_ptr() not in pointers


def test_lora_without_a_trained_a_keeps_no_input():
    layer = lora(plain_base(torch.float32))
    layer.lora_A.requires_grad_(False)
    x = torch.randn(3, IN, requires_grad=True)
    assert x.data_ptr() not in kept_shapes(layer, x)[1]


@pytest.mark.parametrize("make", [lora, miss])
def test_an_input_without_gradient_gets_none(make):
    layer = make(plain_base()).double()
    x = torch.randn(3, IN, dtype=torch.float64)
    layer(x).sum().backward()
    assert x.grad is None
    assert all(parameter.grad is not None for parameter in trained(layer))


@pytest.mark.parametrize("make", [lora, miss, mini_miss])
def test_trained_parts_in_fp32_serve_half_precision(make):
    layer = make(plain_base(torch.bfloat16))
    x = torch.randn(40, IN, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    exact = left_to_autograd(layer.double(), x.double())
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert (y.double() - exact).norm() < 6e-3 * exact.norm()


@pytest.mark.parametrize("make", [lora, miss, mini_miss])
def test_under_autocast_outputs_and_gradients_keep_their_dtypes(make):
    layer = make(plain_base(torch.float32))
    x = torch.randn(4, IN, requires_grad=True)
    exact = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert (y.float() - exact).norm() < 1e-2 * exact.norm()
    assert x.grad.dtype == torch.float32
    assert all(parameter.grad.dtype == torch.float32 for parameter in trained(layer))


@pytest.mark.parametrize("make", [lora, miss, mini_miss])
@pytest.mark.parametrize("base", [plain_base, quantised_base])
@pytest.mark.parametrize("selective", [False, True])
def test_checkpointing_changes_nothing(make, base, selective):
    layer = make(base(torch.float32, 300, 300))
    x = torch.randn(2, 3, 300, requires_grad=True)
    leaves = [x, *trained(layer)]

    def run(x):
        return F.relu(layer(x)).square()

    expected = run(x)
    again = {"context_fn": lambda: create_selective_checkpoint_contexts(keeps)} if selective else {}
    ours = checkpoint(run, x, use_reentrant=False, **again)
    assert torch.equal(ours, expected)
    grads = [torch.autograd.grad(y.sum(), leaves) for y in (ours, expected)]
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


@pytest.mark.parametrize("make", [lora, miss, mini_miss])
@pytest.mark.parametrize("selective", [False, True])
def test_what_comes_after_may_write_to_the_output(make, selective):
    layer = make(plain_base(torch.float32))
    x = torch.randn(2, 3, IN, requires_grad=True)
    expected = torch.autograd.grad(F.relu(layer(x)).sum(), x)
    again = {"context_fn": lambda: create_selective_checkpoint_contexts(keeps)} if selective else {}
    ours = checkpoint(lambda x: F.relu_(layer(x)), x, use_reentrant=False, **again)
    torch.testing.assert_close(torch.autograd.grad(ours.sum(), x), expected)


@pytest.mark.parametrize("make", [lora, miss])
def test_a_trained_base_gets_its_gradient(make):
    layer = make(plain_base().requires_grad_()).double()
    layer(torch.randn(3, IN, dtype=torch.float64)).sum().backward()
    assert layer.base.weight.grad.any()


def test_dropout_reaches_the_update_alone():
    layer = filled(LoraLinear(plain_base(torch.float32), RANK, 1.0, dropout=0.999999))
    x = torch.randn(3, IN)
    torch.testing.assert_close(layer.train()(x), layer.base(x))
