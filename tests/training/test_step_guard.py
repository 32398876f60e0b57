"""Steps that cannot be taken, and steps that stand out, through the real Trainer."""

import json
import math
import signal

import numpy as np
import pytest
import torch

from rwkvpeft.cli.run_report import write_report
from rwkvpeft.data.row import Row
from rwkvpeft.errors import UserError
from rwkvpeft.training.spikes import height
from rwkvpeft.training.strategies.build import build_sharing

from .conftest import VOCABULARY, Rows, settings
from .test_fit import after_step

# the last token of the vocabulary, whose embedding no norm can take
POISON = VOCABULARY - 1
LORA = {"peft": "lora", "peft_config": {"r": 2}, "data_shuffle": 0}


@pytest.fixture(scope="module")
def poisoned_base(base, tmp_path_factory):
    """The tiny model, in which one token's embedding is finite and too large to be squared."""
    tensors = torch.load(base, weights_only=True)
    tensors["emb.weight"][POISON] = 3e38
    path = tmp_path_factory.mktemp("poisoned") / "base.pth"
    torch.save(tensors, path)
    return path


class PoisonedRows(Rows):
    """Rows of which some begin with the token that breaks the model; no other holds it."""

    def __init__(self, *poisoned, size=24):
        super().__init__(size)
        self.rows = [Row(row.input_ids % POISON, *row[1:]) for row in self.rows]
        for index in poisoned:
            self.rows[index].input_ids[0] = POISON


def lines(tmp_path, name="loss_data.jsonl", folder="run"):
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    text = (tmp_path / folder / name).read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


@pytest.mark.parametrize("method", [LORA, {"peft": "none"}], ids=["lora", "full"])
def test_all_that_a_broken_step_has_gathered_is_thrown_away(train, tmp_path, poisoned_base, method):
    # steps of two batches of two rows: either batch breaks the second step, and the other one must leave no trace
    short = {"epoch_steps": 6, "epoch_count": 1, "accumulate_grad_batches": 2, "weight_decay": 0.1, **method}
    first, second = (
        train(folder=f"row {row}", checkpoint=poisoned_base, rows=PoisonedRows(row), **short)[1] for row in (5, 7)
    )
    assert [line.get("skipped", False) for line in lines(tmp_path, folder="row 5")] == [False, True, False]
    assert lines(tmp_path, folder="row 5")[1]["loss"] is None
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_broken_step_changes_no_weight(train, poisoned_base, monkeypatch):
    models = []
    for stop in (2, 3):
        with monkeypatch.context() as patched:
            after_step(patched, stop, lambda: signal.raise_signal(signal.SIGTERM))
            models.append(train(folder=f"{stop} steps", checkpoint=poisoned_base, rows=PoisonedRows(5))[1])
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)


def test_the_documents_of_a_broken_step_are_noted(train, tmp_path, poisoned_base):
    _, _, said = train(checkpoint=poisoned_base, rows=PoisonedRows(5), epoch_steps=6, epoch_count=1)
    [fault] = lines(tmp_path, "faults.jsonl")
    assert (fault["step"], fault["kind"], fault["loss"]) == (3, "loss not finite", None)
    assert fault["documents"] == ["row 4", "row 5"]
    assert any("step 3 is left out" in line and "row 5" in line for line in said)


def test_more_broken_steps_in_a_row_than_allowed_end_the_run_with_a_diagnosis(train, poisoned_base):
    with pytest.raises(UserError) as error:
        train(checkpoint=poisoned_base, rows=PoisonedRows(*range(8, 24)), skip_broken=2, epoch_steps=12)
    assert error.value.what == "training diverged at step 7, 3 steps in a row"
    for words in ("all weights are finite", "gradients not finite: emb.weight", "row 12, row 13", "the loss"):
        assert words in error.value.found, words


def test_measuring_a_broken_gradient_leaves_the_others_as_they_are():
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    weights[0].grad, weights[1].grad = torch.tensor([math.inf, 1.0]), torch.tensor([3.0, 4.0])
    norm = build_sharing(settings()).gradient_norm(weights, 1.0)
    assert norm.isinf()
    assert weights[1].grad.tolist() == [3.0, 4.0]


