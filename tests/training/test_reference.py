"""What the model said before training: worked out once, kept, read again, and refused where it is another's."""

from __future__ import annotations

import signal
from dataclasses import fields

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from rwkvpeft.adapters.build import build_adapter
from rwkvpeft.checkpoints.adapter import Recipe
from rwkvpeft.checkpoints.files import fingerprint, load_tensors, save_tensors
from rwkvpeft.checkpoints.load import load_model
from rwkvpeft.config.groups import TrainConfig
from rwkvpeft.data.datamodule import TrainingData
from rwkvpeft.data.jsonl import Record
from rwkvpeft.data.loader import evaluation_batches
from rwkvpeft.data.pair_source import PairSource
from rwkvpeft.data.pairs import PairRows
from rwkvpeft.data.tokenizer import load_tokenizer
from rwkvpeft.errors import UserError
from rwkvpeft.models.shape import new_shape
from rwkvpeft.objectives.base import Provided
from rwkvpeft.objectives.preference.scores import score_answers
from rwkvpeft.registry import MODELS, find
from rwkvpeft.training.fit import fit
from rwkvpeft.training.reference import KeepReference, load_reference, logprobs_of_rows, save_reference

STAMP = {"base": "abc", "data": "d1", "ctx_len": 64}
SETTINGS = {
    "epoch_steps": 2, "epoch_count": 1, "micro_bsz": 2, "lr_init": 1e-2, "lr_final": 1e-2, "warmup_steps": -1,
    "train_parts": ["none"], "accelerator": "cpu", "precision": "fp32", "random_seed": 5, "ctx_len": 64, "merge": 0,
    "dropout": 0.2, "objective": "dpo", "reference": "start",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(1)
    shape = new_shape("x070", n_layer=2, n_embd=16, vocab_size=256, head_size=8)
    weights = find(MODELS, "x070", flag="").initial_weights(shape)
    path = tmp_path_factory.mktemp("base") / "base.pth"
    save_tensors(path, {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in weights.items()})
    return path


def pairs(answers=2, count=5):
    records = [
        Record(line, {"prompt": "ab"[: line % 3] + "?", "chosen": "yes" * line, "rejected": "no" + "!" * line})
        for line in range(1, count + 1)
    ]
    source = PairSource("in.jsonl", records, load_tokenizer("bytes"), unpaired=answers == 3)
    rows = PairRows(source, 64, seed=1, shuffle=True, answers=answers)
    rows.tokenizer = "bytes"
    return rows


def settings(base, folder, **values):
    values = {**SETTINGS, "load_model": str(base), "proj_dir": str(folder), **values}
    groups = {}
    for group in fields(TrainConfig):
        cls = getattr(__import__("rwkvpeft.config.groups", fromlist=[group.type]), group.type)
        names = {item.name for item in fields(cls)}
        groups[group.name] = cls(**{name: values.pop(name) for name in list(values) if name in names})
    assert not values, values
    return TrainConfig(**groups)


class Stop(pl.Callback):
    """Asks the run to end after its first step."""

    def on_train_batch_end(self, *_):
        signal.raise_signal(signal.SIGTERM)


@pytest.fixture
def run(base, tmp_path):
    """Train in a folder; returns the model, the rows, and the lines it said."""

    def train(folder="run", *, stamp=STAMP, held_out=None, stop=False, **values):
        config = settings(base, tmp_path / folder, **values)
        adapter = build_adapter(config.method.peft, config.method.peft_config, config.method.train_parts)
        model = load_model(base, dtype=torch.float32)
        model.regularise(dropout=config.method.dropout)
        if adapter is not None:
            torch.manual_seed(5)
            adapter.attach(model)
        rows = pairs(3 if config.objective.objective == "kto" else 2)
        lines = []
        keep = KeepReference(
            {"": rows} if held_out is None else {"": rows, "held_out": held_out}, [tmp_path / folder], stamp,
            micro_bsz=2, report=lines.append,
        )
        data = TrainingData(rows, schedule=config.schedule, data=config.data, seed=5)
        recipe = Recipe(method=config.method.peft, base_fingerprint=fingerprint(base))
        also = [keep, Stop()] if stop else [keep]
        fit(model=model, adapter=adapter, data=data, config=config, recipe=recipe, report=lines.append, also=also)
        return model, rows, lines

    return train


def said_before(base, rows):
    """What the untrained base says of the rows, one at a time."""
    model = load_model(base, dtype=torch.float32)
    reference, rows.reference = rows.reference, None
    with torch.no_grad():
        found = [score_answers(model, batch, Provided()).logprobs for batch in evaluation_batches(rows, 1)]
    rows.reference = reference
    return torch.cat(found).numpy()


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_full_training_compares_with_the_model_it_began_with(objective, run, base, tmp_path):
    model, rows, _ = run(objective=objective)
    np.testing.assert_allclose(rows.reference, said_before(base, rows), rtol=1e-5)
    kept, _ = load_reference(tmp_path / "run" / "reference.pth", {**STAMP, "answers": rows.answers, "rows": len(rows)})
    assert np.array_equal(kept, rows.reference)
    # rows carry it to the objective, and the model has moved away from it
    batch = next(evaluation_batches(rows, 2))
    assert np.array_equal(batch.reference.numpy(), rows.reference[:2])
    with torch.no_grad():
        assert (score_answers(model, batch, Provided()).logprobs - batch.reference).abs().max() > 1e-3


def test_held_out_rows_have_a_reference_and_a_file_of_their_own(run, base, tmp_path):
    held_out = pairs(count=3)
    run(held_out=held_out)
    np.testing.assert_allclose(held_out.reference, said_before(base, held_out), rtol=1e-5)
    assert (tmp_path / "run" / "reference_held_out.pth").exists()


def test_a_run_that_is_taken_up_reads_what_was_kept(run, tmp_path):
    _, rows, _ = run(stop=True)
    path = tmp_path / "run" / "reference.pth"
    written = path.stat().st_mtime_ns
    _, again, lines = run()
    assert any("reference: log-probabilities of 5 prompts' answers from" in line for line in lines)
    assert np.array_equal(rows.reference, again.reference)
    assert path.stat().st_mtime_ns == written


def test_resuming_ends_where_a_straight_run_does(run):
    straight, _, _ = run("straight")
    run("halves", stop=True)
    resumed, _, _ = run("halves")
    ours, theirs = resumed.state_dict(), straight.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(("stamp", "found"), [(None, "no such file"), ({**STAMP, "data": "d2"}, "one of another data")])
def test_a_run_that_is_taken_up_without_what_was_kept_is_refused(stamp, found, run, tmp_path):
    run(stop=True)
    if stamp is None:
        (tmp_path / "run" / "reference.pth").unlink()
    with pytest.raises(UserError, match="weights that it compares with are gone") as caught:
        run(stamp=stamp or STAMP)
    assert caught.value.found == found


def test_a_new_run_takes_no_file_of_another(run, base, tmp_path):
    path = tmp_path / "run" / "reference.pth"
    save_reference(path, np.zeros((5, 2), dtype=np.float32), {**STAMP, "base": "other", "answers": 2, "rows": 5})
    _, rows, _ = run()
    assert (rows.reference < 0).all()
    assert (load_tensors(path)["logprobs"].numpy() == rows.reference).all()


def test_ranks_share_the_rows(base):
    model, rows = load_model(base, dtype=torch.float32), pairs()
    whole = logprobs_of_rows(model, rows, Provided(), micro_bsz=2)
    parts = [
        logprobs_of_rows(model, rows, Provided(), micro_bsz=2, rank=rank, world_size=2, equally_many=True)
        for rank in range(2)
    ]
    assert torch.equal(parts[0] + parts[1], whole)
    assert (parts[0] == 0).any()


@pytest.mark.parametrize("broken", [
    {"logprobs": torch.zeros(5, 2)}, {"logprobs": torch.zeros(5, 2), "stamp": torch.zeros(3)},
    {"logprobs": torch.full((5, 2), torch.nan), "stamp": torch.tensor([123, 125], dtype=torch.uint8)},
    {"stamp": torch.zeros(2, dtype=torch.uint8)},
])
def test_a_file_of_something_else_is_refused(broken, tmp_path):
    save_tensors(tmp_path / "reference.pth", broken)
    with pytest.raises(UserError, match="holds no log-probabilities of a reference"):
        load_reference(tmp_path / "reference.pth", {})
