"""PiSSA's cut of the weight and what becomes of its halves."""

from __future__ import annotations

import pytest
import torch

from rwkvpeft.adapters.pissa import PissaAdapter
from rwkvpeft.errors import ContractError, UserError
from rwkvpeft.models.layers import Linear
from rwkvpeft.quantization.format import build_format
from rwkvpeft.quantization.linear import QuantizedLinear

PATH = "blocks.0.att.key"


def falling(out: int, in_: int) -> torch.Tensor:
    """A matrix whose singular values fall by half from one to the next."""
    size = min(out, in_)
    left, right = torch.linalg.qr(torch.randn(out, size))[0], torch.linalg.qr(torch.randn(in_, size))[0]
    return left @ torch.diag(2.0 ** -torch.arange(size)) @ right.T


def test_the_start_values_are_the_principal_components():
    weight = falling(24, 16)
    adapter = PissaAdapter.from_settings({"r": 4})
    residual = adapter.prepare(PATH, weight)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    best = left[:, :4] @ torch.diag(values[:4]) @ right[:4]
    torch.testing.assert_close(weight - residual, best, rtol=0, atol=1e-3)


def test_both_factors_share_the_singular_values():
    adapter = PissaAdapter.from_settings({"r": 3})
    adapter.prepare(PATH, falling(24, 16))
    layer = adapter.make_layer(PATH, Linear(16, 24))
    torch.testing.assert_close(layer.lora_A.norm(dim=1), layer.lora_B.norm(dim=0), rtol=1e-4, atol=1e-4)


def test_other_tensors_are_left_whole():
    weight = torch.randn(8, 8)
    assert PissaAdapter.from_settings({"target_modules": ["value"]}).prepare(PATH, weight) is weight


def test_start_values_of_a_file_are_taken_instead_of_a_new_decomposition():
    weight = torch.randn(8, 6)
    start = {f"model.{PATH}.init_lora_A": torch.randn(2, 6), f"model.{PATH}.init_lora_B": torch.randn(8, 2)}
    adapter = PissaAdapter()
    assert adapter.take_constants({**start, "x": weight}) == {"x": weight}
    expected = weight - start[f"model.{PATH}.init_lora_B"] @ start[f"model.{PATH}.init_lora_A"]
    torch.testing.assert_close(adapter.prepare(PATH, weight), expected)
    assert adapter.prepare("blocks.0.att.value", weight) is weight


def test_start_values_go_where_the_weight_is():
    adapter = PissaAdapter()
    adapter.take_constants({f"{PATH}.init_lora_A": torch.randn(2, 6), f"{PATH}.init_lora_B": torch.randn(8, 2)})
    assert adapter.prepare(PATH, torch.empty(8, 6, device="meta")).is_meta


def test_a_target_that_a_files_start_values_lack_is_refused():
    adapter = PissaAdapter()
    adapter.take_constants({f"{PATH}.init_lora_A": torch.randn(2, 6), f"{PATH}.init_lora_B": torch.randn(8, 2)})
    with pytest.raises(UserError, match="no start values for blocks.0.att.value"):
        adapter.make_layer("blocks.0.att.value", Linear(6, 8))


def test_a_rank_larger_than_the_matrix_is_refused():
    with pytest.raises(UserError, match="larger than"):
        PissaAdapter.from_settings({"r": 9}).prepare(PATH, torch.randn(8, 16))


def test_merging_without_start_values_is_refused():
    tensors = {f"{PATH}.lora_A": torch.randn(2, 6), f"{PATH}.lora_B": torch.randn(8, 2)}
    with pytest.raises(UserError, match="lora_init"):
        PissaAdapter().merge(f"{PATH}.weight", torch.randn(8, 6), tensors)


def test_a_base_quantised_too_early_is_a_broken_promise():
    linear = QuantizedLinear.from_weight(torch.randn(8, 16), build_format("fp8"))
    with pytest.raises(ContractError, match="before PiSSA"):
        PissaAdapter.from_settings({"r": 2}).make_layer(PATH, linear)


def test_the_quantised_residual_is_nearer_to_the_weight_than_the_quantised_weight():
    pytest.importorskip("bitsandbytes")
    nf4 = build_format("nf4")
    weight = falling(64, 64)
    residual = PissaAdapter.from_settings({"r": 8}).prepare(PATH, weight)
    principal = weight - residual
    with_pissa = (nf4.round_trip(residual) + principal - weight).norm()
    assert with_pissa < 0.2 * (nf4.round_trip(weight) - weight).norm()
