"""Rows in chunks: exact gradients are those of one long pass, truncated ones those of states cut off by hand."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkvpeft.adapters.build import build_adapter
from rwkvpeft.checkpoints.load import build_model, fill_model, load_model, operator_of
from rwkvpeft.checkpoints.quantised import Quantiser
from rwkvpeft.config.groups import (
    DataConfig,
    LongContextConfig,
    MethodConfig,
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    RuntimeConfig,
    ScheduleConfig,
    TrainConfig,
)
from rwkvpeft.data.batches import TokenBatch
from rwkvpeft.errors import ContractError
from rwkvpeft.memory.dry_run import Tally
from rwkvpeft.models.shape import new_shape
from rwkvpeft.objectives.base import Provided
from rwkvpeft.objectives.build import build_objective
from rwkvpeft.objectives.language_modelling import LanguageModelling
from rwkvpeft.objectives.long_context import LongContext
from rwkvpeft.ops.sequences import Sequences
from rwkvpeft.registry import BACKENDS, MODELS, find

VOCABULARY = 13
METHODS = {
    "none": {},
    "lora": {"r": 4, "lora_dropout": 0},
    "state": {},
    "state with token shift": {"token_shift": True},
    "lora+state": {"r": 4, "lora_dropout": 0},
}
# strong, so that a wrong factor shows
PER_TOKEN = LanguageModelling(0.1, chunk_rows=8)


def new_model(version, method="none", dtype=torch.float32, quant="none", layers=2, head_size=8, op="torch", **values):
    """Random weights, none of them zero, with what the method trains moved away from its start."""
    torch.manual_seed(1)
    shape = new_shape(version, n_layer=layers, n_embd=2 * head_size, vocab_size=VOCABULARY, head_size=head_size)
    weights = find(MODELS, version, flag="").initial_weights(shape)
    weights = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in weights.items()}
    model = build_model(shape, find(BACKENDS[operator_of(shape)], op, flag="").run)
    name = method.partition(" ")[0]
    adapter = build_adapter(name, {**METHODS.get(method, {}), **values}, [] if name == "state" else ["time", "ln"])
    quantiser = None if quant == "none" else Quantiser(quant, keep=adapter.trains)
    prepare = adapter.prepare if adapter else None
    fill_model(model, weights, device="cpu", dtype=dtype, source="", quantiser=quantiser, prepare=prepare)
    model.compute_dtype = dtype
    if adapter is None:
        model.requires_grad_(True)
    else:
        adapter.attach(model)
    for parameter in trained(model).values():
        moved = parameter.data + (0.05 * torch.randn_like(parameter) if adapter else 0)
        parameter.data = moved.to(torch.promote_types(dtype, torch.float32))
    return model.train()


@cache
def model_of(version, method, dtype):
    return new_model(version, method, dtype)


def batch_of(tokens, rows=2, masked=(), seed=2):
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (rows, tokens + 1), generator=draw)
    weights = torch.rand(rows, tokens, generator=draw).mul(2).round().div(2)
    weights[0, 0] = 1
    for position in masked:
        weights[:, position] = 0
    return TokenBatch(ids[:, :-1], ids[:, 1:], weights, weights.sum().double())


def trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def outcome(model, objective, *batches, normaliser=None, scale=3.0):
    """Losses and accumulated gradients by name; those that are None are left out."""
    model.zero_grad(set_to_none=True)
    losses = []
    for batch in batches:
        loss = objective(model, batch, normaliser)
        losses.append(loss.total.item())
        (loss.total * scale).backward()
    return losses, {name: p.grad for name, p in trained(model).items() if p.grad is not None}


def check_same(found, expected, tolerance):
    (losses, gradients), (expected_losses, expected_gradients) = found, expected
    assert losses == pytest.approx(expected_losses, abs=tolerance)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(
            gradients[name], gradient, rtol=0, atol=tolerance * max(1, float(gradient.abs().max())), msg=name
        )


@pytest.mark.parametrize("version", MODELS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_exact_gradients_are_those_of_one_long_pass(version, method, dtype, tolerance, data):
    tokens = data.draw(st.integers(1, 12), label="tokens")
    chunk = data.draw(st.sampled_from([1, 2, 3, 5, tokens, tokens + 1]), label="chunk")
    masked = data.draw(st.sets(st.integers(1, tokens)), label="masked") - {tokens}
    model, batch = model_of(version, method, dtype), batch_of(tokens, masked=masked)
    whole = outcome(model, PER_TOKEN, batch)
    check_same(outcome(model, LongContext(PER_TOKEN, chunk, exact=True), batch), whole, tolerance)


@pytest.mark.parametrize("version", MODELS)
@pytest.mark.parametrize("op", ["reference", pytest.param("triton", marks=pytest.mark.slow)])
def test_exact_gradients_are_those_of_one_long_pass_with_every_program(version, op):
    if op == "triton":
        pytest.importorskip("triton")
    model, batch = new_model(version, op=op, layers=1, head_size=32), batch_of(20, rows=1)
    whole = outcome(model, PER_TOKEN, batch)
    check_same(outcome(model, LongContext(PER_TOKEN, 16, exact=True), batch), whole, 2e-5)


@pytest.mark.parametrize("quant", ["fp8", "nf4"])
@pytest.mark.parametrize("method", ["lora", "lora+state"])
def test_exact_gradients_are_those_of_one_long_pass_on_a_quantised_base(quant, method):
    if quant == "nf4":
        pytest.importorskip("bitsandbytes")
    model, batch = new_model("x070", method, quant=quant), batch_of(11)
    whole = outcome(model, PER_TOKEN, batch)
    check_same(outcome(model, LongContext(PER_TOKEN, 4, exact=True), batch), whole, 1e-5)


@pytest.mark.parametrize("level", ["selective", "block"])
@pytest.mark.parametrize("exact", [True, False])
def test_a_chunk_may_compute_its_blocks_twice(level, exact):
    model, batch = new_model("x070"), batch_of(11)
    chunks = LongContext(PER_TOKEN, 4, exact=exact)
    plain = outcome(model, chunks, batch)
    model.recompute = level
    check_same(outcome(model, chunks, batch), plain, 1e-6)


@pytest.mark.parametrize("exact", [True, False])
def test_gradients_of_several_batches_add_up(exact):
    model, batches = new_model("x070"), [batch_of(11, seed=2), batch_of(7, seed=3)]
    normaliser = sum(batch.weights.sum() for batch in batches) / 2
    chunks = LongContext(PER_TOKEN, 4, exact=exact)
    losses, gradients = outcome(model, chunks, *batches, normaliser=normaliser)
    for index, batch in enumerate(batches):
        (loss,), alone = outcome(model, chunks, batch, normaliser=normaliser)
        assert loss == losses[index]
        gradients = {name: gradient - alone[name] for name, gradient in gradients.items()}
    assert max(gradient.abs().max() for gradient in gradients.values()) < 1e-6


def by_hand(model, batch, chunk):
    """Chunk by chunk, each state cut off; the loss of each divided by the whole rows' weight."""
    model.zero_grad(set_to_none=True)
    state, total, normaliser = None, 0.0, batch.weights.sum()
    tokens = batch.input_ids.shape[1]
    for start in range(0, tokens, chunk):
        ids, labels, weights = (part[:, start : start + chunk] for part in batch[:3])
        penalty = PER_TOKEN.logit_penalty * ids.shape[1] / tokens
        piece = TokenBatch(ids, labels, weights, batch.step_weight)
        loss, state = LanguageModelling(penalty, 8).part(model, piece, normaliser, state)
        state = state.detach()
        if loss.total.requires_grad:
            (loss.total * 3).backward()
        total += loss.total.item()
    return [total], {name: p.grad for name, p in trained(model).items() if p.grad is not None}


