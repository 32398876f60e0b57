"""Whole runs: what an optimizer step is worth, files, and how a run ends."""

from __future__ import annotations

import json
import math
import signal
import time

import pytest
import torch

from rwkvpeft.adapters.base import Rates
from rwkvpeft.checkpoints.adapter import load_adapter, load_recipe
from rwkvpeft.checkpoints.files import load_tensors
from rwkvpeft.errors import UserError
from rwkvpeft.training.module import RwkvModule
from rwkvpeft.training.schedules import cosine
from rwkvpeft.training.stopping import StopSignals

FULL = {"peft": "none"}
LORA = {"peft": "lora", "peft_config": {"r": 2, "lora_dropout": 0.3}, "train_parts": ["time", "ln"]}
STATE = {"peft": "state", "lr_init": 1.0, "lr_final": 0.1}


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def log(tmp_path, folder="run"):
    return [json.loads(line) for line in (tmp_path / folder / "loss_data.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("optim", [{"logit_penalty": 0.3}, {"logit_penalty": 0.0, "weight_decay": 0.1}])
def test_eight_micro_batches_of_one_row_train_like_one_of_eight(train, tmp_path, optim):
    _, small, _ = train(folder="small", micro_bsz=1, accumulate_grad_batches=8, epoch_steps=24, epoch_count=1, **optim)
    _, large, _ = train(folder="large", micro_bsz=8, accumulate_grad_batches=1, epoch_steps=3, epoch_count=1, **optim)
    for name, parameter in trained(large).items():
        torch.testing.assert_close(small.get_parameter(name), parameter, rtol=1e-4, atol=2e-6, msg=name)
    for left, right in zip(log(tmp_path, "small"), log(tmp_path, "large"), strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-5)
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-4)
        assert left["weight"] == right["weight"]


def test_a_short_last_group_is_a_mean_over_its_own_tokens(train, tmp_path):
    train(folder="grouped", micro_bsz=1, accumulate_grad_batches=2, epoch_steps=3, epoch_count=1, logit_penalty=0.3)
    train(folder="single", micro_bsz=1, accumulate_grad_batches=1, epoch_steps=1, epoch_count=1, logit_penalty=0.3)
    steps = log(tmp_path, "grouped")
    assert len(steps) == 2
    assert [step["tokens"] for step in steps] == [12, 6]


def after_step(monkeypatch, step, action):
    """Do something when an optimizer step has just been taken."""
    finish = RwkvModule._finish_step

    def finish_and_act(self, *args):
        finish(self, *args)
        if self.progress.step == step:
            action()

    monkeypatch.setattr(RwkvModule, "_finish_step", finish_and_act)


def terminate():
    signal.raise_signal(signal.SIGTERM)


def crash():
    raise RuntimeError("power cut")


# ten batches a mini-epoch in groups of three: steps of 3, 3, 3 and 1 batches
UNEVEN = {"epoch_steps": 10, "epoch_count": 2, "accumulate_grad_batches": 3, "dropout": 0.1}


@pytest.mark.parametrize(("method", "stop"), [(FULL, 3), (LORA, 3), (LORA, 4), (STATE, 5)])
def test_a_resumed_run_ends_with_the_same_weights_bit_for_bit(train, tmp_path, monkeypatch, method, stop):
    values = {**UNEVEN, **method, "weight_decay": 0.1, "weight_decay_final": 0.0}
    _, straight, _ = train(folder="straight", **values)
    with monkeypatch.context() as patched:
        after_step(patched, stop, terminate)
        first, _, _ = train(folder="cut", **values)
    assert (first.stopped_early, first.steps) == (True, stop)
    second, resumed, lines = train(folder="cut", **values)
    assert (second.stopped_early, second.steps) == (False, 8)
    assert any("going on from" in line for line in lines)
    for name, parameter in trained(straight).items():
        assert torch.equal(resumed.get_parameter(name), parameter), name
    assert [line["loss"] for line in log(tmp_path, "cut")] == [line["loss"] for line in log(tmp_path, "straight")]
    left, right = ((tmp_path / folder / "train_log.txt").read_text().splitlines() for folder in ("cut", "straight"))
    assert [line.split()[:4] for line in left] == [line.split()[:4] for line in right]


def test_after_a_crash_the_run_goes_on_from_the_last_point_and_drops_later_lines(train, tmp_path, monkeypatch):
    _, straight, _ = train(folder="straight", **UNEVEN)
    with monkeypatch.context() as patched:
        after_step(patched, 7, crash)
        with pytest.raises(RuntimeError, match="power cut"):
            train(folder="cut", save_steps=3, **UNEVEN)
    assert len(log(tmp_path, "cut")) == 6
    with (tmp_path / "cut" / "loss_data.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": 0}\n{"step": 8, "lo')
    _, resumed, _ = train(folder="cut", save_steps=3, **UNEVEN)
    for name, parameter in trained(straight).items():
        assert torch.equal(resumed.get_parameter(name), parameter), name
    assert [line["loss"] for line in log(tmp_path, "cut")] == [line["loss"] for line in log(tmp_path, "straight")]


def test_fp16_scales_its_loss_and_resumes_with_the_scale(train, monkeypatch):
    values = {"precision": "fp16", "peft": "lora", "peft_config": {"r": 2}}
    _, straight, _ = train(folder="straight", **values)
    with monkeypatch.context() as patched:
        after_step(patched, 3, terminate)
        train(folder="cut", **values)
    result, resumed, _ = train(folder="cut", **values)
    assert result.steps == 8
    for name, parameter in trained(straight).items():
        assert parameter.dtype == torch.float32
        assert torch.equal(resumed.get_parameter(name), parameter), name


def test_bf16_trains_fp32_parameters_on_frozen_bf16_ones(train):
    result, model, _ = train(precision="bf16", peft="lora", peft_config={"r": 2})
    dtypes = {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad}
    assert dtypes == {torch.bfloat16}
    assert {parameter.dtype for parameter in trained(model).values()} == {torch.float32}
    assert math.isfinite(result.final_loss)


def test_training_lowers_the_loss(train, tmp_path):
    train(epoch_steps=12, epoch_count=8, lr_final=1e-2)
    losses = [float(line.split()[1]) for line in (tmp_path / "run" / "train_log.txt").read_text().splitlines()]
    assert losses[-1] < losses[0] - 0.5


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(train):
    with pytest.raises(UserError, match="diverged at step"):
        train(lr_init=1e30, lr_final=1e30, grad_clip=0.0, epoch_count=3)


def test_full_training_saves_the_whole_model_every_epoch_save_mini_epochs_and_at_the_end(train, tmp_path, base):
    train(epoch_count=4, epoch_save=2)
    assert sorted(path.name for path in (tmp_path / "run").glob("rwkv-*.pth")) == [
        "rwkv-0.pth", "rwkv-2.pth", "rwkv-3.pth",
    ]
    saved = load_tensors(tmp_path / "run" / "rwkv-3.pth")
    assert saved.keys() == load_tensors(base).keys()
    assert load_recipe(tmp_path / "run" / "rwkv-3.pth").step == 16


def test_a_merged_run_saves_the_model_and_the_adapter_beside_it(train, tmp_path, base):
    train(peft="lora", peft_config={"r": 2}, merge=1, epoch_count=1)
    adapter, recipe = load_adapter(tmp_path / "run" / "rwkv-0-adapter.pth")
    assert recipe.method == "lora"
    assert any(name.endswith("lora_A") for name in adapter)
    assert load_tensors(tmp_path / "run" / "rwkv-0.pth").keys() == load_tensors(base).keys()


def test_mini_epochs_are_numbered_from_epoch_begin_and_my_exit_ends_the_run(train, tmp_path):
    result, _, _ = train(epoch_begin=7, epoch_count=5, my_exit=8)
    assert result.steps == 8
    assert sorted(path.name for path in (tmp_path / "run").glob("rwkv-*.pth")) == ["rwkv-7.pth", "rwkv-8.pth"]


def test_what_a_killed_run_left_unfinished_is_cleared_up(train, tmp_path):
    left = tmp_path / "run" / ".rwkv-0.partial-77-abcd.pth"
    left.parent.mkdir()
    left.write_bytes(b"half")
    train(epoch_count=1)
    assert not left.exists()


def test_a_finished_run_is_not_trained_again(train):
    train()
    result, _, lines = train()
    assert result.steps == 8
    assert any("complete" in line for line in lines)


def test_other_settings_cannot_go_on_with_a_run_and_are_named(train):
    train(epoch_count=1)
    with pytest.raises(UserError, match="other settings") as caught:
        train(epoch_count=1, lr_init=0.5, ctx_len=7)
    assert "lr_init 0.5" in caught.value.found
    assert "ctx_len 6" in caught.value.expected


def test_a_run_cannot_go_on_with_another_divisor_of_its_norms(train):
    train(epoch_count=1)
    with pytest.raises(UserError, match="other settings") as caught:
        train(epoch_count=1, head_size_divisor=4)
    assert "head_size_divisor 4" in caught.value.found


def test_resume_none_starts_anew(train, tmp_path):
    train(epoch_count=1)
    result, _, _ = train(epoch_count=1, resume="none", lr_init=0.5)
    assert result.steps == 4
    assert len(log(tmp_path)) == 4
    assert [path.name for path in (tmp_path / "run" / "resume").iterdir()] == ["step-00000004"]


def test_a_broken_resume_point_is_passed_over(train, tmp_path):
    _, straight, _ = train(folder="straight")
    train()
    newest = max((tmp_path / "run" / "resume").iterdir())
    (newest / "tensors.pth").write_bytes(b"PK" + bytes(50))
    _, resumed, lines = train()
    assert any("broken" in line for line in lines)
    for name, parameter in trained(straight).items():
        assert torch.equal(resumed.get_parameter(name), parameter), name


def test_a_second_interrupt_aborts(train, monkeypatch):
    def twice():
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.3)
        signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    after_step(monkeypatch, 2, twice)
    with pytest.raises(KeyboardInterrupt):
        train()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_line_that_cannot_be_written_within_a_signal_ends_no_run():
    def refuse(line):
        raise RuntimeError("reentrant call inside a writer of bytes")

    with StopSignals(refuse) as signals:
        signal.raise_signal(signal.SIGTERM)
    assert signals.asked


def test_lightning_adds_no_words_of_its_own(train, capfd, recwarn):
    train(epoch_count=1)
    written = capfd.readouterr()
    assert (written.out, written.err) == ("", "")
    assert not [warning for warning in recwarn if "lightning" in warning.filename]


def rates_of(monkeypatch):
    """The learning rate and weight decay of each trained parameter in each step."""
    seen = []
    finish = RwkvModule._finish_step

    def finish_and_look(self, *args):
        finish(self, *args)
        groups = self.trainer.optimizers[0].param_groups
        seen.append({name: (group["lr"], group["weight_decay"]) for group in groups for name in group["names"]})

    monkeypatch.setattr(RwkvModule, "_finish_step", finish_and_look)
    return seen


def test_tensors_with_rates_of_their_own_follow_the_runs_schedule_between_them(train, monkeypatch):
    own = {
        "blocks.0.att.key.lora_A": Rates(2e-2, 1e-3, 0.3),
        "blocks.0.att.key.lora_B": Rates(lr_init=0.0, lr_final=0.0),
    }
    monkeypatch.setattr("rwkvpeft.adapters.base.Adapter.rates", lambda self, name: own.get(name))
    seen = rates_of(monkeypatch)
    values = {**LORA, "warmup_steps": 3, "weight_decay": 0.1, "weight_decay_final": 0.0}
    _, model, _ = train(**values)
    ends = {"total_steps": 8, "warmup_steps": 3}
    expected = [cosine(step, lr_init=2e-2, lr_final=1e-3, **ends) for step in range(8)]
    others = [cosine(step, lr_init=1e-2, lr_final=1e-3, **ends) for step in range(8)]
    assert [step["blocks.0.att.key.lora_A"] for step in seen] == [(rate, 0.3) for rate in expected]
    assert [step["blocks.1.att.key.lora_A"] for step in seen] == [(rate, 0.0) for rate in others]
    assert not model.get_parameter("blocks.0.att.key.lora_B").any()
    assert model.get_parameter("blocks.1.att.key.lora_B").any()


def test_an_adapter_is_called_after_each_step_while_the_gradients_are_there(train, monkeypatch):
    calls = []

    def note(self, model, step, total_steps):
        gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
        calls.append((step, total_steps, all(gradient is not None for gradient in gradients)))

    monkeypatch.setattr("rwkvpeft.adapters.base.Adapter.after_step", note)
    train(**LORA, accumulate_grad_batches=2)
    assert calls == [(step, 4, True) for step in range(1, 5)]


def test_an_adapter_is_not_called_after_a_step_that_overflowed(train, monkeypatch):
    calls = []
    clip = RwkvModule.configure_gradient_clipping

    def overflow_once(self, *args, **kwargs):
        clip(self, *args, **kwargs)
        if self.progress.step == 1:
            self._norm, self.scaled_gradients = math.inf, True

    monkeypatch.setattr(RwkvModule, "configure_gradient_clipping", overflow_once)
    monkeypatch.setattr("rwkvpeft.adapters.base.Adapter.after_step", lambda _, model, step, total: calls.append(step))
    train(**LORA, epoch_count=1)
    assert calls == [1, 3, 4]
