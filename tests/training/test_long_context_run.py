"""Whole runs over rows in chunks: they resume, and share a step among devices, as any other run does."""

from __future__ import annotations

import json

import pytest
import torch

from rwkvpeft.errors import UserError
from rwkvpeft.training.module import RwkvModule

EXACT = {"infctx": True, "chunk_ctx": 4, "infctx_grad": "exact"}
CUT = {"infctx": True, "chunk_ctx": 4}
LORA = {"peft": "lora", "peft_config": {"r": 2, "lora_dropout": 0.3}, "train_parts": ["time", "ln"]}
STATE = {"peft": "state", "lr_init": 1.0, "lr_final": 0.1}


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def log(tmp_path, folder):
    return [json.loads(line) for line in (tmp_path / folder / "loss_data.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", [{"peft": "none"}, {"peft": "miss", "peft_config": {"r": 2}}, STATE])
def test_a_run_with_exact_gradients_trains_as_one_over_whole_rows(train, tmp_path, method):
    values = {**method, "accumulate_grad_batches": 2, "logit_penalty": 0.1}
    _, whole, _ = train(folder="whole", **values)
    _, chunks, _ = train(folder="chunks", **values, **EXACT)
    for name, parameter in trained(whole).items():
        torch.testing.assert_close(chunks.get_parameter(name), parameter, rtol=1e-3, atol=2e-5, msg=name)
    for left, right in zip(log(tmp_path, "chunks"), log(tmp_path, "whole"), strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-4)
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("long", [EXACT, {**CUT, "precision": "fp16"}])
def test_a_resumed_run_ends_with_the_same_weights_bit_for_bit(train, monkeypatch, long):
    values = {**LORA, "accumulate_grad_batches": 2, "epoch_steps": 8, "epoch_count": 1, **long}
    finish = RwkvModule._finish_step

    def finish_and_stop(self, *args):
        finish(self, *args)
        if self.progress.step == 3:
            raise RuntimeError("power cut")

    _, straight, _ = train(folder="straight", save_steps=2, **values)
    with monkeypatch.context() as patched:
        patched.setattr(RwkvModule, "_finish_step", finish_and_stop)
        with pytest.raises(RuntimeError, match="power cut"):
            train(folder="cut", save_steps=2, **values)
    _, resumed, lines = train(folder="cut", save_steps=2, **values)
    assert any("going on from" in line for line in lines)
    for name, parameter in trained(straight).items():
        assert torch.equal(resumed.get_parameter(name), parameter), name


def test_a_run_cannot_go_on_with_other_chunks(train):
    train(folder="run", **CUT, epoch_count=1)
    with pytest.raises(UserError, match="other settings") as caught:
        train(folder="run", **EXACT, epoch_count=1)
    assert "infctx_grad" in caught.value.found