@pytest.mark.parametrize("version", MODELS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("late", [False, True])
def test_truncated_gradients_are_those_of_states_cut_off_by_hand(version, method, late):
    model, batch = model_of(version, method, torch.float64), batch_of(11, masked=[4, 5, 6])
    expected = by_hand(model, batch, 4)
    check_same(outcome(model, LongContext(PER_TOKEN, 4, late=late), batch), expected, 1e-10)


def test_late_truncated_gradients_in_fp16_are_saved_by_the_scale():
    batch, settings = batch_of(11), {"normaliser": torch.tensor(1e8), "scale": 2.0**23}
    plain = LanguageModelling(0.0, 8)
    _, expected = outcome(new_model("x070"), LongContext(plain, 4), batch, **settings)
    coarse = new_model("x070", dtype=torch.float16)

    def error(late):
        _, found = outcome(coarse, LongContext(plain, 4, late=late), batch, **settings)
        return max((found[name] - expected[name]).norm() / expected[name].norm() for name in expected)

    assert error(late=True) < 0.05
    assert error(late=False) > 0.3


def test_truncated_and_exact_gradients_differ():
    model, batch = model_of("x070", "none", torch.float64), batch_of(11)
    _, cut = outcome(model, LongContext(PER_TOKEN, 4), batch)
    _, exact = outcome(model, LongContext(PER_TOKEN, 4, exact=True), batch)
    difference = sum((cut[name] - exact[name]).norm() ** 2 for name in exact) ** 0.5
    assert difference > 0.01 * sum(gradient.norm() ** 2 for gradient in exact.values()) ** 0.5


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("penalty", [0.0, 0.1])
def test_chunks_in_which_nothing_is_trained_add_nothing(exact, penalty):
    per_token = LanguageModelling(penalty, 8)
    model, batch = model_of("x070", "none", torch.float64), batch_of(12, masked=[4, 5, 6, 7])
    loss, gradients = outcome(model, LongContext(per_token, 4, exact=exact), batch)
    assert loss == pytest.approx(outcome(model, per_token, batch)[0])
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    empty = batch._replace(weights=torch.zeros_like(batch.weights))
    loss, gradients = outcome(model, LongContext(per_token, 4, exact=exact), empty)
    assert loss == [0.0]
    assert (max(gradient.abs().max() for gradient in gradients.values()) > 0) == (penalty > 0)


@pytest.mark.parametrize("name", ["v6", "v7"])
def test_truncated_training_is_upstreams(golden, name):
    """Upstream weighs each chunk's mean by its share of the tokens: weights that do the same here make it equal."""
    stored = np.load(golden / f"model_{name}_rand_infctx.npz", allow_pickle=False)
    model = load_model(golden / f"model_{name}_rand.pth", dtype=torch.float32, op="torch").requires_grad_(True)
    data = np.load(golden / f"model_{name}_rand.npz", allow_pickle=False)
    ids, targets = (torch.from_numpy(data[key]).long() for key in ("tokens", "targets"))
    chunk, tokens = int(stored["chunk"]), ids.shape[1]
    weights = torch.zeros(ids.shape)
    for start in range(0, tokens, chunk):
        kept = targets[:, start : start + chunk] >= 0
        weights[:, start : start + chunk] = kept / kept.sum() * kept.shape[1] / tokens
    batch = TokenBatch(ids, targets, weights, weights.sum().double())
    chunks = LongContext(LanguageModelling(), chunk)
    (loss,), gradients = outcome(model, chunks, batch, normaliser=torch.tensor(1.0), scale=1.0)
    assert loss == pytest.approx(float(stored["total_loss"]), abs=1e-5)
    for parameter, digest in zip(stored["grad_names"], stored["digest_nol2"], strict=True):
        flat = gradients[str(parameter)].double().flatten()
        place = np.arange(flat.numel(), dtype=np.uint64)
        probe = torch.from_numpy(((place * 2654435761 + 12345) % 2**32) / 2.0**31 - 1)
        slack = 2e-4 * digest[2] * flat.numel() ** 0.5
        found = [flat.sum(), flat.abs().sum(), flat.norm(), flat @ probe, flat.abs().max()]
        for index, figure in enumerate(found):
            limit = slack if index in (0, 1, 3) else 2e-4 * digest[2]
            assert abs(float(figure) - digest[index]) <= limit, (parameter, index)


@pytest.mark.parametrize("exact", [True, False])
def test_what_is_random_is_drawn_the_same_in_both_passes(exact):
    model, batch = new_model("x070", "lora", torch.float64, lora_dropout=0.5), batch_of(11)
    model.regularise(dropout=0.3, neftune_alpha=5.0)

    def loss_at(tensor=None, step=None):
        torch.manual_seed(7)
        if tensor is not None:
            tensor.data += step
        result = LongContext(PER_TOKEN, 4, exact=exact, late=True)(model, batch).total
        if tensor is not None:
            tensor.data -= step
        return result

    if not exact:
        # what is cut has no derivative to compare with: the gradients of the pass that draws once
        torch.manual_seed(7)
        expected = outcome(model, LongContext(PER_TOKEN, 4), batch)
        torch.manual_seed(7)
        check_same(outcome(model, LongContext(PER_TOKEN, 4, late=True), batch), expected, 1e-10)
        return
    model.zero_grad()
    # without L2Wrap the gradient is the derivative of the loss
    plain = LanguageModelling(0.0, 8)
    torch.manual_seed(7)
    LongContext(plain, 4, exact=True)(model, batch).total.backward()
    tensor = model.get_parameter("blocks.0.ln1.weight")
    step = torch.randn(tensor.shape, dtype=torch.float64) * 1e-6
    rise = (loss_at(tensor, step) - loss_at(tensor, -step)).item()
    assert rise == pytest.approx(2 * float((tensor.grad * step).sum()), rel=1e-5)


def test_the_generator_goes_on_from_where_the_forward_pass_left_it():
    model, batch = new_model("x070", "lora", lora_dropout=0.5), batch_of(11)
    loss = LongContext(PER_TOKEN, 4, exact=True)(model, batch).total
    before = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_states_of_layers_below_the_first_trained_one_have_no_gradient():
    model, batch = new_model("x070", layers=3), batch_of(11)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("blocks.2."))
    seen = []
    model.blocks[1].register_forward_hook(lambda block, inputs, outputs: seen.append(outputs[0].requires_grad))
    whole = outcome(model, PER_TOKEN, batch)
    check_same(outcome(model, LongContext(PER_TOKEN, 4, exact=True), batch), whole, 1e-6)
    assert not any(seen)


