"""How the rows of an optimizer step are dealt out decides nothing, also where a run goes on in another way."""

from __future__ import annotations

import itertools
import json
import shutil

import pytest
import torch

from rwkvpeft.errors import UserError

from .conftest import random_checkpoint
from .split_runs import RUNS, UNEVEN, do_runs, job

STOP = 4


def layouts(method):
    return RUNS[method][0]


def is_shared(method, layout):
    return layouts(method)[layout].get("devices", 1) > 1


# the rest of the law's cases are tried with the drills
METHODS = [pytest.param(method, marks=() if method in ("full", "infctx") else pytest.mark.faults) for method in RUNS]
WAYS = [
    pytest.param(method, *way, marks=param.marks)
    for param in METHODS
    for method in param.values
    for way in itertools.product(layouts(method), repeat=2)
]
LAYOUTS = [
    pytest.param(method, layout, marks=param.marks)
    for param in METHODS
    for method in param.values
    for layout in layouts(method)
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder with a method's runs, undisturbed in each layout, and begun in each and ended in each."""
    made = {}

    def runs_of(method):
        if method not in made:
            made[method] = tmp_path_factory.mktemp("runs")
            random_checkpoint(made[method] / "base.pth", n_layer=2, n_embd=16)
            do_all(method, made[method])
        return made[method]

    return runs_of


def do_all(method, folder):
    for shared in (False, True):
        some = [layout for layout in layouts(method) if is_shared(method, layout) == shared]
        straight = [job(method, layout, f"straight {method} {layout}") for layout in some]
        do_runs(folder, straight + [job(method, layout, f"begun {method} {layout}", stop=STOP) for layout in some])
    ways = list(itertools.product(layouts(method), repeat=2))
    for begun, ended in ways:
        shutil.copytree(folder / f"begun {method} {begun}", folder / f"{method} {begun} to {ended}")
    for shared in (False, True):
        some = [way for way in ways if is_shared(method, way[1]) == shared]
        do_runs(folder, [job(method, ended, f"{method} {begun} to {ended}") for begun, ended in some])


def records(folder, name):
    return [json.loads(line) for line in (folder / name / "loss_data.jsonl").read_text().splitlines()]


def rows_of_steps(folder, name):
    """What each optimizer step was trained on, by all processes together, in no order."""
    found = {}
    for path in (folder / name).glob("rows-*.jsonl"):
        for step, row in map(json.loads, path.read_text().splitlines()):
            found.setdefault(step, []).append(row)
    return {step: sorted(rows) for step, rows in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("method", "begun", "ended"), WAYS)
def test_a_run_goes_on_in_any_layout_with_the_same_rows_and_losses(runs, method, begun, ended):
    name, first = f"{method} {begun} to {ended}", f"straight {method} 1x8"
    runs = runs(method)
    assert rows_of_steps(runs, name) == rows_of_steps(runs, first)
    pairs = zip(records(runs, name), records(runs, first), strict=True)
    for left, right in pairs:
        assert left["loss"] == pytest.approx(right["loss"], rel=2e-5), left["step"]
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=2e-3)
        assert [left[key] for key in ("step", "epoch", "lr", "weight", "tokens")] == [
            right[key] for key in ("step", "epoch", "lr", "weight", "tokens")
        ]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "layout"), LAYOUTS)
def test_in_the_same_layout_a_run_goes_on_bit_for_bit(runs, method, layout):
    straight, resumed = runs(method) / f"straight {method} {layout}", runs(method) / f"{method} {layout} to {layout}"
    left, right = (torch.load(folder / "rwkv-1.pth", weights_only=True) for folder in (straight, resumed))
    assert left.keys() == right.keys()
    assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_run_told_to_end_inside_of_a_step_ends_behind_it(runs, method):
    for layout in layouts(method):
        newest = sorted((runs(method) / f"begun {method} {layout}" / "resume").glob("step-*"))[-1]
        progress = json.loads((newest / "resume.json").read_text())["progress"]
        assert progress["step"] == STOP
        assert progress["rows"] == (20 if layouts(method) is UNEVEN else 24) + 8


@pytest.mark.slow
def test_processes_that_find_different_points_do_not_train_together(tmp_path):
    random_checkpoint(tmp_path / "base.pth", n_layer=2, n_embd=16)
    do_runs(tmp_path, [job("full", "8x1", "alone-0", stop=STOP)])
    with pytest.raises(AssertionError, match=r"found different resume points\n.*steps 0, 4"):
        do_runs(tmp_path, [job("full", "two processes x 4", "alone-{rank}")])


SPLIT = {"epoch_steps": 8, "accumulate_grad_batches": 2, "micro_bsz": 2, "epoch_count": 1, "save_steps": 2}
DROPOUT = {"peft": "lora", "peft_config": {"r": 2, "lora_dropout": 0.1}}


def begin(train, monkeypatch, **values):
    """Train two of four steps."""
    from rwkvpeft.training.module import RwkvModule

    finish = RwkvModule._finish_step

    def finish_and_stop(self, *args):
        finish(self, *args)
        if self.progress.step == 3:
            raise RuntimeError("power cut")

    with monkeypatch.context() as patched:
        patched.setattr(RwkvModule, "_finish_step", finish_and_stop)
        with pytest.raises(RuntimeError, match="power cut"):
            train(**SPLIT, **values)


def test_a_split_that_does_not_fit_is_refused_with_the_flags_that_do(train, monkeypatch):
    begin(train, monkeypatch)
    with pytest.raises(UserError, match="cannot go on") as caught:
        train(**{**SPLIT, "micro_bsz": 1})
    assert caught.value.fix.startswith("--accumulate_grad_batches 4 --epoch_steps 16;")
    result, _, _ = train(**{**SPLIT, "micro_bsz": 1, "accumulate_grad_batches": 4, "epoch_steps": 16})
    assert result.steps == 4


@pytest.mark.parametrize(
    ("values", "told"),
    [(DROPOUT, "what dropout draws"), ({"neftune_alpha": 5.0}, "--neftune_alpha draw"), ({}, None)],
)
def test_where_noise_is_drawn_for_each_batch_a_run_dealt_out_otherwise_says_so(train, monkeypatch, values, told):
    begin(train, monkeypatch, **values)
    _, _, lines = train(**{**SPLIT, "micro_bsz": 4, "accumulate_grad_batches": 1, "epoch_steps": 4}, **values)
    found = [line for line in lines if line.startswith("rows were dealt out otherwise")]
    assert [told in line for line in found] == ([True] if told else [])
