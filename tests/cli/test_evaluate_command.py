"""python -m rwkvpeft.evaluate."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F

from rwkvpeft.checkpoints.files import save_tensors
from rwkvpeft.checkpoints.load import load_model
from rwkvpeft.cli import evaluate_tasks
from rwkvpeft.cli.evaluate import main
from rwkvpeft.models.shape import new_shape
from rwkvpeft.registry import MODELS, find

DOCUMENTS = ["User: a\n\nAssistant: first", "User: b\n\nAssistant: the second"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("evaluate")
    shape = new_shape("x060", n_layer=1, n_embd=16, vocab_size=256, head_size=8)
    save_tensors(folder / "m.pth", find(MODELS, "x060", flag="").initial_weights(shape))
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return folder


def run(folder, capsys, *words: str) -> dict:
    files = ["--model", str(folder / "m.pth"), "--data_file", str(folder / "data.jsonl")]
    assert main([*files, "--device", "cpu", "--ctx_len", "40", "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


def expected_loss(folder, answers_only: bool) -> tuple[float, int]:
    model = load_model(folder / "m.pth")
    losses = []
    for text in DOCUMENTS:
        ids = torch.tensor([[*text.encode(), 0]])
        with torch.no_grad():
            loss = F.cross_entropy(model(ids[:, :-1])[0][0], ids[0, 1:], reduction="none")
        losses.append(loss[text.index("Assistant:") + len("Assistant:") - 1 :] if answers_only else loss)
    joined = torch.cat(losses)
    return joined.mean().item(), len(joined)


@pytest.mark.parametrize("mask", ["none", "qa"])
@pytest.mark.parametrize("rows", [["--dataload", "pad", "--micro_bsz", "2"], ["--dataload", "only"]])
def test_every_trained_token_counts_once(folder, capsys, mask, rows):
    found = run(folder, capsys, "--loss_mask", mask, *rows)
    loss, tokens = expected_loss(folder, mask == "qa")
    assert found["tokens"] == tokens
    assert found["loss"] == pytest.approx(loss, abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--data_file"),
        (["--data_file", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--data_file", "data.jsonl", "--loss_mask", "most"], "--loss_mask"),
        (["--data_file", "data.jsonl", "--micro_bsz", "0"], "--micro_bsz"),
        (["--data_file", "data.jsonl", "--sft_field", "a"], "--sft_field has no effect"),
        (["--data_file", "data.jsonl", "--dataload", "only", "--micro_bsz", "2"], "--dataload only needs"),
        (["--data_file", "data.jsonl", "--tasks", "piqa"], "--tasks asks for lm_eval"),
        (["--data_file", "data.jsonl", "--limit", "3", "--chat_layout"], "no effect without --tasks"),
    ],
)
def test_a_mistake_gives_one_message_and_exit_code_2(folder, capsys, words, message):
    words = [str(folder / word) if word == "data.jsonl" else word for word in words]
    assert main(["--model", str(folder / "m.pth"), "--device", "cpu", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_missing_lm_eval_is_named_with_its_extra(folder, capsys, monkeypatch):
    monkeypatch.setattr(evaluate_tasks, "find_spec", lambda name: None)
    assert main(["--model", str(folder / "m.pth"), "--tasks", "piqa"]) == 2
    assert "pip install '.[eval]'" in capsys.readouterr().err


def test_of_several_files_each_is_evaluated_and_all_together(folder, capsys):
    (folder / "more.csv").write_text("text\nlonger than the others\n")
    both = run(folder, capsys, "--data_file", f"{folder}/data.jsonl,{folder}/more.csv", "--dataload", "pack")
    alone = run(folder, capsys, "--data_file", f"{folder}/more.csv", "--dataload", "only")
    first = run(folder, capsys)
    assert both["files"][f"{folder}/more.csv"]["loss"] == pytest.approx(alone["loss"], abs=1e-5)
    assert both["tokens"] == alone["tokens"] + first["tokens"]
    total = alone["loss"] * alone["tokens"] + first["loss"] * first["tokens"]
    assert both["loss"] == pytest.approx(total / both["tokens"], abs=1e-5)


def test_bits_a_byte_count_the_text_alone(folder, capsys):
    found = run(folder, capsys)
    letters = sum(len(text) - 1 for text in DOCUMENTS)
    assert found["bits_per_byte"] == pytest.approx(found["loss"] * found["tokens"] / math.log(2) / letters, rel=1e-6)


def test_what_does_not_fit_a_row_is_counted(folder, capsys):
    assert run(folder, capsys)["cut"] == 0
    assert run(folder, capsys, "--ctx_len", "10")["cut"] == 2


def test_a_text_is_evaluated_in_the_vocabulary_beside_its_model(folder, capsys, tmp_path):
    shape = new_shape("x070", n_layer=1, n_embd=16, vocab_size=3, head_size=8)
    save_tensors(tmp_path / "m.pth", find(MODELS, "x070", flag="").initial_weights(shape))
    (tmp_path / "vocab.json").write_text('{"0": "a", "1": "b", "2": "c"}')
    (tmp_path / "text.txt").write_text("abcabcabcab")
    words = ["--model", str(tmp_path / "m.pth"), "--data_file", str(tmp_path / "text.txt"), "--data_type", "utf-8"]
    assert main([*words, "--ctx_len", "5", "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["tokens"], found["rows"]) == (10, 2)
    assert found["loss"] == pytest.approx(math.log(3), abs=0.3)
