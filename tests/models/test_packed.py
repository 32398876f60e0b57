"""Documents packed into one row against each document alone: losses, final states, every gradient of a whole model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rwkvpeft.adapters.build import build_adapter
from rwkvpeft.checkpoints.load import build_model, fill_model, operator_of
from rwkvpeft.models.recompute import LEVELS
from rwkvpeft.models.shape import new_shape
from rwkvpeft.models.state import BlockState, RecurrentState
from rwkvpeft.ops.block.plain import PLAIN
from rwkvpeft.ops.sequences import Sequences, taking_sequences
from rwkvpeft.registry import BACKENDS, MODELS, find

VERSIONS = sorted(MODELS)
CHUNK = 32
LENGTHS = (3, 0, 1, CHUNK, CHUNK + 8)
VOCABULARY = 23


def make_model(
    version, op="torch", *, block_ops=PLAIN, dtype=torch.float64, peft="none", layers=2, embd=16, head_size=8
):
    """A model with weights of every kind off their start values, on the operators asked for."""
    torch.manual_seed(1)
    shape = new_shape(version, n_layer=layers, n_embd=embd, vocab_size=VOCABULARY, head_size=head_size)
    operator = operator_of(shape)
    wkv = taking_sequences(operator, find(BACKENDS[operator], op, flag="--op"))
    model = build_model(shape, wkv, block_ops=block_ops)
    weights = find(MODELS, version, flag="--my_testing").initial_weights(shape)
    weights = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in weights.items()}
    adapter = build_adapter(peft, {"r": 2, "lora_dropout": 0} if peft == "lora" else {}, ["time", "ln"])
    fill_model(model, weights, device="cpu", dtype=dtype, source="test")
    if adapter is not None:
        adapter.attach(model)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def tune_states(model):
    """Trained states, token shifts among them, that every document starts from."""
    for block in model.blocks:
        shape = model.shape
        memory = 0.3 * torch.randn(shape.n_head, shape.head_size, shape.head_size)
        block.att.time_state = nn.Parameter(memory.to(model.compute_dtype))
        for mixing in (block.att, block.ffn):
            mixing.shift_state = nn.Parameter(torch.randn(shape.n_embd).to(model.compute_dtype))


def given_states(model, documents):
    """A state for each document, all of it wanting gradients."""
    shape, dtype = model.shape, model.compute_dtype
    shift = (documents, shape.n_embd)
    memory = (documents, shape.n_head, shape.head_size, shape.head_size)
    return RecurrentState(tuple(
        BlockState(*(torch.randn(sizes).to(dtype).requires_grad_() for sizes in (shift, memory, shift)))
        for _ in model.blocks
    ))


def loss_of(model, hidden, targets):
    return nn.functional.cross_entropy(model.head(hidden).flatten(0, 1), targets.flatten(), reduction="sum")


def packed(model, tokens, targets, lengths, state):
    hidden, after = model.hidden(tokens, state, Sequences(lengths))
    losses = [loss_of(model, *parts) for parts in zip(hidden.split(lengths, 1), targets.split(lengths, 1), strict=True)]
    return torch.stack(losses), after


def alone(model, tokens, targets, lengths, state):
    losses, left = [], []
    for index, (own, wanted) in enumerate(zip(tokens.split(lengths, 1), targets.split(lengths, 1), strict=True)):
        start = None if state is None else state.map(lambda tensor, index=index: tensor[index : index + 1])
        hidden, after = model.hidden(own, start)
        losses.append(loss_of(model, hidden, wanted))
        left.append(after)
    nothing = torch.zeros(1, model.shape.n_embd, dtype=model.compute_dtype)
    blocks = []
    for parts in zip(*(after.blocks for after in left), strict=True):
        # a document without tokens leaves None behind where nothing was given
        columns = ([nothing if part is None else part for part in column] for column in zip(*parts, strict=True))
        blocks.append(BlockState(*map(torch.cat, columns)))
    return torch.stack(losses), RecurrentState(tuple(blocks))


def outcome(run, model, lengths, state):
    """Loss of each document, what each leaves behind, and the gradients of a weighted sum of all of it, by name."""
    generator = torch.Generator().manual_seed(5)
    tokens, targets = torch.randint(VOCABULARY, (2, 1, sum(lengths)), generator=generator)
    losses, after = run(model, tokens, targets, lengths, state)
    results = {"losses": losses} | {
        f"state {layer} {name}": tensor
        for layer, block in enumerate(after.blocks) for name, tensor in block._asdict().items()
    }
    total = sum((x * torch.randn(x.shape, generator=generator).to(x)).sum() for x in results.values())
    wanting = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for layer, block in enumerate(() if state is None else state.blocks):
        wanting |= {f"given {layer} {name}": tensor for name, tensor in block._asdict().items()}
    grads = torch.autograd.grad(total, list(wanting.values()), materialize_grads=True)
    return results | {f"gradient of {name}": grad for name, grad in zip(wanting, grads, strict=True)}


def check(model, lengths, *, states, limit):
    """``states``: fresh, tuned or given."""
    torch.manual_seed(2)
    if states == "tuned":
        tune_states(model)
    state = given_states(model, len(lengths)) if states == "given" else None
    found, expected = (outcome(run, model, lengths, state) for run in (packed, alone))
    assert any("shift" in name for name in expected)
    for name, tensor in expected.items():
        scale = tensor.double().norm() + 1e-3
        assert (found[name].double() - tensor.double()).norm() <= limit * scale, name


@pytest.mark.parametrize("states", ["fresh", "tuned", "given"])
@pytest.mark.parametrize("op", ["torch", "reference"])
@pytest.mark.parametrize("version", VERSIONS)
def test_packed_documents_have_the_losses_and_gradients_of_each_alone(version, op, states):
    check(make_model(version, op), LENGTHS, states=states, limit=1e-10)


@pytest.mark.parametrize("version", VERSIONS)
def test_single_precision_costs_round_off_alone(version):
    check(make_model(version, dtype=torch.float32), LENGTHS, states="given", limit=1e-5)


@pytest.mark.parametrize("states", ["fresh", "given"])
@pytest.mark.parametrize("lengths", [(7,), (1,), (0,), (0, 2), (CHUNK, CHUNK)])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_row_of_one_document_is_a_packed_row_too(version, lengths, states):
    check(make_model(version), lengths, states=states, limit=1e-10)


@pytest.mark.parametrize("version", VERSIONS)
@settings(max_examples=6, deadline=None)
@given(lengths=st.lists(st.integers(0, CHUNK + 9), min_size=1, max_size=5))
def test_documents_of_any_lengths_leak_nothing(version, lengths):
    check(make_model(version), tuple(lengths), states="given", limit=1e-10)


@pytest.mark.parametrize("states", ["tuned", "given"])
@pytest.mark.parametrize("level", [level for level in LEVELS.values() if level != "none"])
@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_computed_twice_leaks_nothing(version, level, states):
    model = make_model(version)
    model.recompute = level
    check(model, LENGTHS, states=states, limit=1e-10)


@pytest.mark.parametrize("peft", ["lora", "state"])
@pytest.mark.parametrize("version", VERSIONS)
def test_adapters_are_trained_as_on_each_document_alone(version, peft):
    model = make_model(version, peft=peft).double()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any(("lora" if peft == "lora" else "time_state") in name for name in trained)
    model.recompute = "selective"
    check(model, LENGTHS, states="fresh", limit=1e-10)


def interpreted():
    """The block's Triton operators, in the interpreter."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here, and tested on the GPU")
    from rwkvpeft.ops.block.triton_ops import TRITON

    return TRITON


@pytest.mark.parametrize(
    ("states", "level"), [pytest.param("tuned", "none", marks=pytest.mark.slow), ("given", "selective")]
)
@pytest.mark.parametrize("version", VERSIONS)
def test_fused_block_operators_leak_nothing(version, states, level):
    model = make_model(version, block_ops=interpreted(), dtype=torch.float32, layers=1)
    model.recompute = level
    check(model, (2, 0, 1), states=states, limit=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_triton_recurrences_leak_nothing(version):
    interpreted()
    size = 64 if version == "x070" else 32
    model = make_model(version, "triton", dtype=torch.float32, layers=1, embd=size, head_size=size)
    check(model, (3, 0, 2), states="given", limit=3e-5)
