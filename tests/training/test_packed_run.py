"""Packed rows and batches of similar lengths through the real trainer."""

from __future__ import annotations

import json
import signal

import numpy as np
import pytest
import torch

from rwkvpeft.checkpoints.files import save_tensors
from rwkvpeft.config.groups import DataConfig
from rwkvpeft.data.binidx import write_binidx
from rwkvpeft.data.dataset import open_dataset
from rwkvpeft.models.shape import new_shape
from rwkvpeft.registry import MODELS, find
from rwkvpeft.training.module import RwkvModule

VOCABULARY = 13
CTX_LEN = 12
# inputs of documents; each three of them fill a row, so that rows of three hold what batches of three rows do
LENGTHS = [3, 4, 5, 2, 6, 4, 5, 5, 2, 1, 7, 4]
LORA = {"peft": "lora", "peft_config": {"r": 2, "lora_dropout": 0.0}}
STATE = {"peft": "state", "lr_init": 1.0, "lr_final": 0.1}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Random two-layer models, one of each version."""
    torch.manual_seed(1)
    paths = {}
    for version in ("x052", "x060", "x070"):
        shape = new_shape(version, vocab_size=VOCABULARY, head_size=8, n_layer=2, n_embd=16)
        tensors = find(MODELS, version, flag="").initial_weights(shape)
        paths[version] = tmp_path_factory.mktemp(version) / "base.pth"
        moved = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in tensors.items()}
        save_tensors(paths[version], moved)
    return paths


@pytest.fixture
def rows(tmp_path):
    """Open the documents as rows."""
    draw = np.random.default_rng(2)
    write_binidx(tmp_path / "data", [[*draw.integers(1, VOCABULARY, size=length), 0] for length in LENGTHS])

    def open_rows(**values):
        config = DataConfig(data_file=str(tmp_path / "data"), tokenizer="bytes", **values)
        return open_dataset(config, ctx_len=CTX_LEN, vocab_size=VOCABULARY, seed=5)

    return open_rows


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def log(tmp_path, folder):
    return [json.loads(line) for line in (tmp_path / folder / "loss_data.jsonl").read_text().splitlines()]


def assert_close(found, expected):
    for name, parameter in expected.items():
        torch.testing.assert_close(found[name], parameter, rtol=1e-3, atol=2e-6, msg=name)


@pytest.mark.parametrize(
    ("version", "method"),
    [
        pytest.param("x052", {}, marks=pytest.mark.slow),
        pytest.param("x060", {}, marks=pytest.mark.slow),
        ("x070", {}),
        pytest.param("x060", STATE, marks=pytest.mark.slow),
        pytest.param("x070", LORA, marks=pytest.mark.slow),
        ("x070", STATE),
    ],
)
def test_packed_documents_train_what_padded_ones_do(train, rows, checkpoints, tmp_path, version, method):
    common = {
        **method, "checkpoint": checkpoints[version], "epoch_steps": 4, "epoch_count": 2, "ctx_len": CTX_LEN,
        "accumulate_grad_batches": 2, "logit_penalty": 0.0,
    }
    # without L2Wrap, which pulls at the logits of padding too
    _, padded, _ = train(folder="padded", rows=rows(data_shuffle=0), micro_bsz=3, **common)
    _, packed, _ = train(folder="packed", rows=rows(data_shuffle=0, dataload="pack"), micro_bsz=1, **common)
    assert_close(trained(packed), trained(padded))
    for left, right in zip(log(tmp_path, "packed"), log(tmp_path, "padded"), strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-5)
        assert left["weight"] == right["weight"]
        assert left["tokens"] < right["tokens"]


def test_packed_documents_train_what_each_does_alone(train, rows, checkpoints):
    common = {"checkpoint": checkpoints["x070"], "epoch_count": 2, "ctx_len": CTX_LEN, "logit_penalty": 0.0}
    alone = {"micro_bsz": 1, "epoch_steps": 12, "accumulate_grad_batches": 6}
    _, single, _ = train(folder="alone", rows=rows(data_shuffle=0, dataload="only"), **alone, **common)
    packed = {"micro_bsz": 2, "epoch_steps": 2}
    _, joined, _ = train(folder="packed", rows=rows(data_shuffle=0, dataload="pack"), **packed, **common)
    assert_close(trained(joined), trained(single))


def test_two_rows_of_a_batch_train_like_two_batches_of_a_step(train, rows, checkpoints):
    common = {"checkpoint": checkpoints["x070"], "epoch_count": 1, "ctx_len": CTX_LEN, "logit_penalty": 0.0}
    _, together, _ = train(folder="one", rows=rows(dataload="pack"), micro_bsz=2, epoch_steps=3, **common)
    _, apart, _ = train(
        folder="two", rows=rows(dataload="pack"), micro_bsz=1, epoch_steps=6, accumulate_grad_batches=2, **common
    )
    assert_close(trained(apart), trained(together))


def test_documents_of_similar_lengths_train_what_they_train_at_full_width(train, rows, checkpoints, tmp_path):
    whole = {
        "checkpoint": checkpoints["x070"], "epoch_count": 2, "epoch_steps": 1, "ctx_len": CTX_LEN, "micro_bsz": 12,
        "logit_penalty": 0.0,
    }
    _, padded, _ = train(folder="padded", rows=rows(), **whole)
    _, bucketed, _ = train(
        folder="bucketed", rows=rows(length_buckets=True), length_buckets=True,
        **{**whole, "micro_bsz": 3, "epoch_steps": 4, "accumulate_grad_batches": 4},
    )
    assert_close(trained(bucketed), trained(padded))
    assert log(tmp_path, "bucketed")[0]["tokens"] < log(tmp_path, "padded")[0]["tokens"]


@pytest.mark.parametrize(("settings", "stop"), [({"dataload": "pack"}, 2), ({"length_buckets": True}, 5)])
def test_a_resumed_run_ends_with_the_same_weights_bit_for_bit(
    train, rows, checkpoints, monkeypatch, settings, stop
):
    # passes over the rows and mini-epochs end at different batches
    values = {
        **LORA, **settings, "checkpoint": checkpoints["x070"], "ctx_len": CTX_LEN, "micro_bsz": 2, "epoch_steps": 5,
        "epoch_count": 2, "accumulate_grad_batches": 2,
    }
    _, straight, _ = train(folder="straight", rows=rows(**settings), **values)
    finish = RwkvModule._finish_step

    def finish_and_stop(self, *args):
        finish(self, *args)
        if self.progress.step == stop:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(RwkvModule, "_finish_step", finish_and_stop)
        result, _, _ = train(folder="broken", rows=rows(**settings), **values)
    assert result.stopped_early
    _, resumed, _ = train(folder="broken", rows=rows(**settings), **values)
    for name, parameter in trained(straight).items():
        assert torch.equal(resumed.get_parameter(name), parameter), name
