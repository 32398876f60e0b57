"""A tiny random model, tiny data and a way to call the train command."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from rwkvpeft.cli.train import main
from rwkvpeft.data.binidx import write_binidx
from rwkvpeft.models.rwkv7 import Rwkv7
from rwkvpeft.models.shape import new_shape

PAIRS = [("What is red?", "A colour."), ("What is two and two?", "Four."), ("Who barks?", "A dog does.")]


def save_model(path, vocab_size=256, n_layer=2, n_embd=32):
    torch.manual_seed(0)
    shape = new_shape("x070", n_layer=n_layer, n_embd=n_embd, vocab_size=vocab_size, head_size=16)
    torch.save(Rwkv7.initial_weights(shape), path)
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A random v7 checkpoint that speaks bytes: 2 layers, width 32, 2 heads of 16."""
    return save_model(tmp_path_factory.mktemp("model") / "tiny.pth")


@pytest.fixture(scope="session")
def jsonl_file(tmp_path_factory):
    """Questions and answers, one record a line."""
    path = tmp_path_factory.mktemp("jsonl") / "pairs.jsonl"
    texts = [f"User: {question}\n\nAssistant: {answer}" for question, answer in PAIRS * 4]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="session")
def binidx_prefix(tmp_path_factory):
    """The same texts as bytes in a binidx pair."""
    prefix = tmp_path_factory.mktemp("binidx") / "pairs"
    texts = [f"User: {question}\n\nAssistant: {answer}" for question, answer in PAIRS * 4]
    write_binidx(prefix, (np.frombuffer(text.encode() + b"\0", dtype=np.uint8).astype(np.uint16) for text in texts))
    return prefix


@pytest.fixture
def train(tiny_model, binidx_prefix, tmp_path, capsys):
    """Call ``train.py`` on the tiny model for one short mini-epoch; later words win. Returns code, output, errors."""

    def run(*words):
        common = f"--load_model {tiny_model} --data_file {binidx_prefix} --proj_dir {tmp_path}/out --accelerator cpu"
        short = "--tokenizer bytes --ctx_len 48 --micro_bsz 2 --epoch_steps 2 --epoch_count 1 --epoch_save 1"
        code = main([*common.split(), *short.split(), "--random_seed", "1", *(str(word) for word in words)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