def test_with_none_allowed_the_first_broken_step_ends_the_run(train, poisoned_base):
    with pytest.raises(UserError, match="training diverged at step 3"):
        train(checkpoint=poisoned_base, rows=PoisonedRows(5), skip_broken=0)


def test_broken_steps_are_counted_across_a_resume(train, poisoned_base, monkeypatch):
    values = {"checkpoint": poisoned_base, "skip_broken": 3, "epoch_steps": 12}
    with monkeypatch.context() as patched:
        after_step(patched, 6, lambda: signal.raise_signal(signal.SIGTERM))
        train(rows=PoisonedRows(*range(8, 24)), **values)
    with pytest.raises(UserError, match="at step 8, 4 steps in a row"):
        train(rows=PoisonedRows(*range(8, 24)), **values)


def test_a_sound_step_between_broken_ones_starts_the_count_anew(train, poisoned_base, tmp_path):
    result, _, _ = train(checkpoint=poisoned_base, rows=PoisonedRows(0, 2, 6, 8, 12, 14), skip_broken=2,
                         epoch_steps=12, epoch_count=1)
    assert result.steps == 12
    assert sum(line.get("skipped", False) for line in lines(tmp_path)) == 6


def test_a_run_whose_last_steps_were_left_out_says_so_at_its_end(train, poisoned_base):
    _, _, said = train(checkpoint=poisoned_base, rows=PoisonedRows(*range(16, 24)), epoch_steps=12, epoch_count=1)
    assert said[-1].startswith("warning: steps left out at the end, as not finite: 4")


def test_the_picture_and_the_report_of_a_run_with_broken_steps_are_written(train, poisoned_base, tmp_path):
    result, _, _ = train(checkpoint=poisoned_base, rows=PoisonedRows(0, 23), epoch_steps=12, epoch_count=1)
    config = settings(proj_dir=str(tmp_path / "run"))
    text = write_report(config, result, beginning=[], ending=[]).read_text()
    assert "| 12 | loss not finite |  | row 22, row 23 |" in text
    assert "nan" not in text


class SpikyRows(Rows):
    """Rows of one text that is easy to learn, but for one row of another."""

    def __init__(self, odd, size=64):
        super().__init__(size)
        for row in self.rows:
            row.input_ids[:] = row.labels[:] = 1
            row.weights[:] = 1
        self.rows[odd].labels[:] = np.arange(len(self.rows[odd].labels)) + 3


def test_a_spike_is_noted_with_each_documents_own_loss(train, tmp_path):
    _, _, said = train(rows=SpikyRows(61), epoch_steps=32, epoch_count=1, lr_init=3e-2)
    [fault] = lines(tmp_path, "faults.jsonl")
    assert (fault["step"], fault["kind"], fault["documents"]) == (31, "loss spike", ["row 60", "row 61"])
    assert fault["losses"][1] > 10 * fault["losses"][0]
    [line] = [line for line in said if "standard deviations" in line]
    assert "it held row 61 (" in line


def test_looking_at_a_spike_changes_nothing_of_the_run(train):
    models = [
        train(folder=f"run{spike}", rows=SpikyRows(41), spike=spike, epoch_steps=32, epoch_count=1, dropout=0.1)[1]
        for spike in (6.0, 0.0)
    ]
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)


def test_with_0_no_spike_is_looked_for(train, tmp_path):
    train(rows=SpikyRows(61), epoch_steps=32, epoch_count=1, spike=0.0)
    assert not (tmp_path / "run" / "faults.jsonl").exists()


def test_too_few_losses_tell_of_no_spike():
    assert height([1.0] * 19, 100.0) is None
    assert height([1.0] * 20, 1.06) == pytest.approx(6.0)


def test_spikes_among_the_losses_do_not_hide_another():
    losses = [2.0 + 0.1 * (-1) ** number for number in range(90)] + [50.0] * 10
    assert height(losses, 50.0) > 100
    assert abs(height(losses, 2.1)) < 2
