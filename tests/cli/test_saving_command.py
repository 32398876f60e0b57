"""Saving, keeping and going on through the real command."""

from __future__ import annotations

import json


def names(folder):
    return sorted(path.name for path in folder.glob("rwkv-*.pth"))


def test_checkpoints_are_written_by_steps_beside_training_and_the_newest_kept(train, tmp_path):
    code, out, _ = train("--epoch_count", 2, "--step_save", 1, "--keep", 2, "--save_async")
    assert code == 0
    assert names(tmp_path / "out") == ["rwkv-1.pth", "rwkv-step-4.pth"]
    assert "saved" in out


def test_a_run_that_cannot_write_its_last_checkpoint_ends_with_code_2_and_says_where_it_stands(train, tmp_path):
    (tmp_path / "out" / "rwkv-0.pth").mkdir(parents=True)
    code, out, err = train()
    assert code == 2
    assert "warning: cannot write" in out
    assert "the run ended without it" in err
    assert "step-00000002" in err
    (tmp_path / "out" / "rwkv-0.pth").rmdir()
    code, out, _ = train()
    assert code == 0
    assert "saved" in out
    assert "is complete" in out


def test_a_run_goes_on_in_smaller_batches_with_the_same_losses(train, tmp_path):
    straight = ["--epoch_steps", 8, "--epoch_count", 1, "--micro_bsz", 4, "--save_steps", 3]
    assert train(*straight)[0] == 0
    losses = [json.loads(line)["loss"] for line in (tmp_path / "out" / "loss_data.jsonl").read_text().splitlines()]
    again = tmp_path / "out" / "resume" / "step-00000006"
    code, out, err = train(*straight, "--proj_dir", tmp_path / "other", "--resume", again, "--micro_bsz", 2)
    assert code == 2
    assert "--accumulate_grad_batches 2 --epoch_steps 16" in err
    smaller = ["--micro_bsz", 2, "--accumulate_grad_batches", 2, "--epoch_steps", 16]
    code, out, err = train(*straight, "--proj_dir", tmp_path / "other", "--resume", again, *smaller)
    assert code == 0, err
    assert "going on from" in out
    found = [json.loads(line)["loss"] for line in (tmp_path / "other" / "loss_data.jsonl").read_text().splitlines()]
    assert len(found) == 2
    assert all(abs(left - right) < 1e-4 for left, right in zip(found, losses[6:], strict=True))
