"""What a run writes and when, which of it stays, and what becomes of a disk that is full or gone."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import threading
from contextlib import ExitStack

import pytest
import torch

from rwkvpeft.checkpoints.adapter import load_recipe
from rwkvpeft.errors import UserError
from rwkvpeft.training.module import RwkvModule
from rwkvpeft.training.writer import Writer

from .full_disks import limited_file_size, read_only, small_disk

LORA = {"peft": "lora", "peft_config": {"r": 2, "lora_dropout": 0.0}}
EVERY = {"epoch_steps": 2, "epoch_save": 1}


def names(folder):
    return sorted(path.name for path in folder.glob("rwkv-*"))


def steps_of_points(folder):
    return [int(path.name.removeprefix("step-")) for path in sorted((folder / "resume").glob("step-*"))]


def each_step(monkeypatch, action):
    """Call ``action`` with the number of each optimizer step, when it has been taken and nothing of it saved."""
    finish = RwkvModule._finish_step

    def finish_and_act(self, *args):
        finish(self, *args)
        action(self.progress.step)

    monkeypatch.setattr(RwkvModule, "_finish_step", finish_and_act)


def after_step(monkeypatch, step, action):
    each_step(monkeypatch, lambda number: action() if number == step else None)


def tensors(path):
    return torch.load(path, weights_only=True)


def same(left, right):
    left, right = tensors(left), tensors(right)
    return left.keys() == right.keys() and all(torch.equal(tensor, right[name]) for name, tensor in left.items())


def test_the_newest_checkpoints_are_kept_and_what_others_wrote_stays(train, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("rwkv-77.pth", "rwkv-77.json", "rwkv-init.pth", "rwkv-best.pth"):
        (run / name).write_text("of somebody else")
    train(**EVERY, epoch_count=4, keep=2)
    assert names(run) == ["rwkv-2.json", "rwkv-2.pth", "rwkv-3.json", "rwkv-3.pth", "rwkv-77.json", "rwkv-77.pth",
                          "rwkv-best.pth", "rwkv-init.pth"]


def test_what_an_earlier_start_of_the_run_wrote_counts_too(train, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        after_step(patched, 4, lambda: signal.raise_signal(signal.SIGTERM))
        train(**EVERY, epoch_count=3, keep=0)
    assert names(tmp_path / "run") == ["rwkv-0.json", "rwkv-0.pth", "rwkv-1.json", "rwkv-1.pth"]
    train(**EVERY, epoch_count=3, keep=1)
    assert names(tmp_path / "run") == ["rwkv-2.json", "rwkv-2.pth"]


def test_a_run_that_goes_on_in_another_folder_removes_nothing_there(train, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        after_step(patched, 4, lambda: signal.raise_signal(signal.SIGTERM))
        train(**EVERY, epoch_count=3)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "rwkv-0.pth").write_text("of somebody else")
    train(**EVERY, epoch_count=3, keep=1, folder="other", resume=str(tmp_path / "run" / "resume"))
    assert names(tmp_path / "other") == ["rwkv-0.pth", "rwkv-2.json", "rwkv-2.pth"]


def test_checkpoints_by_steps_rotate_with_those_of_mini_epochs(train, tmp_path):
    train(epoch_steps=4, epoch_count=2, epoch_save=1, step_save=3, keep=3)
    assert [name for name in names(tmp_path / "run") if name.endswith(".pth")] == [
        "rwkv-0.pth", "rwkv-1.pth", "rwkv-step-6.pth"
    ]
    assert load_recipe(tmp_path / "run" / "rwkv-step-6.pth").step == 6


def test_the_last_mini_epoch_outlives_the_checkpoint_of_the_same_step(train, tmp_path):
    train(epoch_steps=2, epoch_count=2, epoch_save=1, step_save=4, keep=1)
    assert names(tmp_path / "run") == ["rwkv-1.json", "rwkv-1.pth"]


def test_the_adapter_beside_a_merged_model_goes_with_it(train, tmp_path):
    train(**EVERY, **LORA, epoch_count=3, merge=1, keep=1)
    assert names(tmp_path / "run") == ["rwkv-2-adapter.pth", "rwkv-2.json", "rwkv-2.pth"]


@pytest.mark.parametrize("beside", [False, True])
def test_weights_that_are_not_finite_never_take_the_place_of_a_point(train, tmp_path, monkeypatch, beside):
    finish = RwkvModule._finish_step

    def break_the_third(self, *args):
        finish(self, *args)
        if self.progress.step == 3:
            with torch.no_grad():
                self.model.emb.weight[0, 0] = torch.nan

    monkeypatch.setattr(RwkvModule, "_finish_step", break_the_third)
    with pytest.raises(UserError, match="the training diverged and is not saved"):
        train(save_steps=1, save_async=beside)
    assert steps_of_points(tmp_path / "run") == [1, 2]


@pytest.mark.parametrize("method", [{"peft": "none"}, LORA, {**LORA, "merge": 1}])
def test_writing_in_the_background_gives_the_same_files(train, tmp_path, method):
    values = {**method, **EVERY, "epoch_count": 3, "step_save": 1, "save_steps": 1, "keep": 4}
    train(folder="at once", **values)
    train(folder="beside", **values, save_async=True)
    assert names(tmp_path / "at once") == names(tmp_path / "beside")
    for name in names(tmp_path / "at once"):
        if name.endswith(".pth"):
            assert same(tmp_path / "at once" / name, tmp_path / "beside" / name), name
    for step in (5, 6):
        place = f"resume/step-{step:08d}/tensors.pth"
        assert same(tmp_path / "at once" / place, tmp_path / "beside" / place)


def test_a_run_saved_in_the_background_goes_on_bit_for_bit(train, tmp_path, monkeypatch):
    values = {**LORA, "epoch_steps": 6, "epoch_count": 1, "save_steps": 1, "save_async": True}
    train(folder="straight", **values)
    with monkeypatch.context() as patched:
        after_step(patched, 3, lambda: signal.raise_signal(signal.SIGTERM))
        train(**values)
    assert steps_of_points(tmp_path / "run") == [2, 3]
    train(**values)
    assert same(tmp_path / "straight" / "rwkv-0.pth", tmp_path / "run" / "rwkv-0.pth")


def test_a_run_begun_anew_goes_on_although_a_crash_left_the_points_of_the_one_before(train, tmp_path, monkeypatch):
    values = {"epoch_steps": 6, "epoch_count": 1, "save_steps": 1}
    train(**values)
    old = tmp_path / "run" / "resume" / "step-00000006"
    shutil.copytree(old, tmp_path / "old")
    with monkeypatch.context() as patched:
        after_step(patched, 2, lambda: signal.raise_signal(signal.SIGTERM))
        train(**values, resume="none")
    shutil.copytree(tmp_path / "old", old)
    _, _, lines = train(**values)
    assert any("going on from" in line and "step-00000002" in line for line in lines)
    assert steps_of_points(tmp_path / "run") == [5, 6]


def test_what_goes_wrong_in_the_background_ends_the_run(train, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr("rwkvpeft.training.callbacks.saving.save_point", broken)
    with pytest.raises(ZeroDivisionError):
        train(epoch_steps=4, save_steps=1, save_async=True)


def test_the_background_does_one_steps_files_at_a_time_and_in_order():
    writer, done, may_go_on = Writer(background=True), [], threading.Event()
    writer.begin(1)
    writer.add(lambda: (may_go_on.wait(60), done.append(1)))
    writer.begin(1)
    writer.add(lambda: done.append(2))
    assert done == []
    threading.Timer(0.1, may_go_on.set).start()
    writer.begin(2)
    assert done == [1, 2]


def test_an_error_of_the_background_is_told_once():
    writer = Writer(background=True)
    writer.add(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        writer.wait()
    writer.wait()


def test_a_new_run_in_an_old_folder_says_what_it_leaves(train, tmp_path):
    train(**EVERY, epoch_count=3)
    _, _, lines = train(**EVERY, epoch_count=1, resume="none")
    assert any("holds 3 checkpoints of an earlier run" in line for line in lines)
    assert "rwkv-2.pth" in names(tmp_path / "run")


def test_points_that_cannot_be_written_are_told_each_time_and_the_run_goes_on(train, tmp_path, monkeypatch):
    values = {**LORA, "train_parts": ["none"], "epoch_steps": 5, "epoch_count": 1, "save_steps": 1}
    train(**{**values, "folder": "straight"})
    # an adapter is smaller than it is with its moments
    room = (tmp_path / "straight" / "resume" / "step-00000005" / "tensors.pth").stat().st_size - 1
    full = limited_file_size(room)
    with monkeypatch.context() as patched:
        after_step(patched, 3, full.__enter__)
        try:
            result, _, lines = train(**values)
        finally:
            full.__exit__(None, None, None)
    assert result.steps == 5
    warnings = [line for line in lines if "step-0000000" in line and line.startswith("warning: cannot write")]
    assert len(warnings) == 3
    assert "the newest resume point is" in warnings[0]
    assert steps_of_points(tmp_path / "run")[-1] == 2
    assert same(tmp_path / "straight" / "rwkv-0.pth", tmp_path / "run" / "rwkv-0.pth")


@pytest.mark.parametrize("method", [LORA, {"peft": "none", "optim": "schedule_free"}])
def test_a_run_without_its_last_checkpoint_fails_and_the_next_start_writes_it(train, tmp_path, method):
    if "optim" in method:
        pytest.importorskip("schedulefree")
    values = {**method, **EVERY, "epoch_count": 2}
    train(folder="straight", **values)
    in_its_place = tmp_path / "run" / "rwkv-1.pth"
    in_its_place.mkdir(parents=True)
    with pytest.raises(UserError, match=r"cannot write .*rwkv-1.pth: the run ended without it") as caught:
        train(**values)
    assert "step-00000004" in caught.value.expected
    in_its_place.rmdir()
    result, _, lines = train(**values)
    assert same(tmp_path / "straight" / "rwkv-1.pth", in_its_place)
    assert load_recipe(in_its_place).step == result.steps == 4
    assert sum(line.startswith("saved") for line in lines) == 1
    _, _, lines = train(**values)
    assert not any(line.startswith("saved") for line in lines)


def test_a_folder_that_is_gone_is_made_anew(train, tmp_path, monkeypatch):
    after_step(monkeypatch, 4, lambda: shutil.rmtree(tmp_path / "run"))
    train(epoch_steps=3, epoch_count=2, save_steps=1)
    assert names(tmp_path / "run") == ["rwkv-1.json", "rwkv-1.pth"]
    assert steps_of_points(tmp_path / "run") == [5, 6]


def fill_up(path):
    """Take all room there is."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1024))


