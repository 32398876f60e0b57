"""train.py on data that are neither binidx nor jsonl."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from rwkvpeft.cli.evaluate import main as evaluate

SCRATCH = ["--load_model", "", "--my_testing", "x070", "--n_layer", "1", "--n_embd", "32", "--head_size_a", "16"]


def test_columns_of_csv_are_trained_as_answers(train, tmp_path):
    (tmp_path / "pairs.csv").write_text('query,response\n"Hi, you",yes\nWhat,that\n')
    code, out, error = train("--data_file", tmp_path / "pairs.csv", "--sft_field", "query", "response")
    assert code == 0, error
    assert "11 tokens trained" in out.replace(",", "")
    assert (tmp_path / "out" / "rwkv-0.pth").is_file()


@pytest.mark.parametrize("kind", ["numpy", "uint16"])
def test_arrays_of_tokens_are_trained_in_windows(train, tmp_path, kind):
    tokens = np.arange(400) % 256
    np.save(tmp_path / "tokens.npy", tokens)
    tokens.astype("<u2").tofile(tmp_path / "tokens.u16")
    file = tmp_path / {"numpy": "tokens.npy", "uint16": "tokens.u16"}[kind]
    code, out, error = train("--data_file", file, "--data_type", kind)
    assert code == 0, error
    assert "rows: 8 of at most 48 tokens" in out


def test_a_token_the_model_does_not_have_is_refused_before_anything_is_written(train, tmp_path):
    np.save(tmp_path / "tokens.npy", np.arange(400))
    code, _, error = train("--data_file", tmp_path / "tokens.npy", "--data_type", "numpy")
    assert code == 2
    assert "token id the model does not have" in error
    assert not (tmp_path / "out").exists()


def test_a_model_of_a_text_has_its_characters_and_is_read_with_them_again(train, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 30)
    kind = ["--data_file", tmp_path / "text.txt", "--data_type", "utf-8"]
    vocabulary = tmp_path / "out" / "vocab.json"
    code, _, error = train(*SCRATCH, *kind, "--tokenizer", vocabulary)
    assert code == 0, error
    characters = json.loads(vocabulary.read_text())
    assert "".join(characters.values()) == "\n benort"
    model = tmp_path / "out" / "rwkv-0.pth"
    assert len(torch.load(model, weights_only=True)["emb.weight"]) == len(characters)
    # further text without some of them
    (tmp_path / "text.txt").write_text("not not not\n" * 30)
    code, _, error = train("--load_model", model, *kind, "--tokenizer", vocabulary, "--proj_dir", tmp_path / "more")
    assert code == 0, error
    (tmp_path / "text.txt").write_text("note\n" * 30)
    words = ["--model", model, *kind, "--device", "cpu", "--ctx_len", "16", "--json"]
    assert evaluate([str(word) for word in words]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 144


def test_sums_are_trained_without_a_file(train, tmp_path):
    code, out, error = train("--data_file", "", "--data_type", "dummy", "--tokenizer", tmp_path / "vocab.json",
                             "--preview", "1")
    assert code == 0, error
    assert "+" in out
    assert "=" in out
    assert not (tmp_path / "vocab.json").exists()
