"""Resume points on disk, and the settings that may not change."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict

import pytest
import torch

from rwkvpeft.atomic import NotWrittenError
from rwkvpeft.config.groups import (
    DataConfig,
    MethodConfig,
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    RuntimeConfig,
    ScheduleConfig,
    TrainConfig,
)
from rwkvpeft.config.objective import ObjectiveConfig, RewardConfig
from rwkvpeft.errors import UserError
from rwkvpeft.training.essentials import check_essentials
from rwkvpeft.training.module import RunProgress
from rwkvpeft.training.point_order import next_start
from rwkvpeft.training.resume import Standing, find_point, replace_points, save_point, settle

from .full_disks import limited_file_size

TENSORS = {"param.weight": torch.arange(4.0), "optim.weight.exp_avg": torch.ones(3)}


def output(tmp_path, resume="auto"):
    return OutputConfig(proj_dir=str(tmp_path), resume=resume)


def quiet(line):
    raise AssertionError(line)


def save(tmp_path, step, *, start=1, **more):
    split = {"micro_bsz": 1, "processes": 1}
    standing = Standing(RunProgress(step=step, **more), {"seed": 1}, split, ("rwkv-0.pth",), start=start)
    return save_point(tmp_path / "resume", TENSORS, standing)


def config(**values):
    schedule = ScheduleConfig(micro_bsz=values.pop("micro_bsz", 1))
    parts = ModelConfig(), DataConfig(), schedule, OptimizerConfig(), MethodConfig(), RuntimeConfig(**values)
    return TrainConfig(*parts, OutputConfig())


def test_a_point_comes_back_as_it_was(tmp_path):
    place = save(tmp_path, 3, rows=12, tokens=99, loss_sum=0.1 + 0.2, loss=1.5)
    point = find_point(output(tmp_path), quiet)
    assert point.path == place
    assert point.progress == RunProgress(step=3, rows=12, tokens=99, loss_sum=0.1 + 0.2, loss=1.5)
    assert list(point.standing.checkpoints) == ["rwkv-0.pth"]
    assert all(torch.equal(point.tensors()[name], tensor) for name, tensor in TENSORS.items())


def test_the_newest_two_points_are_kept_and_other_runs_points_go(tmp_path):
    folder = tmp_path / "resume"
    save(tmp_path, 900)
    (folder / ".partial-1-abc").mkdir()
    written = []
    for step in (1, 2, 3):
        written = replace_points(folder, written, lambda step=step: save(tmp_path, step))
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000003"]
    assert written == sorted(folder.iterdir())


def refusing(tmp_path, step, times):
    """A way to save a point that finds no room so many times."""
    left = [times]

    def attempt():
        if left[0]:
            left[0] -= 1
            raise NotWrittenError("cannot write", found="No space left on device")
        return save(tmp_path, step)

    return attempt


def test_without_room_for_one_more_the_older_point_makes_room_for_the_new_one(tmp_path):
    written = [save(tmp_path, step) for step in (1, 2)]
    kept = replace_points(tmp_path / "resume", written, refusing(tmp_path, 3, times=1))
    assert [path.name for path in kept] == ["step-00000002", "step-00000003"]


def test_without_any_room_the_newest_point_stays(tmp_path):
    written = [save(tmp_path, step) for step in (1, 2)]
    with pytest.raises(NotWrittenError):
        replace_points(tmp_path / "resume", written, refusing(tmp_path, 3, times=2))
    assert find_point(output(tmp_path), quiet).progress.step == 2


def test_no_point_makes_room_while_the_newest_is_broken(tmp_path):
    written = [save(tmp_path, step) for step in (1, 2)]
    (written[1] / "resume.json").write_text("{")
    with pytest.raises(NotWrittenError):
        replace_points(tmp_path / "resume", written, refusing(tmp_path, 3, times=1))
    assert find_point(output(tmp_path), lambda line: None).progress.step == 1


def test_a_file_system_that_is_full_leaves_nothing_of_a_point(tmp_path):
    place = save(tmp_path, 1)
    with limited_file_size(256), pytest.raises(NotWrittenError, match="cannot write") as caught:
        save(tmp_path, 2)
    assert "too large" in caught.value.found
    assert list((tmp_path / "resume").iterdir()) == [place]


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 4
    path.write_bytes(data)


DAMAGES = {
    "cut": lambda place: (place / "tensors.pth").write_bytes((place / "tensors.pth").read_bytes()[:-7]),
    "a bit of a tensor": lambda place: flip(place / "tensors.pth", tensor_offset(place / "tensors.pth")),
    "a bit of the record": lambda place: (place / "resume.json").write_text(
        (place / "resume.json").read_text().replace('"step": 2', '"step": 3')
    ),
    "no json": lambda place: (place / "resume.json").write_text("{"),
    "other json": lambda place: (place / "resume.json").write_text("[1]"),
    "bytes": lambda place: (place / "resume.json").write_bytes(b"\xff\x00"),
    "no tensors": lambda place: (place / "tensors.pth").unlink(),
    "no record": lambda place: (place / "resume.json").unlink(),
    "a file in its place": lambda place: (shutil.rmtree(place), place.write_text("")),
}


def tensor_offset(path):
    return path.read_bytes().index(TENSORS["param.weight"].numpy().tobytes())


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_point_gives_way_to_the_one_before(tmp_path, damage):
    save(tmp_path, 1)
    DAMAGES[damage](save(tmp_path, 2))
    lines = []
    assert find_point(output(tmp_path), lines.append).progress.step == 1
    assert "step-00000002 is broken and passed over" in lines[0]


def test_the_first_point_of_a_later_start_is_newer_than_those_it_has_not_removed_yet(tmp_path):
    save(tmp_path, 100)
    save(tmp_path, 90)
    place = save(tmp_path, 5, start=next_start(tmp_path / "resume"))
    assert find_point(output(tmp_path), quiet).path == place
    (place / "resume.json").write_text("{")
    assert find_point(output(tmp_path), [].append).progress.step == 100


def test_a_point_takes_the_place_of_one_of_the_same_step(tmp_path):
    save(tmp_path, 5, rows=1)
    place = save(tmp_path, 5, rows=2)
    assert replace_points(tmp_path / "resume", [], lambda: save(tmp_path, 5, rows=3)) == [place]
    assert find_point(output(tmp_path), quiet).progress.rows == 3
    assert list(place.parent.iterdir()) == [place]


def test_what_a_crash_left_of_a_rename_is_no_point(tmp_path):
    place = save(tmp_path, 5)
    place.rename(place.with_name(".partial-17-00000000"))
    assert find_point(output(tmp_path), quiet) is None


def test_a_point_of_a_newer_version_is_never_started_over(tmp_path):
    record = save(tmp_path, 1) / "resume.json"
    record.write_text(record.read_text().replace('"format": 2', '"format": 3'))
    with pytest.raises(UserError, match="newer version"):
        find_point(output(tmp_path), quiet)


def test_a_point_that_counted_batches_is_still_read(tmp_path):
    place = save(tmp_path, 6)
    essentials = {"micro_bsz": 2, "accumulate_grad_batches": 3, "devices": 2, "num_nodes": 1, "epoch_steps": 9, "a": 1}
    record = {
        "format": 1, "essentials": essentials, "tensors_bytes": (place / "tensors.pth").stat().st_size,
        "progress": {"step": 6, "batches": 18, "tokens": 7, "seconds": 1.0, "loss_sum": 0.0, "weight_sum": 0.0,
                     "loss": None},
    }
    (place / "resume.json").write_text(json.dumps(record))
    point = find_point(output(tmp_path), quiet)
    assert point.progress.rows == 18 * 4
    assert point.essentials == {"rows of a step": 12, "rows of a mini-epoch": 36, "a": 1}


def test_without_points_a_run_starts_anew_but_a_named_folder_must_have_one(tmp_path):
    assert find_point(output(tmp_path), quiet) is None
    assert find_point(output(tmp_path, "none"), quiet) is None
    with pytest.raises(UserError, match="no readable resume point"):
        find_point(output(tmp_path, str(tmp_path / "elsewhere")), quiet)


def test_a_point_can_be_named_itself(tmp_path):
    place = save(tmp_path, 7)
    assert find_point(output(tmp_path, str(place)), quiet).progress.step == 7


def test_what_is_owed_is_settled_once(tmp_path):
    standing = Standing(RunProgress(step=4), {"seed": 1}, {}, (), ("rwkv-0.pth",))
    save_point(tmp_path / "resume", TENSORS, standing)
    point = find_point(output(tmp_path), quiet)
    settle(point)
    again = find_point(output(tmp_path), quiet)
    assert (list(point.standing.owed), list(again.standing.owed)) == (["rwkv-0.pth"], [])


def point_of(tmp_path, essentials):
    save_point(tmp_path / "resume", TENSORS, Standing(RunProgress(step=1), essentials, {}))
    return find_point(output(tmp_path), quiet)


def test_essentials_are_compared_as_they_were_written(tmp_path):
    point = point_of(tmp_path, {"parts": ("a", "b"), "lr": 1e-5})
    check_essentials(point, {"parts": ["a", "b"], "lr": 1e-5}, config())
    with pytest.raises(UserError) as caught:
        check_essentials(point, {"parts": ["a"], "lr": 1e-5}, config())
    assert "parts" in caught.value.found
    assert "lr" not in caught.value.found


def test_a_run_that_began_before_there_were_objectives_goes_on(tmp_path):
    point = point_of(tmp_path, {"lr": 1e-5})
    check_essentials(point, {"lr": 1e-5, **asdict(ObjectiveConfig()), **asdict(RewardConfig())}, config())
    with pytest.raises(UserError, match="expected  objective language_modelling"):
        check_essentials(point, {"lr": 1e-5, "objective": "dpo"}, config())


def test_a_setting_that_was_left_to_its_default_is_told_as_not_given(tmp_path):
    point = point_of(tmp_path, {"beta": None})
    with pytest.raises(UserError) as caught:
        check_essentials(point, {"beta": 0.3}, config())
    assert (caught.value.found, caught.value.expected) == ("beta 0.3", "no beta given")


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ({"micro_bsz": 4}, "--accumulate_grad_batches 2 --epoch_steps 6;"),
        ({"micro_bsz": 4, "devices": 2}, "--accumulate_grad_batches 1 --epoch_steps 3;"),
        ({"micro_bsz": 3}, "--micro_bsz 2 --accumulate_grad_batches 4 --epoch_steps 12;"),
        ({"micro_bsz": 64}, "--micro_bsz 8 --accumulate_grad_batches 1 --epoch_steps 3;"),
        ({"micro_bsz": 4, "devices": 3}, "a number of processes that divides 8;"),
    ],
)
def test_another_split_is_told_the_flags_that_fit(tmp_path, asked, wanted):
    point = point_of(tmp_path, {"rows of a step": 8, "rows of a mini-epoch": 24})
    with pytest.raises(UserError) as caught:
        check_essentials(point, {"rows of a step": 5, "rows of a mini-epoch": 24}, config(**asked))
    assert caught.value.fix.startswith(wanted)


def test_buckets_of_similar_lengths_keep_the_rows_of_a_batch_together(tmp_path):
    saved = {"rows of a step": 8, "rows of a mini-epoch": 24, "rows of a batch on all devices": 4}
    point = point_of(tmp_path, saved)
    with pytest.raises(UserError) as caught:
        check_essentials(point, {**saved, "rows of a batch on all devices": 2}, config(micro_bsz=1, devices=2))
    assert caught.value.fix.startswith("--micro_bsz 2 --accumulate_grad_batches 2 --epoch_steps 6;")
