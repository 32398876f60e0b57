"""Progress and metrics, apart from a run."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

from rwkvpeft.errors import UserError
from rwkvpeft.training.callbacks.metrics import draw_loss, start_wandb
from rwkvpeft.training.callbacks.progress import Progress
from rwkvpeft.training.module import RunPlan, RunProgress, RwkvModule
from rwkvpeft.training.step_record import StepRecord, loss_text


def record(step):
    return StepRecord(
        step=step, epoch=0, loss=2.5, lr=1e-3, weight_decay=0.0, t_cost=0.5, grad_norm=1.0, tokens=1000, weight=900.0
    )


@pytest.fixture
def module():
    module = RwkvModule.__new__(RwkvModule)
    module.__dict__.update(plan=RunPlan(10, 2, 1), progress=RunProgress(), finished=None)
    return module


def test_without_a_terminal_lines_come_every_few_seconds_and_at_the_end(module):
    lines = []
    progress = Progress(lines.append, on_terminal=False)
    trainer = SimpleNamespace(is_global_zero=True)
    for step in range(1, 21):
        module.__dict__["finished"] = record(step)
        progress.on_train_batch_end(trainer, module, None, None, step)
    assert len(lines) == 2
    assert "2,000 tokens/s" in lines[0]
    assert "0:00:10 left" in lines[0]
    assert lines[1].startswith("step 20/20")


def test_on_a_terminal_there_is_a_bar(module, capsys):
    progress = Progress(print, on_terminal=True)
    trainer = SimpleNamespace(is_global_zero=True)
    progress.on_train_start(trainer, module)
    module.__dict__["finished"] = record(1)
    progress.on_train_batch_end(trainer, module, None, None, 0)
    progress.teardown(trainer, module, "fit")
    assert "loss 2.5" in capsys.readouterr().err


def test_a_long_curve_is_drawn_thinned_out(tmp_path):
    data = tmp_path / "loss_data.jsonl"
    data.write_text("".join(json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in range(1, 5001)))
    draw_loss(data, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_run_goes_on_and_says_so_once(train, tmp_path, monkeypatch):
    monkeypatch.setattr("rwkvpeft.training.callbacks.metrics.find_spec", lambda name: None)
    _, _, lines = train()
    assert sum("matplotlib is missing" in line for line in lines) == 1
    assert not (tmp_path / "run" / "loss.png").exists()


def test_wandb_without_its_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr("rwkvpeft.training.callbacks.metrics.find_spec", lambda name: None)
    with pytest.raises(UserError, match="wandb"):
        start_wandb("project", tmp_path, {}, print)


def older_login():
    raise AssertionError("asks for a key")


def newer_login(known):
    return lambda prompt=None: known and not prompt


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("newer", [True, False])
def test_wandb_is_offline_without_a_key_and_never_asks(tmp_path, monkeypatch, known, newer):
    calls, lines = [], []
    fake = SimpleNamespace(
        Error=ConnectionError,
        api=SimpleNamespace(api_key="secret" if known else None),
        login=newer_login(known) if newer else older_login,
        init=lambda **values: calls.append(values),
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr("rwkvpeft.training.callbacks.metrics.find_spec", lambda name: object())
    start_wandb("project", tmp_path, {"lr": 1}, lines.append)
    assert calls[0]["mode"] == (None if known else "offline")
    assert bool(lines) == (not known)


def test_each_step_tells_the_most_memory_so_far(train, tmp_path):
    pytest.importorskip("resource")
    train(epoch_count=1)
    lines = [json.loads(line) for line in (tmp_path / "run" / "loss_data.jsonl").read_text().splitlines()]
    memory = [line["memory"] for line in lines]
    assert memory == sorted(memory)
    assert memory[0] > 50_000_000


@pytest.mark.parametrize(
    ("loss", "text"), [(1.23456, "1.2346"), (0.0, "0.0000"), (7.84e-9, "7.8e-09"), (-2e-8, "-2.0e-08")]
)
def test_a_loss_is_shown_with_its_size_where_its_decimals_would_all_be_0(loss, text):
    assert loss_text(loss) == text
