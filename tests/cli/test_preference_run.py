"""Runs of the train command that learn from preferences."""

from __future__ import annotations

import json

import pytest
import torch

from rwkvpeft.checkpoints.files import load_tensors

LORA = ("--peft", "lora", "--peft_config", '{"r": 2, "lora_dropout": 0.0}')
FIGURES = {"accuracy", "margin", "chosen_reward", "rejected_reward", "chosen_logprob", "rejected_logprob", "sft_loss"}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    records = [{"prompt": f"{a} or {b}?", "chosen": str(max(a, b)), "rejected": str(min(a, b))}
               for a in range(5) for b in range(5) if a != b]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def records(folder, name="loss_data.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_a_run_writes_down_rewards_margin_and_accuracy_of_steps_and_of_held_out_pairs(train, pairs, tmp_path):
    code, out, errors = train(*LORA, "--objective", "dpo", "--data_file", pairs, "--val_split", 4, "--val_steps", 1)
    assert code == 0, errors
    assert all(set(line) >= FIGURES for line in records(tmp_path / "out"))
    held_out = records(tmp_path / "out", "val_data.jsonl")
    assert [line["step"] for line in held_out] == [0, 1, 2]
    assert all(set(line["metrics"]) == FIGURES and line["perplexity"] is None for line in held_out)
    # with the adapter as it begins, nothing differs from the reference
    assert held_out[0]["metrics"]["margin"] == 0
    assert held_out[0]["val_loss"] == pytest.approx(0.693147, abs=1e-6)
    assert "objective: dpo, beta 0.1, share of plain tuning 0, compared with the base, adapter switched off" in out
    assert "accuracy" in (tmp_path / "out" / "report.md").read_text()


def test_a_step_in_parts_has_the_figures_of_the_whole_one(train, pairs, tmp_path):
    words = (*LORA, "--objective", "simpo", "--data_file", pairs, "--dropout", 0)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(*words, "--proj_dir", whole, "--micro_bsz", 4)[0] == 0
    split = ("--micro_bsz", 2, "--accumulate_grad_batches", 2, "--epoch_steps", 4)
    assert train(*words, "--proj_dir", parts, *split)[0] == 0
    for one, other in zip(records(whole), records(parts), strict=True):
        for name in (*FIGURES, "loss", "grad_norm"):
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), name
        assert other["weight"] == one["weight"] == 4


def test_full_training_compares_with_the_model_as_it_was_and_keeps_its_words(train, pairs, tmp_path):
    code, out, errors = train("--objective", "dpo", "--data_file", pairs, "--val_split", 4, "--lr_init", 1e-3)
    assert code == 0, errors
    assert "compared with the model as training finds it" in out
    kept = load_tensors(tmp_path / "out" / "reference.pth")["logprobs"]
    assert kept.shape == (16, 2)
    assert records(tmp_path / "out", "val_data.jsonl")[0]["metrics"]["margin"] == 0


def test_a_run_from_an_adapter_compares_with_that_adapter(train, pairs, tmp_path):
    first = tmp_path / "first"
    assert train(*LORA, "--data_file", pairs, "--proj_dir", first, "--lr_init", 1e-2, "--objective", "orpo")[0] == 0
    more = ("--adapter", first / "rwkv-0.pth", "--objective", "ipo", "--data_file", pairs, "--val_split", 4)
    assert train(*LORA, *more)[0] == 0
    held_out = records(tmp_path / "out", "val_data.jsonl")
    # before training the run looks at the untouched base, which is not what it compares with
    assert held_out[0]["metrics"]["margin"] != 0
    assert (tmp_path / "out" / "reference.pth").exists()
    assert train(*LORA, *more, "--proj_dir", tmp_path / "base", "--reference", "base")[0] == 0
    assert not (tmp_path / "base" / "reference.pth").exists()


def test_a_run_goes_on_with_the_reference_it_began_with(train, pairs, tmp_path):
    words = ("--objective", "kto", "--data_file", pairs, "--epoch_count", 2, "--lr_init", 1e-3)
    assert train(*words, "--proj_dir", tmp_path / "whole")[0] == 0
    assert train(*words, "--my_exit", 0)[0] == 0
    assert train(*words)[0] == 0
    one, other = (load_tensors(tmp_path / run / "rwkv-1.pth") for run in ("whole", "out"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_run_whose_reference_is_gone_cannot_go_on(train, pairs, tmp_path):
    words = ("--objective", "dpo", "--data_file", pairs, "--epoch_count", 2)
    assert train(*words, "--my_exit", 0)[0] == 0
    (tmp_path / "out" / "reference.pth").unlink()
    code, _, errors = train(*words)
    assert code == 2
    assert "cannot be taken up without" in errors


def test_csv_in_upstreams_words_is_trained_with_upstreams_flags(train, tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("prompt,chosen,reject\nIs ice hot?,No.,Yes.\nIs fire hot?,Yes.,No.\n")
    code, out, errors = train(*LORA, "--dpo", 1, "--dpo_beta", 0.2, "--dpo_alpha", 0.1, "--data_file", path)
    assert code == 0, errors
    assert "objective: dpo, beta 0.2, share of plain tuning 0.1" in out


def test_infinite_context_is_refused_before_anything_is_written(train, pairs, tmp_path):
    code, _, errors = train(*LORA, "--objective", "orpo", "--data_file", pairs, "--infctx")
    assert code == 2
    assert "preferences compare whole answers" in errors
    assert not (tmp_path / "out").exists()
