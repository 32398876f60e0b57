"""Merges against the files that RWKV-PEFT's own programs wrote, and against its layers' outputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rwkvpeft.checkpoints.adapter import infer_recipe
from rwkvpeft.checkpoints.files import load_tensors
from rwkvpeft.checkpoints.merge import merge_files

pytestmark = pytest.mark.golden

KINDS = ["lora", "pissa", "bone16", "bone20", "bat", "state"]


@pytest.fixture
def merge(golden, tmp_path):
    """Merge reference adapter ``kind`` into its base. Returns the merged, the base's and the adapter's tensors."""

    def run(kind, dtype, quant=None):
        base, adapter = golden / f"peft_base_{dtype}.pth", golden / f"peft_{kind}_{dtype}_adapter.pth"
        initial = golden / f"peft_pissa_{dtype}_init_pissa.pth" if kind == "pissa" else None
        tensors = load_tensors(adapter)
        start = load_tensors(initial) if initial else {}
        start = {name.removeprefix("model."): tensor for name, tensor in start.items()}
        recipe = infer_recipe({**tensors, **start}, kind)
        merge_files(base, adapter, tmp_path / "out.pth", recipe=recipe, initial=initial, quant=quant)
        return load_tensors(tmp_path / "out.pth"), load_tensors(base), {**tensors, **start}

    return run


def expected_of(golden, kind, dtype):
    return load_tensors(golden / f"peft_{kind}_{dtype}_merged.pth")


@pytest.mark.parametrize(("kind", "dtype"), [
    *((kind, "fp32") for kind in KINDS if kind != "pissa"),
    # one addition, one rounding, in both programs
    *((kind, "bf16") for kind in ("bone16", "bone20", "state")),
])
def test_merged_files_equal_upstreams_bit_for_bit(golden, merge, kind, dtype):
    merged, _, _ = merge(kind, dtype)
    expected = expected_of(golden, kind, dtype)
    assert list(merged) == list(expected)
    for name, tensor in expected.items():
        assert merged[name].dtype == tensor.dtype
        assert torch.equal(merged[name], tensor), name


@pytest.mark.parametrize(("kind", "dtype"), [("lora", "bf16"), ("bat", "bf16"), ("pissa", "bf16"), ("pissa", "fp32")])
def test_where_upstream_rounds_several_times_its_steps_repeated_give_its_file(golden, merge, kind, dtype):
    """The difference to our files is exactly upstream's extra roundings to bf16."""
    merged, base, adapter = merge(kind, dtype)
    expected = expected_of(golden, kind, dtype)
    compared = 0
    for name, tensor in expected.items():
        steps = upstreams_steps(kind, name, base, adapter)
        if steps is None:
            assert torch.equal(merged[name], tensor)
        else:
            assert torch.equal(steps, tensor), name
            torch.testing.assert_close(merged[name].float(), tensor.float(), rtol=2**-7, atol=2**-7)
            compared += 1
    assert compared > 3


def upstreams_steps(kind, name, base, adapter):
    path = name.removesuffix(".weight")
    if kind == "bat":
        if f"{path}.disha" not in adapter:
            return None
        weight, blocks = base[name], adapter[f"{path}.disha"]
        rank = blocks.shape[-1]
        cut = weight.reshape(weight.shape[0] // rank, rank, -1, rank).permute(0, 2, 1, 3)
        change = cut @ blocks + blocks
        return weight + change.permute(0, 2, 1, 3).reshape(weight.shape)
    if f"{path}.lora_A" not in adapter:
        return None
    product = adapter[f"{path}.lora_B"] @ adapter[f"{path}.lora_A"]
    if kind == "lora":
        return base[name] + product * 4
    start = adapter[f"{path}.init_lora_B"] @ adapter[f"{path}.init_lora_A"]
    residual = (base[name] - start).to(torch.bfloat16)
    residual += product
    return residual


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["lora", "pissa", "bat", "bone20"])
def test_a_merge_is_exact_up_to_one_rounding(merge, kind, dtype):
    merged, base, adapter = merge(kind, dtype)
    compared = 0
    for name, tensor in base.items():
        exact = in_fp64(kind, name.removesuffix(".weight"), tensor, adapter)
        if exact is not None:
            error = (merged[name].double() - exact).abs()
            half_step = 2.0**-8 if dtype == "bf16" else 2.0**-24
            assert (error <= half_step * exact.abs() * 1.01 + 2e-6).all()
            compared += 1
    assert compared > 3


