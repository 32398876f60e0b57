import pytest
import torch

from rwkvpeft.ops.block.contract import KeyParameters, Norm
from rwkvpeft.ops.block.plain import PLAIN
from rwkvpeft.ops.block.trial import CALLS, draw, objection, results_of
from rwkvpeft.ops.contract import Needs
from rwkvpeft.ops.sequences import Sequences
from rwkvpeft.ops.trial import relative_error

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here, and tested on the GPU", allow_module_level=True)

from rwkvpeft.ops.block import triton_mix_by_token, triton_norm_mix
from rwkvpeft.ops.block.triton_ops import TRITON

PARAMETERS = "cpk"


def both(name, *, frozen="", **sizes):
    """Results of an operator in fp32 and of its twin in fp64 on the same inputs; letters in ``frozen`` want nothing."""
    call = CALLS[name]
    sizes = {"heads": 3, "head_size": 8, "tokens": 5, **sizes}
    results = []
    for ops, dtype in ((TRITON, torch.float32), (PLAIN, torch.float64)):
        inputs = draw(call.inputs, torch.float32, **sizes)
        inputs = [tensor.detach().to(dtype).requires_grad_(letter not in frozen)
                  for letter, tensor in zip(call.inputs, inputs, strict=True)]
        results.append(results_of(ops, call, inputs))
    return results


def assert_close(found, expected, limit=1e-6):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert relative_error(one, other) < limit


@pytest.mark.parametrize("tokens", [1, 2, 17])
@pytest.mark.parametrize("name", CALLS)
def test_results_and_every_gradient_equal_the_twin_in_fp64(name, tokens):
    assert_close(*both(name, tokens=tokens))


@pytest.mark.parametrize("name", [name for name, call in CALLS.items() if set(PARAMETERS) & set(call.inputs)])
def test_frozen_parameters_change_no_other_gradient(name):
    assert_close(*both(name, frozen=PARAMETERS))


@pytest.mark.parametrize("frozen", ["c", "p", "xlq", "xs"])
@pytest.mark.parametrize("name", [name for name in CALLS if "mix" in name])
def test_some_inputs_may_be_frozen_alone(name, frozen):
    assert_close(*both(name, frozen=frozen))


@pytest.mark.parametrize("head_size", [12, 64, 128])
@pytest.mark.parametrize("name", CALLS)
def test_any_head_size_gives_the_same(name, head_size):
    assert_close(*both(name, heads=2, head_size=head_size, batch=1, tokens=3))


@pytest.mark.parametrize("name", CALLS)
def test_programs_that_share_a_sequence_agree_at_their_borders(name, monkeypatch):
    for module in ("triton_norm_mix", "triton_mix_by_token"):
        monkeypatch.setattr(f"rwkvpeft.ops.block.{module}.tokens_each", lambda *_, **__: 4)
    assert_close(*both(name, tokens=10))


@pytest.mark.parametrize("name", CALLS)
def test_no_token_gives_empty_results_and_the_token_before(name):
    found, expected = both(name, tokens=0)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.double(), other)


