"""What the model says with its adapter switched off against a second, frozen copy of it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rwkvpeft.adapters.build import build_adapter
from rwkvpeft.checkpoints.files import save_tensors
from rwkvpeft.checkpoints.load import load_model
from rwkvpeft.checkpoints.quantised import Quantiser
from rwkvpeft.errors import ContractError
from rwkvpeft.models.shape import new_shape
from rwkvpeft.objectives.base import Provided
from rwkvpeft.objectives.preference.dpo import Dpo
from rwkvpeft.objectives.preference.scores import reference_logprobs, score_answers
from rwkvpeft.registry import MODELS, find

LENGTHS = ((4, 3, 5), (1, 2, 9), (7, 1, 4))
SETTINGS = {
    "lora": {"r": 4, "lora_dropout": 0.5}, "dora": {"r": 4, "lora_dropout": 0.5}, "pissa": {"r": 4}, "miss": {"r": 8},
    "bat": {"r": 8}, "state": {"token_shift": True}, "lora+state": {"r": 4, "state": {"token_shift": True}},
}
METHODS = [*SETTINGS]
VERSIONS = sorted(MODELS)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Path of a small model's checkpoint, by version."""
    folder = tmp_path_factory.mktemp("bases")

    def path_of(version):
        path = folder / f"{version}.pth"
        if not path.exists():
            torch.manual_seed(1)
            shape = new_shape(version, n_layer=2, n_embd=32, vocab_size=23, head_size=16)
            weights = find(MODELS, version, flag="").initial_weights(shape)
            save_tensors(path, {name: tensor + 0.1 * torch.randn(tensor.shape) for name, tensor in weights.items()})
        return path

    return path_of


def load(path, base, method="", parts=()):
    """A model in training, and its adapter if there is one; ``base`` is a dtype or a format."""
    adapter = build_adapter(method, dict(SETTINGS[method]), parts) if method else None
    keep = (lambda name: False) if adapter is None else adapter.trains
    quantiser = Quantiser(base, keep=keep) if base == "nf4" else None
    prepare = {} if adapter is None else {"prepare": adapter.prepare}
    dtype = torch.bfloat16 if base == "bf16" else torch.float32
    model = load_model(path, dtype=dtype, op="torch", quantiser=quantiser, **prepare)
    if adapter is not None:
        adapter.attach(model)
    return model.train(), adapter


def train_a_little(model, batch, provided):
    """Two steps that leave nothing of what is trained where it was."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        Dpo(0.5, sft_share=0.5, provided=provided)(model, batch).total.backward()
        optimizer.step()


def asked(model, batch):
    with torch.no_grad():
        return score_answers(model.eval(), batch, Provided()).logprobs


CASES = [(method, kind, "x070") for method in METHODS for kind in ("fp32", "bf16", "nf4")]
CASES += [(method, "fp32", version) for method in METHODS for version in VERSIONS if version != "x070"]


@pytest.mark.parametrize(("method", "kind", "version"), CASES)
def test_a_switched_off_adapter_is_a_frozen_copy_bit_for_bit(method, kind, version, base, pairs, moved):
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
    batch = pairs.drawn(LENGTHS).batch()
    model, adapter = load(base(version), kind, method, parts=("time", "ln"))
    # PiSSA cuts the base's weights in two before it starts, which rounds: there the copy is of its own start
    frozen = copy.deepcopy(model) if method == "pissa" else load(base(version), kind)[0]
    if method == "pissa":
        adapter.switch(frozen, on=False)
    provided = Provided(adapter=adapter)
    train_a_little(model, batch, provided)
    moved(model)
    found = reference_logprobs(model, batch, provided)
    assert torch.equal(found, asked(frozen, batch))
    assert (asked(model, batch) - found).abs().max() > 1e-2


@pytest.mark.parametrize("parts", [("emb", "head"), ("time", "ln", "emb", "head")])
def test_trained_tables_are_switched_off_too(parts, base, pairs, moved):
    batch = pairs.drawn(LENGTHS).batch()
    model, adapter = load(base("x070"), "bf16", "lora", parts=parts)
    moved(model)
    frozen, _ = load(base("x070"), "bf16")
    found = reference_logprobs(model, batch, Provided(adapter=adapter))
    assert torch.equal(found, asked(frozen, batch))
    assert not torch.equal(found, asked(model, batch))


def test_the_reference_drops_nothing_out_and_leaves_the_model_and_the_generator_alone(base, pairs):
    batch = pairs.drawn(LENGTHS).batch()
    model, adapter = load(base("x070"), "fp32", "lora")
    model.regularise(dropout=0.3)
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    before = torch.get_rng_state()
    first, second = (reference_logprobs(model, batch, Provided(adapter=adapter)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes
    assert not first.requires_grad


def test_the_gradient_after_a_reference_pass_is_that_without_one(base, pairs, moved):
    """The trained parts are exchanged in between; what autograd has kept of them must not be."""
    model, adapter = load(base("x070"), "fp32", "dora", parts=("time", "ln"))
    moved(model)
    model.eval()
    batch = pairs.drawn(LENGTHS).batch()
    told = batch._replace(reference=reference_logprobs(model, batch, Provided(adapter=adapter)))
    found = []
    for one in (batch, told):
        loss = Dpo(0.5, provided=Provided(adapter=adapter))(model, one).total
        found.append(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))
    assert all(map(torch.equal, *found))


def test_a_reference_in_the_batch_needs_no_adapter(base, pairs):
    model, _ = load(base("x070"), "fp32")
    batch = pairs.drawn(LENGTHS).batch(reference=torch.zeros(3, 2))
    policy = asked(model, batch)
    loss = Dpo(0.1)(model, batch)
    torch.testing.assert_close(loss.metrics["chosen_reward"], 0.1 * policy[:, 0].mean())


def test_neither_an_adapter_nor_a_reference_is_refused(base, pairs):
    model, _ = load(base("x070"), "fp32")
    with pytest.raises(ContractError, match="neither an adapter"):
        Dpo(0.1)(model, pairs.drawn(LENGTHS).batch())


class Called(TorchDispatchMode):
    """Remembers what was called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device_where_no_rows_are_left_out(base, pairs):
    model, adapter = load(base("x070"), "fp32", "lora")
    batch = pairs.drawn(LENGTHS).batch()
    with Called() as called:
        Dpo(0.1, provided=Provided(adapter=adapter, compact=False))(model, batch).total.backward()
    assert not called.names & {"nonzero", "_local_scalar_dense", "masked_select"}
