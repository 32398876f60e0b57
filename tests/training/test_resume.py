"""Resume points on disk."""

from __future__ import annotations

import pytest
import torch

from rwkvpeft.config.groups import OutputConfig
from rwkvpeft.errors import UserError
from rwkvpeft.training.module import RunProgress
from rwkvpeft.training.resume import check_essentials, find_point, prune_points, save_point

TENSORS = {"param.weight": torch.arange(4.0)}


def output(tmp_path, resume="auto"):
    return OutputConfig(proj_dir=str(tmp_path), resume=resume)


def quiet(line):
    raise AssertionError(line)


def test_a_point_comes_back_as_it_was(tmp_path):
    progress = RunProgress(step=3, rows=12, tokens=99, loss_sum=0.1 + 0.2, loss=1.5)
    save_point(tmp_path / "resume", TENSORS, progress, {"seed": 1})
    point = find_point(output(tmp_path), quiet)
    assert point.progress == progress
    assert torch.equal(point.tensors()["param.weight"], TENSORS["param.weight"])


def test_the_newest_two_points_are_kept_and_other_runs_points_go(tmp_path):
    folder = tmp_path / "resume"
    save_point(folder, TENSORS, RunProgress(step=900), {})
    (folder / ".partial-1-abc").mkdir()
    written = [save_point(folder, TENSORS, RunProgress(step=step), {}) for step in (1, 2, 3)]
    prune_points(folder, written)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000003"]


def test_a_point_that_cannot_be_finished_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="cannot write") as caught:
        save_point(tmp_path / "resume", TENSORS, RunProgress(step=1), {})
    assert "No space" in caught.value.found
    assert not list((tmp_path / "resume").iterdir())


@pytest.mark.parametrize("damage", ["cut", "json", "gone"])
def test_a_damaged_point_gives_way_to_the_one_before(tmp_path, damage):
    folder = tmp_path / "resume"
    save_point(folder, TENSORS, RunProgress(step=1), {})
    newest = save_point(folder, TENSORS, RunProgress(step=2), {})
    if damage == "cut":
        data = (newest / "tensors.pth").read_bytes()
        (newest / "tensors.pth").write_bytes(data[:-7])
    elif damage == "json":
        (newest / "resume.json").write_text("{")
    else:
        (newest / "tensors.pth").unlink()
    lines = []
    assert find_point(output(tmp_path), lines.append).progress.step == 1
    assert "step-00000002" in lines[0]


def test_without_points_a_run_starts_anew_but_a_named_folder_must_have_one(tmp_path):
    assert find_point(output(tmp_path), quiet) is None
    assert find_point(output(tmp_path, "none"), quiet) is None
    with pytest.raises(UserError, match="no readable resume point"):
        find_point(output(tmp_path, str(tmp_path / "elsewhere")), quiet)


def test_a_point_can_be_named_itself(tmp_path):
    place = save_point(tmp_path / "resume", TENSORS, RunProgress(step=7), {})
    assert find_point(output(tmp_path, str(place)), quiet).progress.step == 7


def test_essentials_are_compared_as_they_were_written(tmp_path):
    save_point(tmp_path / "resume", TENSORS, RunProgress(step=1), {"parts": ("a", "b"), "lr": 1e-5})
    point = find_point(output(tmp_path), quiet)
    check_essentials(point, {"parts": ["a", "b"], "lr": 1e-5})
    with pytest.raises(UserError) as caught:
        check_essentials(point, {"parts": ["a"], "lr": 1e-5})
    assert "parts" in caught.value.found
    assert "lr" not in caught.value.found
