"""Every optimizer of the table: it learns, goes on exactly, and refuses what it cannot do."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from rwkvpeft.checkpoints.files import load_tensors
from rwkvpeft.config.groups import OptimizerConfig
from rwkvpeft.config.parse import parse_train
from rwkvpeft.errors import UserError
from rwkvpeft.registry import OPTIMIZERS
from rwkvpeft.training.module import RwkvModule
from rwkvpeft.training.optimizers import contract
from rwkvpeft.training.optimizers.contract import find_optimizer
from rwkvpeft.training.parameter_groups import parameter_groups

RATES = {"lion": 1e-3, "lion8bit": 1e-3}
PACKAGES = {"eight_bit": "bitsandbytes", "schedule_free": "schedulefree"}
PAGED = [name for name in OPTIMIZERS if name.startswith("paged")]
HERE = [name for name in OPTIMIZERS if name not in PAGED]


def need(name):
    """Skip a test whose optimizer is not installed."""
    module = OPTIMIZERS[name].partition(":")[0].rpartition(".")[2]
    if module in PACKAGES:
        pytest.importorskip(PACKAGES[module])
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this PyTorch has no Muon")


def build(name, parameters, **values):
    groups = parameter_groups(parameters.items(), layerwise_lr=True, weight_decay=0.0)
    return find_optimizer(name).build(groups, OptimizerConfig(optim=name, **values), scaled_gradients=False)


def losses(tmp_path, folder="run"):
    return [json.loads(line)["loss"] for line in (tmp_path / folder / "loss_data.jsonl").read_text().splitlines()]


def stop_after(patched, step):
    finish = RwkvModule._finish_step

    def finish_and_stop(self, *args):
        finish(self, *args)
        if self.progress.step == step:
            signal.raise_signal(signal.SIGTERM)

    patched.setattr(RwkvModule, "_finish_step", finish_and_stop)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("optim", HERE)
def test_every_optimizer_lowers_the_loss(train, tmp_path, wide_base, optim, precision):
    need(optim)
    rate = RATES.get(optim, 1e-2)
    train(
        checkpoint=wide_base, optim=optim, precision=precision, lr_init=rate, lr_final=rate,
        epoch_steps=12, epoch_count=3, micro_bsz=4,
    )
    found = losses(tmp_path)
    assert sum(found[-6:]) / 6 < sum(found[:6]) / 6 - 0.1


@pytest.mark.parametrize("optim", HERE)
def test_every_optimizer_goes_on_bit_for_bit(train, tmp_path, wide_base, monkeypatch, optim):
    need(optim)
    values = {
        "checkpoint": wide_base, "optim": optim, "weight_decay": 0.1, "weight_decay_final": 0.0, "epoch_save": 1,
        "lr_init": RATES.get(optim, 1e-2),
    }
    _, straight, _ = train(folder="straight", **values)
    with monkeypatch.context() as patched:
        stop_after(patched, 6)
        first, _, _ = train(folder="cut", **values)
    assert (first.stopped_early, first.steps) == (True, 6)
    _, resumed, _ = train(folder="cut", **values)
    for name, parameter in straight.named_parameters():
        assert torch.equal(resumed.get_parameter(name), parameter), name
    assert losses(tmp_path, "cut") == losses(tmp_path, "straight")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="paged moments need an NVIDIA GPU")
@pytest.mark.parametrize("optim", PAGED)
def test_paged_optimizers_learn_and_go_on_bit_for_bit(train, tmp_path, wide_base, monkeypatch, optim):
    need(optim)
    values = {"checkpoint": wide_base, "optim": optim, "accelerator": "gpu", "epoch_steps": 12}
    _, straight, _ = train(folder="straight", **values)
    with monkeypatch.context() as patched:
        stop_after(patched, 14)
        train(folder="cut", **values)
    _, resumed, _ = train(folder="cut", **values)
    for name, parameter in straight.named_parameters():
        assert torch.equal(resumed.get_parameter(name), parameter), name
    assert losses(tmp_path, "straight")[-1] < losses(tmp_path, "straight")[0]


@pytest.mark.parametrize("optim", ["adam8bit", "adamw8bit", "lion8bit"])
def test_8_bit_moments_are_kept_and_saved_in_8_bits(train, tmp_path, wide_base, optim):
    need(optim)
    train(checkpoint=wide_base, optim=optim, epoch_count=1)
    (point,) = (tmp_path / "run" / "resume").iterdir()
    saved = torch.load(point / "tensors.pth", weights_only=True)
    moments = {name: tensor for name, tensor in saved.items() if name.endswith((".state1", ".state2"))}
    large = {name for name, tensor in moments.items() if tensor.numel() >= 4096}
    assert large
    assert {name for name, tensor in moments.items() if tensor.dtype == torch.uint8} == large


def test_paged_moments_that_come_back_keep_their_place_and_values():
    pytest.importorskip("bitsandbytes")
    from rwkvpeft.training.optimizers.eight_bit import bitsandbytes, paged_class

    kind = paged_class(bitsandbytes().optim.PagedAdam8bit)
    # the package's stand-in for paged memory on a CPU, where users are refused
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(64, 64)), nn.Parameter(torch.randn(4))]
        first, second = kind(weights), kind(weights)
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        first.step()
        first.step()
        second.load_state_dict(first.state_dict())
    for weight in weights:
        assert second.state[weight]["step"] == 2
        assert isinstance(second.state[weight]["step"], int)
        for key in ("state1", "state2"):
            assert torch.equal(second.state[weight][key], first.state[weight][key])
            assert second.state[weight][key].data_ptr() != first.state[weight][key].data_ptr()


def parameter(*shape):
    return nn.Parameter(torch.ones(shape))


def test_muon_trains_the_matrices_and_adam_everything_else():
    need("muon")
    matrices = {
        "blocks.0.att.key.weight": parameter(8, 8),
        "blocks.0.att.w1": parameter(8, 2),
        "blocks.0.ffn.key.lora_A": parameter(2, 8),
    }
    others = {
        "emb.weight": parameter(13, 8),
        "head.weight": parameter(13, 8),
        "ln_out.weight": parameter(8),
        "blocks.0.att.x_r": parameter(1, 1, 8),
        "blocks.0.att.w0": parameter(1, 1, 8),
        "blocks.0.att.r_k": parameter(2, 4),
        "blocks.0.att.time_decay": parameter(2, 4),
        "blocks.0.att.time_state": parameter(2, 4, 4),
        "blocks.0.att.key.scale": parameter(8, 1),
    }
    optimizer = build("muon", {**others, **matrices})
    muon, adam = optimizer.parts
    assert isinstance(muon, torch.optim.Muon)
    assert {name for group in muon.param_groups for name in group["names"]} == set(matrices)
    assert {name for group in adam.param_groups for name in group["names"]} == set(others)
    assert {group["lr_scale"] for group in adam.param_groups} == {1.0, 2.0}


def test_muon_and_adam_are_driven_and_restored_as_one():
    need("muon")
    parameters = {"a.weight": parameter(4, 4), "ln.weight": parameter(4)}
    optimizer = build("muon", parameters)
    optimizer.load_state_dict(optimizer.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for value in parameters.values():
        value.grad = torch.randn_like(value)
    optimizer.step()
    assert not (parameters["a.weight"] == 1).any()
    assert not (parameters["ln.weight"] == 1).any()
    assert set(optimizer.state) == set(parameters.values())


def test_muons_steps_have_the_size_of_adams():
    need("muon")
    sizes = {}
    for name in ("muon", "adam"):
        torch.manual_seed(0)
        weight = parameter(64, 48)
        optimizer = build(name, {"a.weight": weight})
        for group in optimizer.param_groups:
            group["lr"] = 1.0
        weight.grad = torch.randn_like(weight)
        optimizer.step()
        sizes[name] = (weight - 1).square().mean().sqrt().item()
    assert 0.1 < sizes["muon"] / sizes["adam"] < 1


def test_muon_with_nothing_but_states_is_refused(train):
    need("muon")
    with pytest.raises(UserError, match="nothing of what is trained here is a matrix"):
        train(peft="state", optim="muon")


def test_a_pytorch_without_muon_is_told_which_has_it(train, monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(UserError) as caught:
        train(optim="muon")
    assert "2.9" in caught.value.expected


def test_schedule_free_checkpoints_hold_the_average_and_resume_points_the_training_weights(train, tmp_path):
    need("schedule_free")
    _, model, _ = train(optim="schedule_free", epoch_count=2, epoch_save=1)
    average = load_tensors(tmp_path / "run" / "rwkv-1.pth")
    point = torch.load(tmp_path / "run" / "resume" / "step-00000008" / "tensors.pth", weights_only=True)
    name = "blocks.1.ffn.key.weight"
    fast, trained = point[f"optim.{name}.z"], point[f"param.{name}"]
    assert torch.equal(average[name], model.get_parameter(name).detach())
    torch.testing.assert_close(trained, average[name].lerp(fast, 0.1))
    assert not torch.equal(trained, average[name])


def test_saving_an_average_leaves_no_trace_in_a_schedule_free_run(train, tmp_path):
    need("schedule_free")
    _, seldom, _ = train(folder="seldom", optim="schedule_free", epoch_count=3, epoch_save=0)
    _, often, _ = train(folder="often", optim="schedule_free", epoch_count=3, epoch_save=1)
    for name, value in seldom.named_parameters():
        assert torch.equal(often.get_parameter(name), value), name


def test_schedule_free_keeps_its_rate_after_the_warm_up_and_says_so(train, tmp_path):
    need("schedule_free")
    _, _, lines = train(optim="schedule_free", warmup_steps=4)
    rates = [json.loads(line)["lr"] for line in (tmp_path / "run" / "loss_data.jsonl").read_text().splitlines()]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[4:] == [1e-2] * 4
    assert any("--lr_final are not used" in line for line in lines)


def test_schedule_free_without_a_first_beta_is_refused():
    need("schedule_free")
    with pytest.raises(UserError, match="--beta1 above 0"):
        build("schedule_free", {"a.weight": parameter(4, 4)}, beta1=0.0)


def test_adafactor_moves_what_starts_at_zero_as_adam_does():
    moved = {}
    for name in ("adafactor", "adam"):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.zeros(8, 8))
        optimizer = build(name, {"a.lora_B": weight})
        optimizer.param_groups[0]["lr"] = 1e-3
        weight.grad = torch.randn_like(weight)
        optimizer.step()
        moved[name] = weight.abs().mean().item()
    assert moved["adafactor"] == pytest.approx(moved["adam"], rel=0.5)


@pytest.mark.parametrize("optim", PAGED)
def test_paged_optimizers_without_an_nvidia_gpu_name_the_one_to_use(optim):
    with pytest.raises(UserError, match=optim) as caught:
        find_optimizer(optim).check("cpu")
    assert caught.value.fix == f"--optim {optim.removeprefix('paged_')}"


def test_where_bitsandbytes_has_no_program_adam_is_named():
    with pytest.raises(UserError, match="mps") as caught:
        find_optimizer("adam8bit").check("mps")
    assert caught.value.fix == "--optim adam"


@pytest.mark.parametrize(("optim", "extra"), [("lion", "bnb"), ("adam8bit", "bnb"), ("schedule_free", "schedulefree")])
def test_a_missing_package_is_named_with_what_installs_it(monkeypatch, optim, extra):
    monkeypatch.setattr(contract, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        find_optimizer(optim).check("cpu")
    assert f"pip install 'rwkvpeft[{extra}]'" in caught.value.fix


def test_a_bitsandbytes_that_is_too_old_for_a_cpu_is_refused_there(monkeypatch):
    package = pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(package, "__version__", "0.49.2")
    with pytest.raises(UserError, match="for GPUs alone"):
        find_optimizer("lion").check("cpu")
    find_optimizer("lion").check("cuda")


def test_adam_mini_is_refused_with_the_reason():
    with pytest.raises(UserError, match="names of transformers"):
        parse_train(["--optim", "adam_mini"])


@pytest.mark.slow
def test_bitsandbytes_comes_without_a_word():
    pytest.importorskip("bitsandbytes")
    script = "from rwkvpeft.training.optimizers.eight_bit import bitsandbytes; bitsandbytes()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