def in_fp64(kind, path, base, adapter):
    adapter = {name: tensor.double() for name, tensor in adapter.items()}
    if kind in ("lora", "pissa") and f"{path}.lora_A" in adapter:
        product = adapter[f"{path}.lora_B"] @ adapter[f"{path}.lora_A"]
        if kind == "lora":
            return base.double() + 4 * product
        return base.double() - adapter[f"{path}.init_lora_B"] @ adapter[f"{path}.init_lora_A"] + product
    if kind not in ("bat", "bone20") or f"{path}.disha" not in adapter:
        return None
    shard, weight = adapter[f"{path}.disha"], base.double()
    exact = weight.clone()
    for column in range(weight.shape[1]):
        if kind == "bone20":
            exact[:, column] += shard[column % 20]
        else:
            block, within = divmod(column, 16)
            for row in range(weight.shape[0]):
                span = weight[row, block * 16 : block * 16 + 16]
                exact[row, column] += span @ shard[block][:, within] + shard[block][row % 16, within]
    return exact


@pytest.mark.parametrize("kind", ["lora", "bone16", "bone20", "bat"])
def test_the_merged_weights_compute_what_upstreams_layers_compute(golden, merge, kind):
    merged, _, _ = merge(kind, "fp32")
    arrays = np.load(golden / "peft_forward_fp32.npz", allow_pickle=False)
    layers = [key.split("|")[1] for key in arrays.files if key.startswith(f"{kind}_y|")]
    assert layers
    for layer in layers:
        x = torch.from_numpy(arrays[f"x|{layer}"])
        expected = torch.from_numpy(arrays[f"{kind}_y|{layer}"])
        torch.testing.assert_close(x @ merged[f"{layer}.weight"].T, expected, rtol=1e-5, atol=1e-5)


def test_merging_through_nf4_adds_the_update_to_the_quantised_weight(golden, merge):
    """Upstream's file of this merge is off by up to a whole weight: its rows of 48 are not whole blocks of 64, and
    bitsandbytes 0.50 gives such a matrix back wrongly on a CPU. Each block is compared with the format's definition."""
    functions = pytest.importorskip("bitsandbytes").functional
    merged, base, adapter = merge("lora", "bf16", quant="nf4")
    table = functions.get_4bit_type("nf4", device="cpu")
    upstreams = load_tensors(golden / "peft_lora_bf16_merged_nf4.pth")
    differs = 0
    for name in (name for name in base if f"{name.removesuffix('.weight')}.lora_A" in adapter):
        path = name.removesuffix(".weight")
        product = adapter[f"{path}.lora_B"] @ adapter[f"{path}.lora_A"] * 4
        blocks = base[name].float().reshape(-1, 64)
        scales = blocks.abs().amax(1, keepdim=True)
        nearest = (blocks / scales).unsqueeze(-1).sub(table).abs().argmin(-1)
        weight = (table[nearest] * scales).reshape(base[name].shape)
        torch.testing.assert_close(merged[name].float(), weight + product.float(), rtol=2**-7, atol=2**-7)
        codes, state = functions.quantize_nf4(base[name])
        assert torch.equal(functions.dequantize_nf4(codes, state) + product, upstreams[name])
        differs += int((upstreams[name].float() - merged[name].float()).abs().max() > 0.1)
    assert differs > 3