@pytest.mark.parametrize("name", CALLS)
def test_two_runs_are_bitwise_equal(name):
    first, second = (both(name, tokens=3)[0] for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_cost_no_more_than_their_rounding(dtype, monkeypatch):
    monkeypatch.setattr("rwkvpeft.ops.block.trial._TOKENS", 5)
    assert objection(TRITON, Needs("cpu", dtype, 16, training=True), "cpu") == ""


@pytest.mark.parametrize("update", [False, True])
def test_norm_and_mix_without_a_token_before(update):
    def results(ops, dtype):
        x, more, weight, bias, share = (tensor.detach().to(dtype).requires_grad_()
                                        for tensor in draw("xxccp", torch.float32, heads=3, head_size=8, tokens=5))
        mixed = ops.norm_mix(x, more if update else None, Norm(weight, bias, 1e-5), None, (None, share))
        outputs = [mixed.residual, mixed.last, *mixed.tokens]
        loss = sum((output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum() for output in outputs)
        return [*outputs, *torch.autograd.grad(loss, [x, weight, bias, share])]

    assert_close(results(TRITON, torch.float32), results(PLAIN, torch.float64))


@pytest.mark.parametrize("lengths", [(10,), (4, 4, 2), (1, 1, 0, 3, 5)])
def test_packed_sequences_without_a_token_before(lengths, monkeypatch):
    for module in ("triton_norm_mix", "triton_mix_by_token"):
        monkeypatch.setattr(f"rwkvpeft.ops.block.{module}.tokens_each", lambda *_, **__: 4)
    sequences = Sequences(lengths)

    def results(ops, dtype):
        inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in
                  draw("xccps" + "ppppp", torch.float32, heads=3, head_size=8, batch=1, tokens=10)]
        x, weight, bias, share, shares, *mixes = inputs
        mixed = ops.norm_mix(x, None, Norm(weight, bias, 1e-5), None, (None, share), sequences)
        by_token = ops.mix_by_token(x, None, None, shares, mixes, sequences)
        outputs = [mixed.residual, mixed.last, *mixed.tokens, *by_token]
        loss = sum((output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum() for output in outputs)
        return [*outputs, *torch.autograd.grad(loss, inputs)]

    assert_close(results(TRITON, torch.float32), results(PLAIN, torch.float64))


def keys(ops, key, dtype, *, first_layer=False):
    inputs = [tensor.detach().to(dtype).requires_grad_()
              for tensor in draw("xxxxpppp", torch.float32, heads=3, head_size=8, tokens=5)]
    value, rate, first, share, *parameters = inputs
    key = key.to(dtype).requires_grad_()
    earlier = (None, None) if first_layer else (first, share)
    prepared = ops.prepare_keys(key, value, rate, *earlier, KeyParameters(*parameters), 3)
    loss = sum((part * torch.linspace(-1, 1, part.numel()).view_as(part)).sum() for part in prepared)
    grads = torch.autograd.grad(loss, [key, *inputs], allow_unused=True)
    return [*prepared, *(grad for grad in grads if grad is not None)]


@pytest.mark.parametrize("scale", [0.0, 1e-14, 1e4])
def test_keys_of_any_length_have_the_twins_gradients(scale):
    key = torch.randn(2, 5, 24)
    key[:, ::3] *= scale
    found, expected = keys(TRITON, key, torch.float32), keys(PLAIN, key, torch.float64)
    assert all(torch.isfinite(one).all() for one in found)
    assert_close(found, expected, limit=2e-6)


def test_layer_0_leaves_the_value_and_its_parameter_alone():
    key = torch.randn(2, 5, 24)
    assert_close(keys(TRITON, key, torch.float32, first_layer=True), keys(PLAIN, key, torch.float64, first_layer=True))


def test_results_that_nothing_follows_cost_no_gradient():
    x, weight, bias, *shares = draw("xccppp", torch.float32, heads=3, head_size=8, tokens=5)
    mixed = TRITON.norm_mix(x, None, Norm(weight, bias, 1e-5), None, tuple(shares))
    mixed.tokens[1].sum().backward()
    assert x.grad is not None
    assert not shares[0].grad.any()
    assert shares[1].grad.any()


def test_an_expanded_token_before_collects_the_gradients_of_all_sequences():
    x, weight, bias, share = draw("xccp", torch.float32, heads=3, head_size=8, tokens=5)
    tuned = torch.randn(24, requires_grad=True)
    found, expected = (
        torch.autograd.grad(
            ops.norm_mix(x, None, Norm(weight, bias, 1e-5), tuned.expand(2, -1), (share,)).tokens[0].square().sum(),
            tuned,
        )[0]
        for ops in (TRITON, PLAIN)
    )
    torch.testing.assert_close(found, expected)


def test_more_sequences_than_a_launch_takes_are_left_to_pytorch(monkeypatch):
    for module in (triton_norm_mix, triton_mix_by_token):
        monkeypatch.setattr(module, "MOST_ROWS", 2)
        monkeypatch.setattr(module, "_NormMix" if module is triton_norm_mix else "_MixByToken", None)
    x = torch.randn(3, 4, 8)
    mixed = TRITON.norm_mix(x, None, Norm(torch.ones(8), torch.zeros(8), 1e-5), None, (torch.rand(8),))
    assert mixed.tokens[0].shape == x.shape
    shares, mixes = torch.rand(5, 3, 4, 8), tuple(torch.rand(8) for _ in range(5))
    assert TRITON.mix_by_token(x, None, None, shares, mixes)[4].shape == x.shape
