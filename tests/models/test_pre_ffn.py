"""A channel mixing in place of block 0's time mixing, against RWKV-v5/src/model.py's formula and everywhere else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rwkvpeft import load_model
from rwkvpeft.adapters.build import build_adapter
from rwkvpeft.checkpoints.adapter import Recipe, save_adapter
from rwkvpeft.checkpoints.files import load_tensors, save_tensors
from rwkvpeft.checkpoints.load import build_model, fill_model, operator_of
from rwkvpeft.checkpoints.merge import merge_files
from rwkvpeft.checkpoints.quantised import Quantiser
from rwkvpeft.errors import UserError
from rwkvpeft.models.recompute import LEVELS
from rwkvpeft.models.shape import new_shape, read_shape
from rwkvpeft.models.state import BlockState
from rwkvpeft.ops.sequences import Sequences
from rwkvpeft.quantization.linear import QuantizedLinear
from rwkvpeft.registry import BACKENDS, MODELS, find

VERSIONS = ["x052", "x060"]
TOKENS = torch.arange(2 * 7).view(2, 7) * 5 % 40


def weights_of(version, **sizes):
    torch.manual_seed(1)
    shape = new_shape(version, n_layer=2, n_embd=32, vocab_size=40, head_size=8, pre_ffn=1, **sizes)
    weights = find(MODELS, version, flag="--my_testing").initial_weights(shape)
    return shape, {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in weights.items()}


def small_model(version, dtype=torch.float64, quantiser=None):
    shape, weights = weights_of(version)
    model = build_model(shape, find(BACKENDS[operator_of(shape)], "torch", flag="--op").run)
    fill_model(model, weights, device="cpu", dtype=dtype, source="test", quantiser=quantiser)
    return model.train()


def channel_mix(version, mix, x):
    """RWKV_CMix_x052 and RWKV_CMix_x060, from zeros before the first token."""
    before = F.pad(x, (0, 0, 1, -1))
    if version == "x052":
        x_k = x * mix.time_mix_k + before * (1 - mix.time_mix_k)
        x_r = x * mix.time_mix_r + before * (1 - mix.time_mix_r)
    else:
        x_k, x_r = x + (before - x) * mix.time_maa_k, x + (before - x) * mix.time_maa_r
    return torch.sigmoid(mix.receptance(x_r)) * mix.value(torch.relu(mix.key(x_k)) ** 2)


def as_rwkv_lm(version, model):
    first, second = model.blocks
    x = first.ln0(model.emb(TOKENS))
    x = x + channel_mix(version, first.ffnPre, first.ln1(x))
    x = x + channel_mix(version, first.ffn, first.ln2(x))
    x, _, _ = second(x, None, BlockState())
    return model.head(model.ln_out(x))


def loss_and_gradients(model, logits):
    model.zero_grad()
    loss = F.cross_entropy(logits.flatten(0, 1), TOKENS.roll(-1, 1).flatten())
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("version", VERSIONS)
def test_loss_and_every_gradient_are_rwkv_lms(version):
    model = small_model(version)
    expected = loss_and_gradients(model, as_rwkv_lm(version, model))
    assert len(expected) == 1 + len(list(model.parameters()))
    for model.recompute in LEVELS.values():
        found = loss_and_gradients(model, model(TOKENS)[0])
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_shape_is_read_from_the_file(version):
    shape, weights = weights_of(version, dim_att=64)
    assert shape.pre_ffn == 1
    assert read_shape(weights) == shape
    assert not any(name.startswith("blocks.0.att.") for name in weights)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_second_channel_mixing_begins_as_the_first(version):
    torch.manual_seed(1)
    shape = new_shape(version, n_layer=2, n_embd=32, vocab_size=40, head_size=8, pre_ffn=1)
    weights = find(MODELS, version, flag="--my_testing").initial_weights(shape)
    of_both = [{n.removeprefix(f"blocks.0.{part}."): t for n, t in weights.items() if n.startswith(f"blocks.0.{part}.")}
               for part in ("ffnPre", "ffn")]
    assert of_both[0].keys() == of_both[1].keys()
    for name, tensor in of_both[0].items():
        if name == "key.weight":
            assert torch.allclose(tensor.T @ tensor, torch.eye(32), atol=1e-5)
        else:
            assert torch.equal(tensor, of_both[1][name])


@pytest.mark.parametrize(("version", "n_layer", "reason"), [("x070", 2, "v7"), ("x060", 1, "second block")])
def test_where_it_cannot_be_it_is_refused(version, n_layer, reason):
    with pytest.raises(UserError, match=reason):
        new_shape(version, n_layer=n_layer, n_embd=32, vocab_size=40, head_size=8, pre_ffn=1)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_row_cut_anywhere_goes_on_from_its_state(version):
    model = small_model(version).eval()
    with torch.no_grad():
        whole, end = model(TOKENS)
        state, parts = None, []
        for piece in TOKENS.split([3, 0, 4], dim=1):
            part, state = model(piece, state)
            parts.append(part)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-12)
    assert torch.allclose(state.blocks[0].time_shift, end.blocks[0].time_shift, atol=1e-12)
    assert end.memories().shape[0] == 1


@pytest.mark.parametrize("version", VERSIONS)
def test_packed_documents_do_not_see_each_other(version):
    model = small_model(version).eval()
    with torch.no_grad():
        packed, _ = model.hidden(TOKENS.flatten()[None, :9], sequences=Sequences([4, 5]))
        alone = [model.hidden(part[None])[0] for part in TOKENS.flatten()[:9].split([4, 5])]
    assert torch.allclose(packed, torch.cat(alone, 1), atol=1e-12)


@pytest.mark.parametrize("peft", ["lora", "dora", "pissa", "miss", "bat"])
@pytest.mark.parametrize("version", VERSIONS)
def test_an_adapter_goes_on_it_and_merges(version, peft, tmp_path):
    _, weights = weights_of(version)
    save_tensors(tmp_path / "base.pth", weights)
    adapter = build_adapter(peft, {"r": 4}, ["time", "ln"])
    model = load_model(tmp_path / "base.pth", dtype=torch.float32, prepare=adapter.prepare)
    adapter.attach(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    file = adapter.file_tensors(model)
    assert any(name.startswith("blocks.0.ffnPre.key.") for name in file)
    save_adapter(tmp_path / "adapter.pth", file, Recipe(method=peft, config=adapter.settings()))
    merge_files(tmp_path / "base.pth", tmp_path / "adapter.pth", tmp_path / "merged.pth")
    merged = load_model(tmp_path / "merged.pth", dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(merged(TOKENS)[0], model.eval()(TOKENS)[0], atol=2e-4)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_tuned_state_has_none_for_it_and_merges(version, tmp_path):
    _, weights = weights_of(version)
    save_tensors(tmp_path / "base.pth", weights)
    adapter = build_adapter("state", {"token_shift": True}, [])
    model = load_model(tmp_path / "base.pth", dtype=torch.float32)
    adapter.attach(model)
    with torch.no_grad():
        for parameter in adapter.own_tensors(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    names = set(adapter.file_tensors(model))
    assert names == {"blocks.0.ffnPre.shift_state", "blocks.0.ffn.shift_state", "blocks.1.att.time_state",
                     "blocks.1.att.shift_state", "blocks.1.ffn.shift_state"}
    save_adapter(tmp_path / "state.pth", adapter.file_tensors(model), Recipe(method="state", config=adapter.settings()))
    merge_files(tmp_path / "base.pth", tmp_path / "state.pth", tmp_path / "merged.pth")
    assert names < set(load_tensors(tmp_path / "merged.pth"))
    merged = load_model(tmp_path / "merged.pth", dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(merged(TOKENS)[0], model.eval()(TOKENS)[0], atol=1e-5)


@pytest.mark.parametrize("version", VERSIONS)
def test_its_matrices_are_quantised(version):
    model = small_model(version, torch.float32, Quantiser("int8", keep=lambda name: False))
    assert isinstance(model.blocks[0].ffnPre.value, QuantizedLinear)
    assert model(TOKENS)[0].isfinite().all()
