"""Every format against a reference in plain PyTorch, on sizes that fit no block."""

from __future__ import annotations

import sys

import pytest
import torch

from rwkvpeft.errors import UserError
from rwkvpeft.quantization import format as format_module
from rwkvpeft.quantization import four_bit, fp8, int8, library
from rwkvpeft.quantization.format import build_format
from rwkvpeft.registry import FORMATS

NF4 = [
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
]  # fmt: skip
FP4 = [sign * number / 12 for sign in (-1, 1) for number in (0, 0.0625, 2, 3, 4, 6, 8, 12)]
SIZES = [(1, 1), (7, 5), (3, 127), (64, 64), (2, 32), (33, 96)]
# of normal weights, in root mean square over root mean square
RELATIVE_ERROR = {"int8": 0.012, "nf4": 0.095, "fp4": 0.125, "fp8": 0.028}


def nearest(weight, table, block):
    """Each block of ``weight``, end to end, as its largest magnitude times numbers of ``table``."""
    flat = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % block)).view(-1, block)
    scale = flat.abs().amax(1, keepdim=True)
    scaled = flat / scale.clamp_min(1e-30)
    table = torch.tensor(table)
    chosen = table[(scaled[..., None] - table).abs().argmin(-1)]
    return (chosen * scale).flatten()[: weight.numel()].view_as(weight)


def packed_layout(packed):
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in packed.items()}


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize(("name", "table"), [("nf4", NF4), ("fp4", FP4)])
def test_4_bits_are_the_nearest_numbers_of_the_published_table(name, table, shape):
    pytest.importorskip("bitsandbytes")
    weight = torch.randn(shape)
    torch.testing.assert_close(build_format(name).round_trip(weight), nearest(weight, table, 64), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", SIZES)
def test_int8_is_the_nearest_number_of_the_dynamic_table(shape):
    functions = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(shape)
    nearest_error = (nearest(weight, functions.create_dynamic_map().tolist(), 256) - weight).abs()
    error = (build_format("int8").round_trip(weight) - weight).abs()
    # halfway between two numbers bitsandbytes may take either
    assert (error - nearest_error).max() < 2e-4 * weight.abs().max()


@pytest.mark.parametrize("shape", SIZES)
def test_fp8_maps_the_largest_of_each_row_to_448(shape):
    weight = torch.randn(shape)
    scale = weight.abs().amax(1, keepdim=True) / 448
    expected = (weight / scale).to(torch.float8_e4m3fn).float() * scale
    torch.testing.assert_close(build_format("fp8").round_trip(weight), expected, rtol=0, atol=0)


def test_normal_weights_lose_no_more_than_the_format_must(format):
    weight = torch.randn(256, 512)
    error = (format.round_trip(weight) - weight).norm() / weight.norm()
    assert error < RELATIVE_ERROR[format.name]


def test_quantised_scales_cost_little_precision():
    pytest.importorskip("bitsandbytes")
    weight = torch.randn(256, 512)
    plain, double = build_format("nf4"), build_format("nf4", double=True)
    errors = [(each.round_trip(weight) - weight).norm() for each in (plain, double)]
    assert errors[1] < errors[0] * 1.01
    assert double.bits < plain.bits - 0.37


@pytest.mark.parametrize("shape", [*SIZES, (0, 4), (4, 0)])
def test_the_layout_is_what_quantising_gives(format, shape):
    weight = torch.randn(shape)
    packed = format.quantize(weight)
    assert packed_layout(packed) == format.layout(shape)
    assert format.dequantize(packed, shape, torch.float32).shape == weight.shape


def test_the_bits_of_a_weight_are_what_its_tensors_take(format):
    packed = format.quantize(torch.randn(512, 4096))
    assert sum(tensor.nbytes for tensor in packed.values()) * 8 / (512 * 4096) == pytest.approx(format.bits, abs=0.01)


def test_large_weights_are_worked_on_in_parts_without_a_seam(format, monkeypatch):
    weight = torch.randn(37, 300)
    whole = format.quantize(weight)
    for module in (format_module, four_bit, fp8, int8):
        monkeypatch.setattr(module, "CHUNK", 1024)
    parts = format.quantize(weight)
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    torch.testing.assert_close(
        format.dequantize(parts, (37, 300), torch.float32), format.dequantize(whole, (37, 300), torch.float32),
        rtol=0, atol=0,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_the_fp32_values_rounded_once(format, dtype):
    packed = format.quantize(torch.randn(6, 50))
    exact = format.dequantize(packed, (6, 50), torch.float32)
    assert torch.equal(format.dequantize(packed, (6, 50), dtype), exact.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_of_the_file_does_not_change_the_rounding(format, dtype):
    weight = torch.randn(8, 64).to(dtype)
    low, high = format.quantize(weight), format.quantize(weight.float())
    assert all(torch.equal(low[name], high[name]) for name in high)


def test_rows_of_zeros_stay_zeros(format):
    weight = torch.randn(4, 256)
    weight[1] = 0
    assert not format.round_trip(weight)[1].any()
    assert not format.round_trip(torch.zeros(4, 256)).any()


def test_a_matrix_whose_memory_is_not_in_order_is_packed_as_any_other(format):
    weight = torch.randn(30, 20)
    assert torch.equal(format.round_trip(weight.T), format.round_trip(weight.T.contiguous()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(format, bad):
    weight = torch.randn(3, 5)
    weight[1, 2] = bad
    with pytest.raises(UserError, match=r"blocks\.0\.att\.key\.weight holds NaN or infinity"):
        format.quantize(weight, name="blocks.0.att.key.weight")


def test_4bit_means_fp4():
    assert build_format("4bit") == build_format("fp4")


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_quantised_scales_are_refused_where_they_have_no_effect(name):
    with pytest.raises(UserError, match="--quant_double has no effect"):
        build_format(name, double=True)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "fp8"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    library.bitsandbytes_functions.cache_clear()
    with pytest.raises(UserError, match=r"rwkvpeft\[bnb\]"):
        build_format(name).quantize(torch.randn(2, 2))


def test_fp8_needs_no_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    library.bitsandbytes_functions.cache_clear()
    assert build_format("fp8").round_trip(torch.ones(2, 2)).eq(1).all()


def test_loading_bitsandbytes_says_nothing():
    pytest.importorskip("bitsandbytes")
    import subprocess

    script = "from rwkvpeft.quantization.library import bitsandbytes_functions as f; f()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "gemm_4bit_forward" not in done.stdout + done.stderr
