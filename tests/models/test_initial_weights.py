from __future__ import annotations

import json

import pytest
import torch

from rwkvpeft.models.shape import new_shape, read_shape
from rwkvpeft.registry import MODELS, find

# RWKV-LM's folder RWKV-v5 draws v7 too, as RWKV-v7/train_temp does but with other low-rank widths
OLD_V7 = ("x070", "pretrain_v5_repo")
SETS = [("x052", "pretrain_v5_repo"), ("x060", "pretrain_v5_repo"), ("x070", "pretrain_v7_repo"), OLD_V7]


def reference(golden, version):
    version, source = version
    number = {"x052": 5, "x060": 6, "x070": 7}[version]
    entries = json.loads((golden / "init_stats.json").read_text())
    return next(entry for entry in entries if (entry["version"], entry["source"]) == (number, source))


def drawn(version, entry):
    if version == OLD_V7:
        shape = read_shape(
            {name: torch.empty(stats["shape"], device="meta") for name, stats in entry["tensors"].items()}
        )
    else:
        shape = new_shape(
            version[0], n_layer=entry["n_layer"], n_embd=entry["n_embd"], vocab_size=entry["vocab"], head_size=64
        )
    return find(MODELS, version[0], flag="--my_testing").initial_weights(shape)


@pytest.mark.golden
@pytest.mark.parametrize("version", SETS)
def test_initial_tensors_have_rwkv_lms_names_and_shapes(golden, version):
    entry = reference(golden, version)
    ours = {name: list(tensor.shape) for name, tensor in drawn(version, entry).items()}
    assert ours == {name: stats["shape"] for name, stats in entry["tensors"].items()}


@pytest.mark.golden
@pytest.mark.parametrize("version", SETS)
def test_initial_values_without_chance_are_rwkv_lms(golden, version):
    entry = reference(golden, version)
    ours = drawn(version, entry)
    for name, stats in entry["tensors"].items():
        if not stats["deterministic"]:
            continue
        tensor = ours[name].double().flatten()
        expected = stats.get("values", stats.get("constant"))
        step = 1 if "values" in stats or "constant" in stats else 16
        expected = torch.as_tensor(expected if expected is not None else stats["values_every_16th"]).double().flatten()
        assert torch.allclose(tensor[::step], expected.expand_as(tensor[::step]), atol=2e-6), name


@pytest.mark.golden
@pytest.mark.parametrize("version", SETS)
def test_random_initial_values_have_rwkv_lms_gain_and_spread(golden, version):
    entry = reference(golden, version)
    ours = drawn(version, entry)
    for name, stats in entry["tensors"].items():
        if stats["deterministic"]:
            continue
        tensor = ours[name].double()
        if "orthogonal_gain" in stats:
            matrix = tensor if tensor.shape[0] <= tensor.shape[1] else tensor.T
            gain = (matrix @ matrix.T).diagonal().mean().sqrt()
            assert gain.item() == pytest.approx(stats["orthogonal_gain"], rel=1e-4), name
        else:
            assert tensor.abs().max().item() == pytest.approx(stats["uniform_bound_estimate"], rel=0.05), name
