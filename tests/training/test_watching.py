"""Evaluation while training, through the real trainer: what is found, kept, told and left alone."""

from __future__ import annotations

import json

import pytest
import torch

from rwkvpeft.adapters.build import build_adapter
from rwkvpeft.checkpoints.adapter import load_recipe
from rwkvpeft.checkpoints.files import load_tensors
from rwkvpeft.checkpoints.load import load_model
from rwkvpeft.data.loader import evaluation_batches
from rwkvpeft.data.prompts import Prompt
from rwkvpeft.objectives.evaluation import evaluate
from rwkvpeft.training.callbacks.watching import Watched

from .conftest import Rows
from .test_fit import FULL, LORA, STATE, UNEVEN, after_step, crash, terminate, trained


class HeldOut(Rows):
    """Rows that are also evaluated; the same as are trained, but in another number."""

    joining = "equal"

    def row(self, index):
        return self.rows[index]


def lines_of(tmp_path, name="val_data.jsonl", folder="run"):
    return [json.loads(line) for line in (tmp_path / folder / name).read_text().splitlines()]


def test_the_untouched_base_comes_first_then_every_so_many_steps_and_the_end(train, tmp_path, base):
    held_out = HeldOut(5)
    result, model, lines = train(watched=Watched(held_out, micro_bsz=2), val_steps=3)
    found = lines_of(tmp_path)
    assert [line["step"] for line in found] == [0, 3, 6, 8]
    fresh = load_model(base, dtype=torch.float32)
    assert found[0]["val_loss"] == pytest.approx(evaluate(fresh, evaluation_batches(held_out, 5)).loss, rel=1e-6)
    assert found[-1]["val_loss"] == pytest.approx(evaluate(model, evaluation_batches(held_out, 5)).loss, rel=1e-6)
    assert [record.val_loss for record in result.history.records] == [line["val_loss"] for line in found]
    assert sum("held-out loss" in line for line in lines) == 4
