"""Settings of the machine: what is refused, and the dtypes of a run."""

from __future__ import annotations

import pytest
import torch

from rwkvpeft.config.groups import RuntimeConfig
from rwkvpeft.errors import UserError
from rwkvpeft.quantization.format import build_format
from rwkvpeft.quantization.linear import QuantizedLinear
from rwkvpeft.training.devices import find_device, local_device, matmul_precision, place_model
from rwkvpeft.training.precision import ScaledGradients


def runtime(**values):
    return RuntimeConfig(**{"accelerator": "cpu", "precision": "fp32", **values})


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_an_error_and_auto_takes_the_cpu():
    with pytest.raises(UserError, match="no GPU"):
        find_device(runtime(accelerator="gpu"))
    assert find_device(runtime(accelerator="auto")) == "cpu"


def test_each_process_of_a_run_on_several_gpus_has_its_own(monkeypatch):
    monkeypatch.setattr("rwkvpeft.training.devices.find_device", lambda runtime: "cuda")
    assert local_device(runtime(accelerator="gpu", devices=2)) == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert local_device(runtime(accelerator="gpu", devices=2)) == torch.device("cuda", 1)


def test_the_scaler_leaves_the_forward_pass_alone():
    with ScaledGradients("cpu").forward_context():
        assert not torch.is_autocast_enabled("cpu")


def test_frozen_parameters_take_the_compute_dtype_and_trained_ones_fp32():
    model = torch.nn.Linear(2, 2, dtype=torch.float16)
    model.weight.requires_grad_(False)
    place_model(model, "bf16")
    assert (model.weight.dtype, model.bias.dtype) == (torch.bfloat16, torch.float32)
    assert model.compute_dtype == torch.bfloat16


def test_tf32_is_set_for_the_run_alone():
    before = torch.get_float32_matmul_precision()
    with matmul_precision("tf32"):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before


def test_the_parts_of_a_quantised_weight_keep_their_dtypes():
    model = torch.nn.Sequential(QuantizedLinear.from_weight(torch.randn(4, 6), build_format("fp8")))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    place_model(model, "bf16")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_in_fp64_what_is_trained_is_fp64_too():
    model = torch.nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    place_model(model, "fp64")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
