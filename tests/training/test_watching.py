"""Evaluation while training, through the real trainer: what is found, kept, told and left alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rwkvpeft.adapters.build import build_adapter
from rwkvpeft.checkpoints.adapter import load_recipe
from rwkvpeft.checkpoints.files import load_tensors
from rwkvpeft.checkpoints.load import load_model
from rwkvpeft.data.loader import evaluation_batches
from rwkvpeft.data.prompts import Prompt
from rwkvpeft.objectives.evaluation import evaluate
from rwkvpeft.training.callbacks.watching import Watched

from .conftest import Rows
from .test_fit import FULL, LORA, STATE, UNEVEN, after_step, crash, terminate, trained


class HeldOut(Rows):
    """Rows that are also evaluated; the same as are trained, but in another number."""

    joining = "equal"

    def row(self, index):
        return self.rows[index]


def lines_of(tmp_path, name="val_data.jsonl", folder="run"):
    return [json.loads(line) for line in (tmp_path / folder / name).read_text().splitlines()]


def test_the_untouched_base_comes_first_then_every_so_many_steps_and_the_end(train, tmp_path, base):
    held_out = HeldOut(5)
    result, model, lines = train(watched=Watched(held_out, micro_bsz=2), val_steps=3)
    found = lines_of(tmp_path)
    assert [line["step"] for line in found] == [0, 3, 6, 8]
    fresh = load_model(base, dtype=torch.float32)
    assert found[0]["val_loss"] == pytest.approx(evaluate(fresh, evaluation_batches(held_out, 5)).loss, rel=1e-6)
    assert found[-1]["val_loss"] == pytest.approx(evaluate(model, evaluation_batches(held_out, 5)).loss, rel=1e-6)
    assert [record.val_loss for record in result.history.records] == [line["val_loss"] for line in found]
    assert sum("held-out loss" in line for line in lines) == 4


@pytest.mark.parametrize("method", [FULL, LORA, STATE, {**LORA, "optim": "schedule_free"}])
def test_a_watched_run_trains_the_same_weights_bit_for_bit(train, method):
    if "optim" in method:
        pytest.importorskip("schedulefree")
    prompts = [Prompt("ab", "ab")]
    watched = Watched(HeldOut(5), HeldOut(3), micro_bsz=2, prompts=prompts, answers_each_time=True, answer=draws)
    _, alone, _ = train(folder="alone", dropout=0.1, neftune_alpha=5.0, **method)
    _, model, _ = train(folder="watched", dropout=0.1, neftune_alpha=5.0, watched=watched, val_steps=1, **method)
    for name, parameter in trained(alone).items():
        assert torch.equal(model.get_parameter(name), parameter), name


def draws(model, text):
    """An answer that takes random numbers, of a model that is at rest."""
    assert not any(module.training for module in model.modules())
    return f"{torch.rand(())}"


@pytest.mark.parametrize(("method", "stop"), [(FULL, 3), (LORA, 4)])
def test_a_resumed_watched_run_ends_as_an_uninterrupted_one(train, tmp_path, monkeypatch, method, stop):
    watched = Watched(HeldOut(5), HeldOut(3), micro_bsz=2, prompts=[Prompt("a", "a")], answers_each_time=True,
                      answer=lambda model, text: f"{model.emb.weight.sum().item():.9f}")
    values = {**UNEVEN, **method, "watched": watched, "val_steps": 2}
    straight, _, _ = train(folder="straight", **values)
    with monkeypatch.context() as patched:
        after_step(patched, stop, terminate)
        assert train(folder="cut", **values)[0].stopped_early
    resumed, _, lines = train(folder="cut", **values)
    assert not any(line.startswith("base model") for line in lines)
    keys = ("step", "val_loss", "general_loss", "best")
    left, right = ([[line[key] for key in keys] for line in lines_of(tmp_path, folder=f)] for f in ("cut", "straight"))
    assert left == right
    assert lines_of(tmp_path, "samples.jsonl", "cut") == lines_of(tmp_path, "samples.jsonl", "straight")
    assert resumed.history.best.step == straight.history.best.step
    left, right = (load_tensors(tmp_path / folder / "rwkv-best.pth") for folder in ("cut", "straight"))
    assert all(torch.equal(left[name], tensor) for name, tensor in right.items())


def test_after_a_crash_later_evaluations_are_dropped_and_made_again(train, tmp_path, monkeypatch):
    values = {**UNEVEN, "watched": Watched(HeldOut(5)), "val_steps": 1}
    train(folder="straight", **values)
    with monkeypatch.context() as patched:
        after_step(patched, 7, crash)
        with pytest.raises(RuntimeError, match="power cut"):
            train(folder="cut", save_steps=3, **values)
    with (tmp_path / "cut" / "val_data.jsonl").open("a") as file:
        file.write('{"step": 7, "val_loss": 0')
    train(folder="cut", save_steps=3, **values)
    left, right = ([line["val_loss"] for line in lines_of(tmp_path, folder=f)] for f in ("cut", "straight"))
    assert left == right


def worsening(monkeypatch, losses):
    """Let the evaluations, that of the base included, find these losses."""
    found = iter(losses)
    monkeypatch.setattr("rwkvpeft.training.callbacks.watching.add_up", lambda *_, **__: (next(found), 1.0))


def test_the_best_checkpoint_is_replaced_only_by_a_better_one_and_carries_its_recipe(train, tmp_path, monkeypatch):
    worsening(monkeypatch, [1.0, 4.0, 2.0, 3.0, 2.5])
    result, _, _ = train(watched=Watched(HeldOut()), val_steps=2, **LORA)
    assert [line["best"] for line in lines_of(tmp_path)] == [False, True, True, False, False]
    recipe = load_recipe(tmp_path / "run" / "rwkv-best.pth")
    assert (recipe.step, recipe.val_loss, recipe.method) == (4, 2.0, "lora")
    assert result.history.is_overfitted
    assert result.history.excess == pytest.approx(0.5)
    best, last = (load_tensors(tmp_path / "run" / name) for name in ("rwkv-best.pth", "rwkv-1.pth"))
    assert best.keys() == last.keys()
    assert not all(torch.equal(best[name], last[name]) for name in best)


def test_a_run_ends_early_when_the_held_out_loss_no_longer_falls_and_stays_ended(train, tmp_path, monkeypatch):
    worsening(monkeypatch, [9.0, 4.0, 3.0, 3.0, 3.5, 0.0, 0.0, 0.0, 0.0])
    result, _, lines = train(watched=Watched(HeldOut()), val_steps=1, early_stop=2)
    assert (result.steps, result.gave_up, result.stopped_early) == (4, True, False)
    assert any("has not fallen in 2 evaluations" in line for line in lines)
    again, _, lines = train(watched=Watched(HeldOut()), val_steps=1, early_stop=2)
    assert (again.steps, again.gave_up) == (4, True)
    assert any("a larger --early_stop goes on" in line for line in lines)
    further, _, _ = train(watched=Watched(HeldOut()), val_steps=1, early_stop=4)
    assert (further.steps, further.gave_up) == (8, False)


def test_forgetting_is_told_once_for_each_time_it_grows_too_large(train, monkeypatch):
    worsening(monkeypatch, [1.0, 1.04, 1.2, 1.3, 1.0, 1.2])
    _, _, lines = train(watched=Watched(general=HeldOut()), val_steps=1, epoch_steps=5, epoch_count=1,
                        general_data_file="texts", general_alarm=0.05)
    assert sum("the model forgets" in line for line in lines) == 2


def test_the_base_of_a_run_from_an_adapter_file_is_the_model_without_it(train, tmp_path):
    calls = []

    class Untuned:
        def __init__(self, model):
            pass

        def __enter__(self):
            calls.append("off")

        def __exit__(self, *_):
            calls.append("on")

    train(watched=Watched(prompts=[Prompt("a", "a")], untuned=Untuned, answer=lambda *_: calls.append("asked") or ""))
    assert calls == ["off", "asked", "on", "asked"]


def test_rows_longer_than_a_chunk_are_evaluated_to_the_same_loss(base):
    model = load_model(base, dtype=torch.float64)
    held_out = HeldOut(4, length=11)
    whole = evaluate(model, evaluation_batches(held_out, 2))
    chunked = evaluate(model, evaluation_batches(held_out, 2), chunk=4)
    assert chunked.loss == pytest.approx(whole.loss, rel=1e-9)
    assert chunked.tokens == whole.tokens


def test_the_adapter_switched_off_is_the_base(base):
    adapter = build_adapter("lora", {"r": 2}, ["time", "ln"])
    model = load_model(base, dtype=torch.float32)
    batches = list(evaluation_batches(HeldOut(4), 2))
    before = evaluate(model, batches).loss
    adapter.attach(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    assert evaluate(model, batches).loss != before
    with adapter.disabled(model):
        assert evaluate(model, batches).loss == before


def test_the_log_of_mini_epochs_and_wandb_have_the_held_out_loss(train, tmp_path, monkeypatch):
    sent = []
    wandb = SimpleNamespace(log=lambda line, step: sent.append((step, line)), finish=lambda: None)
    monkeypatch.setattr("rwkvpeft.training.callbacks.metrics.start_wandb", lambda *_: wandb)
    train(watched=Watched(HeldOut(5)), wandb="project")
    found = {line["step"]: line["val_loss"] for line in lines_of(tmp_path)}
    assert {step: line["val_loss"] for step, line in sent if "val_loss" in line} == found
    for line, step in zip((tmp_path / "run" / "train_log.txt").read_text().splitlines(), (4, 8), strict=True):
        assert line.endswith(f" val_loss {found[step]:.6f}")


@pytest.mark.slow
def test_two_processes_share_an_evaluation_and_find_what_one_finds(tmp_path):
    """Each runs the trainer on rows of its own; the held-out rows do not divide evenly among them."""
    script = tmp_path / "run.py"
    script.write_text(TWO_PROCESSES.format(root=str(ROOT), folder=str(tmp_path)))
    losses = []
    for devices in (1, 2):
        done = subprocess.run(
            [sys.executable, str(script), str(devices)], capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, done.stderr
        losses.append(lines_of(tmp_path, folder=f"run{devices}")[0])
    assert losses[0]["step"] == losses[1]["step"] == 0
    assert losses[1]["val_loss"] == pytest.approx(losses[0]["val_loss"], rel=1e-6)


ROOT = Path(__file__).parents[2]
TWO_PROCESSES = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.training.conftest import random_checkpoint, settings
from tests.training.test_watching import HeldOut
from rwkvpeft.checkpoints.adapter import Recipe
from rwkvpeft.checkpoints.load import load_model
from rwkvpeft.data.datamodule import TrainingData
from rwkvpeft.training.callbacks.watching import Watched
from rwkvpeft.training.fit import fit
import torch

if __name__ == "__main__":
    torch.set_num_threads(1)
    devices = int(sys.argv[1])
    folder = Path({folder!r})
    base = folder / f"base{{devices}}.pth"
    if not base.exists():
        random_checkpoint(base, n_layer=1, n_embd=16)
    config = settings(load_model=str(base), proj_dir=str(folder / f"run{{devices}}"), devices=devices, epoch_steps=1,
                      epoch_count=1, strategy="ddp" if devices > 1 else "auto")
    data = TrainingData(HeldOut(), schedule=config.schedule, data=config.data, seed=5)
    fit(model=load_model(base, dtype=torch.float32), adapter=None, data=data, config=config,
        recipe=Recipe(method="none"), report=print, watched=Watched(HeldOut(5), micro_bsz=1))
"""