def kilobytes(folder):
    """What files take in blocks of 4 KiB."""
    return sum(-(-path.stat().st_size // 4096) * 4 for path in folder.rglob("*") if path.is_file())


def test_a_disk_that_fills_up_costs_no_more_than_the_points_of_that_time(train, tmp_path, monkeypatch):
    values = {"epoch_steps": 8, "epoch_count": 1, "save_steps": 1}
    train(folder="straight", **values)
    with small_disk(tmp_path / "run", 4096) as disk:
        def fill(step):
            if step == 1:
                fill_up(disk / "filler")
            if step == 6:
                (disk / "filler").unlink()
            if step == 5:
                told.append(steps_of_points(disk))

        told = []
        each_step(monkeypatch, fill)
        _, _, lines = train(**values)
        assert told == [[]]
        assert steps_of_points(disk) == [7, 8]
        assert sum("No space left" in line and "there is no resume point yet" in line for line in lines) == 5
        assert len((disk / "loss_data.jsonl").read_text().splitlines()) == 8
        assert same(tmp_path / "straight" / "rwkv-0.pth", disk / "rwkv-0.pth")


def test_a_disk_with_room_for_two_points_takes_the_third_in_place_of_the_first(train, tmp_path):
    values = {"epoch_steps": 6, "epoch_count": 1, "save_steps": 1}
    train(folder="straight", **values)
    place = tmp_path / "straight"
    point = kilobytes(place / "resume" / "step-00000006")
    model = kilobytes(place) - kilobytes(place / "resume")
    with small_disk(tmp_path / "run", model + 2 * point + point // 2) as disk:
        train(**values)
        assert steps_of_points(disk)[-1] == 6
        assert same(place / "rwkv-0.pth", disk / "rwkv-0.pth")


def test_a_disk_with_room_for_two_checkpoints_takes_the_third_in_place_of_the_first(train, tmp_path):
    values = {**EVERY, **LORA, "epoch_count": 4, "merge": 1, "keep": 2}
    train(folder="straight", **values)
    place = tmp_path / "straight"
    # the last two checkpoints, and everything else, are there at the end; a third one does not fit
    with small_disk(tmp_path / "run", kilobytes(place) + kilobytes(place / "resume") // 2) as disk:
        _, _, lines = train(**values)
        assert names(disk) == names(place)
        assert same(place / "rwkv-3.pth", disk / "rwkv-3.pth")
        assert sum(line.startswith("saved") for line in lines) == 4


def test_on_a_disk_that_turns_read_only_a_run_goes_on_and_can_be_taken_up_from_before(train, tmp_path, monkeypatch):
    values = {"epoch_steps": 6, "epoch_count": 1, "save_steps": 1}
    train(folder="straight", **values)
    run, frozen = tmp_path / "run", ExitStack()
    with monkeypatch.context() as patched, frozen:
        after_step(patched, 4, lambda: frozen.enter_context(read_only(run)))
        with pytest.raises(UserError, match="the run ended without it") as caught:
            train(**values)
    assert "step-00000003" in caught.value.expected
    assert caught.value.found == "Read-only file system"
    _, _, lines = train(**values)
    assert any("step-00000003" in line for line in lines)
    assert same(tmp_path / "straight" / "rwkv-0.pth", run / "rwkv-0.pth")
    steps = [json.loads(line)["step"] for line in (run / "loss_data.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]
