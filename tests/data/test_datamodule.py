from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkvpeft.config.groups import DataConfig, ScheduleConfig
from rwkvpeft.data.binidx import write_binidx
from rwkvpeft.data.datamodule import BatchPlan, TrainingData, TrainLoader, evaluation_batches
from rwkvpeft.data.dataset import open_dataset
from rwkvpeft.errors import UserError

CTX_LEN = 6
N_DOCUMENTS = 23


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Documents 1 to 23: document i is its number, as often as i modulo 5 and one more, and 0."""
    prefix = tmp_path_factory.mktemp("data") / "numbers"
    write_binidx(prefix, [np.array([i] * (i % 5 + 1) + [0]) for i in range(1, N_DOCUMENTS + 1)])
    return DataConfig(data_file=str(prefix), tokenizer="bytes")


@pytest.fixture(scope="module")
def dataset(config):
    return open_dataset(config, ctx_len=CTX_LEN, vocab_size=256, seed=3)


def documents(batches):
    """The documents of each batch: its rows begin with their numbers."""
    return [batch.input_ids[:, 0].tolist() for batch in batches]


def loader(dataset, begin, end, **plan):
    return TrainLoader(dataset, BatchPlan(**plan), begin, end)


def training_data(dataset, config=None, trainer=None, **schedule):
    data = TrainingData(dataset, schedule=ScheduleConfig(**schedule), data=config or DataConfig(), seed=3)
    data.trainer = trainer
    return data


def same(left, right):
    return len(left) == len(right) and all(
        torch.equal(a, b)
        for one, other in zip(left, right, strict=True)
        for a, b in zip(one[:4], other[:4], strict=True)
    )


def test_a_batch_has_the_shapes_and_types_of_its_promise(dataset):
    batch = next(iter(loader(dataset, 0, 1, micro_bsz=4, epoch_steps=1)))
    assert [(tensor.shape, tensor.dtype) for tensor in batch[:3]] == [
        ((4, CTX_LEN), torch.int64),
        ((4, CTX_LEN), torch.int64),
        ((4, CTX_LEN), torch.float32),
    ]
    assert (batch.step_weight.shape, batch.step_weight.dtype) == ((), torch.float64)


def test_one_pass_draws_every_document_once(dataset):
    batches = documents(loader(dataset, 0, N_DOCUMENTS, micro_bsz=1, epoch_steps=N_DOCUMENTS))
    assert sorted(row for batch in batches for row in batch) == list(range(1, N_DOCUMENTS + 1))


@settings(deadline=None, max_examples=25)
@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4]), st.integers(0, 3))
def test_every_optimizer_step_draws_the_same_samples_however_it_is_split(dataset, accumulate, world_size, step):
    if accumulate * world_size > 8:
        world_size = 8 // accumulate
    whole = documents(loader(dataset, step, step + 1, micro_bsz=8, epoch_steps=4))[0]
    drawn = []
    for rank in range(world_size):
        plan = {"micro_bsz": 8 // (accumulate * world_size), "epoch_steps": 4 * accumulate, "accumulate": accumulate}
        part = loader(dataset, step * accumulate, (step + 1) * accumulate, rank=rank, world_size=world_size, **plan)
        drawn += [row for batch in documents(part) for row in batch]
    assert sorted(drawn) == sorted(whole)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 3), st.data())
def test_a_run_resumed_at_any_batch_goes_on_as_if_nothing_had_happened(dataset, epoch_steps, accumulate, rows, draw):
    plan = {"micro_bsz": rows, "epoch_steps": epoch_steps, "accumulate": accumulate, "rank": 1, "world_size": 2}
    everything = list(loader(dataset, 0, 12, **plan))
    start = draw.draw(st.integers(0, 12))
    assert same(list(loader(dataset, start, 12, **plan)), everything[start:])


def test_the_step_weight_is_that_of_all_batches_of_the_step_on_this_rank(dataset):
    batches = list(loader(dataset, 0, 10, micro_bsz=2, epoch_steps=5, accumulate=3, rank=1, world_size=2))
    weights = [float(batch.weights.sum()) for batch in batches]
    expected = [sum(weights[start:stop]) for start, stop in ((0, 3), (3, 5), (5, 8), (8, 10))]
    found = [float(batches[index].step_weight) for index in (0, 3, 5, 8)]
    assert found == expected
    assert all(batches[a].step_weight == batches[b].step_weight for a, b in ((0, 2), (3, 4), (5, 7), (8, 9)))


def test_drawing_batches_leaves_the_random_numbers_of_the_run_alone(dataset):
    before = torch.get_rng_state()
    list(loader(dataset, 0, 3, micro_bsz=2, epoch_steps=3))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_workers_give_the_batches_that_the_process_itself_gives(dataset, start_method):
    plan = BatchPlan(micro_bsz=2, epoch_steps=6, accumulate=2)
    alone = list(TrainLoader(dataset, plan, 1, 6))
    count = 2 if start_method == "fork" else 1
    workers = TrainLoader(
        dataset, plan, 1, 6, num_workers=count, multiprocessing_context=start_method, prefetch_factor=3
    )
    assert same(list(workers), alone)


def test_workers_kept_alive_go_on_with_the_next_mini_epoch(dataset):
    plan = BatchPlan(micro_bsz=2, epoch_steps=4)
    alone = list(TrainLoader(dataset, plan, 0, 8))
    kept = TrainLoader(dataset, plan, 0, 4, num_workers=1, persistent_workers=True)
    first = list(kept)
    kept.select(4, 8)
    assert same(first + list(kept), alone)


def test_mini_epochs_follow_the_trainer_and_meet_without_a_gap(dataset):
    trainer = SimpleNamespace(current_epoch=0, world_size=2, global_rank=1)
    data = training_data(dataset, trainer=trainer, epoch_steps=3, micro_bsz=2)
    drawn = []
    for trainer.current_epoch in range(3):
        assert len(data.train_dataloader()) == 3
        drawn += documents(data.train_dataloader())
    assert drawn == documents(loader(dataset, 0, 9, micro_bsz=2, epoch_steps=3, rank=1, world_size=2))


@pytest.mark.parametrize("restored_epoch", [0, 1])
def test_the_first_mini_epoch_after_a_resume_yields_the_rest(dataset, restored_epoch):
    trainer = SimpleNamespace(current_epoch=restored_epoch, world_size=1, global_rank=0)
    data = training_data(dataset, trainer=trainer, epoch_steps=4, micro_bsz=2)
    data.start_batch = 6
    first = documents(data.train_dataloader())
    trainer.current_epoch += 1
    second = documents(data.train_dataloader())
    assert (len(first), len(second)) == (2, 4)
    assert first + second == documents(loader(dataset, 6, 12, micro_bsz=2, epoch_steps=4))


def test_a_run_that_begins_at_a_later_mini_epoch_goes_on_behind_the_earlier_ones(dataset):
    later = training_data(dataset, epoch_steps=3, micro_bsz=2, epoch_begin=2).train_dataloader()
    assert documents(later) == documents(loader(dataset, 6, 9, micro_bsz=2, epoch_steps=3))


@pytest.mark.parametrize(("world_size", "steps"), [(1, 12), (2, 6), (3, 4), (40, 1)])
def test_no_epoch_steps_means_one_pass_over_the_data(dataset, world_size, steps):
    trainer = SimpleNamespace(current_epoch=0, world_size=world_size, global_rank=0)
    assert training_data(dataset, trainer=trainer, epoch_steps=0, micro_bsz=2).epoch_steps == steps


@pytest.mark.parametrize("change", [{"persistent_workers": True}, {"prefetch_factor": 2}])
def test_worker_flags_without_workers_are_refused(dataset, change):
    with pytest.raises(UserError, match=f"--{next(iter(change))}"):
        training_data(dataset, DataConfig(**change))


def test_rows_of_different_lengths_cannot_share_a_batch(config):
    dataset = open_dataset(replace(config, dataload="only"), ctx_len=CTX_LEN, vocab_size=256, seed=3)
    with pytest.raises(UserError, match="--micro_bsz 1"):
        training_data(dataset, micro_bsz=2)
    lengths = {batch.input_ids.shape for batch in loader(dataset, 0, 9, micro_bsz=1, epoch_steps=9)}
    assert len(lengths) > 2


def test_evaluation_reads_every_row_once_in_order(dataset):
    batches = list(evaluation_batches(dataset, 10))
    assert [row for batch in documents(batches) for row in batch] == list(range(1, N_DOCUMENTS + 1))
    assert [len(batch.input_ids) for batch in batches] == [10, 10, 3]
    assert all(batch.step_weight == batch.weights.sum() for batch in batches)


def test_of_several_that_evaluate_each_reads_its_own_rows_only(dataset, monkeypatch):
    whole = documents(evaluation_batches(dataset, 4))
    read = []
    row = type(dataset).row
    monkeypatch.setattr(type(dataset), "row", lambda self, index: read.append(index) or row(self, index))
    shared = [documents(evaluation_batches(dataset, 4, rank, 2)) for rank in range(2)]
    assert shared == [whole[0::2], whole[1::2]]
    assert len(read) == N_DOCUMENTS


class Recorder(pl.LightningModule):
    """Notes the documents of each batch; trains nothing."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.seen.append(batch.input_ids[:, 0].tolist())

    def configure_optimizers(self):
        return None


def test_a_lightning_trainer_draws_the_mini_epochs_in_turn(dataset, tmp_path):
    module = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=3, reload_dataloaders_every_n_epochs=1, logger=False, default_root_dir=tmp_path,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    data = training_data(dataset, epoch_steps=3, micro_bsz=2)
    data.start_batch = 4
    trainer.fit(module, datamodule=data)
    assert module.seen == documents(loader(dataset, 4, 12, micro_bsz=2, epoch_steps=3))
