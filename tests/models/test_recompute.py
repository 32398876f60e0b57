"""What is computed twice changes neither losses nor gradients, and what no gradient reaches is kept by nobody."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

from rwkvpeft.adapters.build import build_adapter
from rwkvpeft.checkpoints.load import build_model, fill_model, operator_of
from rwkvpeft.checkpoints.quantised import Quantiser
from rwkvpeft.models.recompute import LEVELS, draws_random_numbers, keeps
from rwkvpeft.models.shape import new_shape
from rwkvpeft.ops.contract import Backend
from rwkvpeft.registry import BACKENDS, MODELS, find

TOKENS = torch.arange(2 * 40).view(2, 40) * 7 % 50
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.3}


def make_model(version="x070", peft="none", settings=None, *, quant="none", layers=3, parts=("time", "ln")):
    """A small model in training, its adapter moved off its start values."""
    torch.manual_seed(1)
    shape = new_shape(version, n_layer=layers, n_embd=32, vocab_size=50, head_size=8)
    operator: Backend = find(BACKENDS[operator_of(shape)], "torch", flag="--op")
    model = build_model(shape, operator.run)
    weights = find(MODELS, version, flag="--my_testing").initial_weights(shape)
    weights = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in weights.items()}
    adapter = build_adapter(peft, settings or {}, parts)
    quantiser = None if quant == "none" else Quantiser(quant, keep=adapter.trains)
    fill_model(model, weights, device="cpu", dtype=torch.float32, source="test", quantiser=quantiser)
    if adapter is not None:
        adapter.attach(model)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def step(model, level):
    """Loss and gradients by name of one step."""
    model.recompute = level
    model.zero_grad()
    torch.manual_seed(5)
    loss = torch.nn.functional.cross_entropy(model(TOKENS)[0].flatten(0, 1), TOKENS.roll(-1, 1).flatten())
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("version", MODELS)
@pytest.mark.parametrize(
    ("peft", "settings", "quant"),
    [("none", {}, "none"), ("lora", LORA, "none"), ("lora", LORA, "fp8"), ("state", {}, "none"), ("state", {}, "fp8")],
)
def test_every_level_gives_the_same_loss_and_gradients(version, peft, settings, quant):
    model = make_model(version, peft, settings, quant=quant, parts=[] if peft == "state" else ["time", "ln"])
    for block in model.blocks:
        block.dropout = 0.2 if peft == "none" else 0.0
    kept, *recomputed = (step(model, level) for level in LEVELS.values())
    for found in recomputed:
        assert found.keys() == kept.keys()
        assert all(torch.equal(found[name], kept[name]) for name in kept)


class Calls(TorchDispatchMode):
    """How often operators are called."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func] = self.counts.get(func, 0) + 1
        return func(*args, **(kwargs or {}))


def calls_in(model, level):
    with Calls() as calls:
        step(model, level)
    return calls.counts


def test_selective_runs_the_recurrence_and_square_products_once():
    model = make_model(peft="lora", settings={"r": 4})
    recurrence = torch.ops.rwkvpeft.wkv7_torch_forward.default
    counts = {name: calls_in(model, level) for name, level in LEVELS.items()}
    assert [counts[name][recurrence] for name in LEVELS] == [3, 3, 6]
    products = [counts[name][torch.ops.aten.mm.default] for name in LEVELS]
    assert products[0] < products[1] < products[2]
    norms = [counts[name][torch.ops.aten.native_layer_norm.default] for name in LEVELS]
    assert norms[0] < norms[1] == norms[2]


@pytest.mark.parametrize(
    ("inner", "out", "kept"), [(2048, 2048, True), (2048, 8192, True), (2048, 64, True), (64, 2048, False)]
)
def test_a_product_is_kept_unless_its_inner_dimension_is_small(inner, out, kept):
    factors = torch.empty(7, inner, device="meta"), torch.empty(inner, out, device="meta")
    policy = keeps(None, torch.ops.aten.mm.default, *factors)
    assert (policy == CheckpointPolicy.MUST_SAVE) is kept


def saved_by_layer(model):
    """Tensors autograd saves while each block runs, and how often each block runs in a whole step."""
    saved, runs = [0] * len(model.blocks), [0] * len(model.blocks)
    running = []

    def enter(layer):
        def hook(block, inputs):
            running.append(layer)
            runs[layer] += 1
        return hook

    def leave(block, inputs, result):
        running.pop()

    def pack(tensor):
        if running and not tensor.is_leaf:
            saved[running[-1]] += 1
        return tensor

    handles = []
    for layer, block in enumerate(model.blocks):
        handles.append(block.register_forward_pre_hook(enter(layer)))
        handles.append(block.register_forward_hook(leave))
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = model(TOKENS)[0].square().mean()
    result.backward()
    for handle in handles:
        handle.remove()
    return saved, runs


@pytest.mark.parametrize("version", MODELS)
@pytest.mark.parametrize("level", LEVELS.values())
def test_below_the_first_trained_block_nothing_is_kept_or_computed_twice(version, level):
    model = make_model(version, "lora", {"r": 4, "target_modules": ["blocks.2.att.key"]}, parts=["none"])
    model.recompute = level
    saved, runs = saved_by_layer(model)
    assert saved[:2] == [0, 0]
    assert runs[:2] == [1, 1]
    if level == "none":
        assert saved[2] > 0


@pytest.mark.parametrize("version", MODELS)
def test_a_trained_embedding_keeps_every_block(version):
    model = make_model(version, "lora", {"r": 4, "target_modules": ["blocks.2.att.key"]}, parts=["none"])
    model.emb.weight.requires_grad_()
    assert min(saved_by_layer(model)[0]) > 0
    assert model.emb.weight.grad is not None


def test_a_state_that_wants_a_gradient_reaches_through_frozen_blocks():
    model = make_model("x070", "lora", {"r": 4, "target_modules": ["blocks.2.att.key"]}, parts=["none"])
    with torch.no_grad():
        _, state = model(TOKENS)
    state = state.map(lambda tensor: tensor.clone().requires_grad_())
    model(TOKENS, state)[0].sum().backward()
    assert state.blocks[0].memory.grad.abs().max() > 0


@pytest.mark.parametrize("version", MODELS)
def test_tuned_states_need_no_gradient_before_the_first_recurrence(version):
    model = make_model(version, "state", parts=[])
    seen = []
    wkv = model.blocks[0].att.wkv
    model.blocks[0].att.wkv = lambda **given: seen.append(given) or wkv(**given)
    model(TOKENS)
    assert [name for name, x in seen[0].items() if x is not None and x.requires_grad] == ["state"]


def test_random_numbers_are_only_drawn_again_where_there_are_any():
    plain = make_model(peft="lora", settings={**LORA, "lora_dropout": 0})
    assert not any(map(draws_random_numbers, plain.blocks))
    assert all(map(draws_random_numbers, make_model(peft="lora", settings=LORA).blocks))
    plain.blocks[1].dropout = 0.1
    plain.blocks[2].other = type("Foreign", (torch.nn.Module,), {"__module__": "elsewhere"})()
    assert [draws_random_numbers(block) for block in plain.blocks] == [False, True, True]