@pytest.mark.parametrize("trains", [True, False])
def test_without_gradients_the_loss_is_found_in_chunks(trains):
    model, batch = new_model("x070"), batch_of(11)
    model.requires_grad_(trains)
    with torch.set_grad_enabled(not trains):
        loss = LongContext(PER_TOKEN, 4, exact=True)(model, batch)
    assert not loss.total.requires_grad
    assert loss.total.item() == pytest.approx(PER_TOKEN(model, batch).total.item(), abs=1e-6)
    assert loss.tokens == batch.weights.sum()


@pytest.mark.parametrize("exact", [True, False])
def test_each_parameters_gradient_arrives_once(exact):
    model, batch = new_model("x070"), batch_of(11)
    arrived = []
    for name, parameter in trained(model).items():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: arrived.append(name))
    outcome(model, LongContext(PER_TOKEN, 4, exact=exact), batch)
    assert sorted(arrived) == sorted(trained(model))


def test_no_activations_of_a_chunk_are_left_when_the_next_one_runs():
    """What is alive when a late chunk begins is what was alive at the second, but for the states between."""
    model, batch = new_model("x070"), batch_of(24)
    state = 2 * 2 * (16 + 16 + 2 * 8 * 8) * 4

    def alive(chunks):
        found = []
        with Tally([*model.parameters()]) as tally:
            hook = model.emb.register_forward_pre_hook(lambda *_: found.append(tally.alive))
            outcome(model, chunks, batch)
            hook.remove()
        return found

    forward = alive(LongContext(PER_TOKEN, 4, exact=True))[:6]
    assert max(b - a for a, b in pairwise(forward[1:])) <= state
    backward = alive(LongContext(PER_TOKEN, 4, exact=True))[6:]
    assert max(b - a for a, b in pairwise(backward)) <= 0
    cut = alive(LongContext(PER_TOKEN, 4))
    assert max(cut[2:]) <= cut[1]


