"""Whole models on the block's fused kernels, interpreted, against the same models on plain PyTorch."""

import pytest
import torch

from rwkvpeft.checkpoints.load import build_model, fill_model, operator_of
from rwkvpeft.models.shape import new_shape
from rwkvpeft.ops.block.plain import PLAIN
from rwkvpeft.registry import BACKENDS, MODELS, find

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here, and tested on the GPU", allow_module_level=True)

from rwkvpeft.ops.block.triton_ops import TRITON

VERSIONS = sorted(MODELS)
TOKENS = torch.tensor([[3, 1, 4, 1], [2, 6, 5, 3]])


def model_on(version, block_ops):
    torch.manual_seed(1)
    shape = new_shape(version, n_layer=2, n_embd=32, vocab_size=12, head_size=16)
    wkv = find(BACKENDS[operator_of(shape)], "torch", flag="--op").run
    model = build_model(shape, wkv, block_ops=block_ops)
    weights = find(MODELS, version, flag="--my_testing").initial_weights(shape)
    weights = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in weights.items()}
    fill_model(model, weights, device="cpu", dtype=torch.float32, source="test")
    return model.train()


def loss_of(model, pieces):
    """The loss over pieces of ``TOKENS``, the state carried from piece to piece with its gradients."""
    state, parts = None, []
    for piece in TOKENS[:, :-1].split(pieces, dim=1):
        logits, state = model(piece, state)
        parts.append(logits)
    loss = torch.nn.functional.cross_entropy(torch.cat(parts, 1).flatten(0, 1), TOKENS[:, 1:].flatten())
    return loss + sum(block.channel_shift.square().mean() + block.time_shift.mean() for block in state.blocks)


def gradients(model, pieces):
    loss = loss_of(model, pieces)
    loss.backward()
    return loss, {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("pieces", [[3], [1, 0, 2]])
@pytest.mark.parametrize("version", VERSIONS)
def test_loss_and_every_gradient_are_the_plain_models(version, pieces):
    (found, of_kernels), (expected, of_plain) = (gradients(model_on(version, ops), pieces) for ops in (TRITON, PLAIN))
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)
    assert of_kernels.keys() == of_plain.keys()
    for name, gradient in of_plain.items():
        assert (of_kernels[name] - gradient).norm() <= 2e-5 * gradient.norm() + 1e-9, name


@pytest.mark.parametrize("level", ["selective", "block"])
@pytest.mark.parametrize("version", VERSIONS)
def test_recomputing_activations_changes_no_gradient(version, level):
    model = model_on(version, TRITON)
    _, expected = gradients(model, [3])
    model.zero_grad()
    model.recompute = level
    _, found = gradients(model, [3])
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


@pytest.mark.parametrize("version", VERSIONS)
def test_linears_alone_may_be_trained(version):
    found, expected = [], []
    for ops, into in ((TRITON, found), (PLAIN, expected)):
        model = model_on(version, ops)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("key.weight"))
        _, grads = gradients(model, [3])
        into.append(grads)
    for name, gradient in expected[0].items():
        torch.testing.assert_close(found[0][name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("version", VERSIONS)
def test_sizes_can_be_worked_out_without_values(version):
    model = model_on(version, TRITON).to("meta")
    logits, _ = model(TOKENS.to("meta"))
    logits.sum().backward()
    assert logits.shape == (2, 4, 12)
    assert model.blocks[0].att.key.weight.grad.shape == model.blocks[0].att.key.weight.shape
