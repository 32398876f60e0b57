"""Whole runs that learn from rewards: what they write, and how they go on."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from rwkvpeft.checkpoints.files import load_tensors, save_tensors
from rwkvpeft.cli.train import main
from rwkvpeft.models.rwkv7 import Rwkv7
from rwkvpeft.models.shape import new_shape
from rwkvpeft.training.callbacks.kept_rollouts import KeptRolloutFiles

REWARD = """
def many(prompts, answers, records):
    return [len(set(answer)) / (1 + record["number"]) for answer, record in zip(answers, records)]
"""


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(1)
    shape = new_shape("x070", n_layer=2, n_embd=16, vocab_size=256, head_size=8)
    tensors = Rwkv7.initial_weights(shape)
    save_tensors(tmp_path / "base.pth", {name: x + 0.1 * torch.randn_like(x) for name, x in tensors.items()})
    records = [{"prompt": f"say {number}", "number": number % 3} for number in range(12)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "reward.py").write_text(REWARD)
    return tmp_path


def train(folder, *flags, run="run"):
    return main([
        "--objective", "grpo", "--load_model", str(folder / "base.pth"), "--proj_dir", str(folder / run),
        "--data_file", str(folder / "prompts.jsonl"), "--tokenizer", "bytes", "--reward", f"{folder}/reward.py:many",
        "--group_size", "3", "--answer_tokens", "4", "--ctx_len", "32", "--micro_bsz", "2", "--epoch_steps", "8",
        "--epoch_count", "1", "--lr_init", "1e-2", "--lr_final", "1e-3", "--peft", "lora",
        "--peft_config", '{"r": 2, "lora_dropout": 0.0}', "--accelerator", "cpu", "--precision", "fp32",
        "--random_seed", "3", "--report", "false", *flags,
    ])  # fmt: skip


def lines(folder, run="run"):
    return [json.loads(line) for line in (folder / run / "rollouts.jsonl").read_text().splitlines()]


def test_answers_are_written_down_with_the_step_that_learns_from_them(folder):
    assert train(folder) == 0
    found = lines(folder)
    assert [line["step"] for line in found] == [step for step in range(1, 9) for _ in range(6)]
    assert {line["prompt"] for line in found} <= {f"User: say {number}\n\nAssistant:" for number in range(12)}
    assert len({line["place"] for line in found}) == 16


def test_a_run_resumed_between_steps_with_the_same_answers_ends_as_if_it_had_not_stopped(folder):
    flags = ("--policy_steps", "3", "--save_steps", "1")
    assert train(folder, *flags) == 0
    result = folder / "run" / "rwkv-0.pth"
    expected, logged = load_tensors(result), lines(folder)
    assert [line["step"] for line in logged] == [step for step in (1, 4, 7) for _ in range(6)]
    # the point after step 7: its answers were drawn before that step, and are learned from once more
    shutil.rmtree(folder / "run" / "resume" / "step-00000008")
    shutil.copytree(folder / "run", folder / "forgetful")
    result.unlink()
    assert train(folder, *flags) == 0
    resumed = load_tensors(result)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())
    assert lines(folder) == logged
    shutil.rmtree(folder / "forgetful" / "rollouts")
    assert train(folder, *flags, run="forgetful") == 0
    other = load_tensors(folder / "forgetful" / "rwkv-0.pth")
    assert not all(torch.equal(other[name], tensor) for name, tensor in expected.items())


def test_a_run_that_goes_on_from_another_folder_takes_its_answers_over(folder):
    flags = ("--policy_steps", "3", "--save_steps", "1", "--epoch_steps", "6")
    assert train(folder, *flags) == 0
    point = folder / "run" / "resume" / "step-00000005"
    assert train(folder, *flags, "--resume", str(point), run="other") == 0
    one, other = (load_tensors(folder / run / "rwkv-0.pth") for run in ("run", "other"))
    assert all(torch.equal(other[name], tensor) for name, tensor in one.items())


def test_micro_batches_train_like_one_batch(folder):
    flags = ("--policy_steps", "2", "--kl_beta", "0.1", "--epoch_count", "1")
    assert train(folder, *flags, "--micro_bsz", "4", "--epoch_steps", "4") == 0
    assert train(folder, *flags, "--epoch_steps", "8", "--accumulate_grad_batches", "2", run="parts") == 0
    whole, parts = (load_tensors(folder / run / "rwkv-0.pth") for run in ("run", "parts"))
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-4, atol=1e-4, msg=name)
    logged = [sorted((line["place"], line["answer"]) for line in lines(folder, run)) for run in ("run", "parts")]
    assert logged[0] == logged[1]


def test_answers_that_no_resume_point_needs_are_deleted(folder):
    assert train(folder, "--policy_steps", "2", "--save_steps", "2") == 0
    left = sorted(path.name.split("-")[1] for path in (folder / "run" / "rollouts").glob("*.json"))
    assert left == ["00000006"]


def test_answers_stay_as_long_as_a_resume_point_is_within_their_steps(tmp_path):
    for step in (0, 3, 6):
        (tmp_path / f"step-{step:08d}-place-{step}.json").write_text("{}")
    (tmp_path / "resume" / "step-00000004").mkdir(parents=True)
    kept = KeptRolloutFiles(tmp_path, tmp_path / "resume", 3)
    assert kept._point_steps() == [4]
    kept._drop(lambda drawn: drawn + 3 <= min(kept._point_steps()))
    assert sorted(path.name for path in tmp_path.glob("*.json")) == [
        "step-00000003-place-3.json", "step-00000006-place-6.json"
    ]


def test_a_reward_function_that_is_not_there_is_told_before_anything_is_written(folder, capsys):
    (folder / "reward.py").write_text("")
    assert train(folder) == 2
    assert "has no function many" in capsys.readouterr().err
    assert not (folder / "run").exists()


def test_a_failing_reward_function_ends_the_run_with_one_message(folder, capsys):
    (folder / "reward.py").write_text("def many(prompts, answers, records):\n    return records[0]['nothing']\n")
    assert train(folder) == 2
    told = capsys.readouterr().err
    assert "KeyError: 'nothing'" in told
    assert "reward.py:2" in told
    assert "Traceback" not in told