@pytest.mark.parametrize("exact", [True, False])
def test_a_second_backward_pass_is_refused(exact):
    loss = LongContext(PER_TOKEN, 4, exact=exact)(new_model("x070"), batch_of(11)).total
    loss.backward(retain_graph=True)
    with pytest.raises(ContractError, match="once"):
        loss.backward()


def test_a_packed_row_is_refused():
    batch = batch_of(11, rows=1)._replace(sequences=Sequences([5, 6]))
    with pytest.raises(ContractError, match="packed"):
        LongContext(PER_TOKEN, 4)(new_model("x070"), batch)


def test_the_settings_choose_the_objective():
    def built(precision="fp32", **long):
        config = TrainConfig(
            ModelConfig(), DataConfig(), ScheduleConfig(), OptimizerConfig(), MethodConfig(),
            RuntimeConfig(precision=precision), OutputConfig(),
            long_context=LongContextConfig(**long),
        )
        return build_objective(config, Provided(rows="torch"))

    assert isinstance(built(), LanguageModelling)
    truncated = built(infctx=True, chunk_ctx=64)
    assert (truncated.chunk, truncated.exact, truncated.late) == (64, False, False)
    assert built(infctx=True, infctx_grad="exact", infctx_offload=True).offload
    # a scale that is not known yet cannot save what fp16 is too coarse for
    assert built("fp16", infctx=True).late
