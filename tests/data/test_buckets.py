import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkvpeft.config.groups import DataConfig
from rwkvpeft.data.binidx import write_binidx
from rwkvpeft.data.buckets import Buckets
from rwkvpeft.data.datamodule import BatchPlan, TrainLoader, evaluation_batches
from rwkvpeft.data.dataset import open_dataset
from rwkvpeft.data.rows import DocumentDataset
from rwkvpeft.data.sampling import sample_indices


class Lengths(DocumentDataset):
    """Documents of which nothing but their lengths is known."""

    seed, shuffle = 5, True

    def __init__(self, lengths):
        super().__init__(ctx_len=64)
        self.lengths = np.array(lengths)

    def __len__(self):
        return len(self.lengths)

    def indices(self, positions):
        return sample_indices(positions, len(self), self.seed, self.shuffle)

    def row(self, index):
        raise NotImplementedError

    draw = report = label = replaced = row


lengths = st.lists(st.integers(1, 64), min_size=1, max_size=50)


@given(lengths, st.integers(1, 12))
def test_each_pass_draws_every_document_once(given_lengths, together):
    n = len(given_lengths)
    buckets = Buckets(Lengths(given_lengths), together)
    for passed in range(3):
        drawn = [buckets.index(position) for position in range(passed * n, (passed + 1) * n)]
        assert sorted(drawn) == list(range(n))


@given(lengths, st.integers(1, 12))
def test_lengths_of_documents_drawn_together_overlap_with_those_of_no_other_group(given_lengths, together):
    n, documents = len(given_lengths), Lengths(given_lengths)
    buckets = Buckets(documents, together)
    first = -(-n // together)
    groups = [
        sorted(given_lengths[buckets.index(group * together + row)] for row in range(together))
        for group in range(first, 2 * n // together)
    ]
    groups.sort()
    assert all(one[-1] <= other[0] for one, other in itertools.pairwise(groups))


def test_groups_come_in_another_order_in_each_pass():
    buckets = Buckets(Lengths(range(1, 65)), 4)
    passes = [[buckets.index(passed * 64 + 4 * group) // 4 for group in range(16)] for passed in range(2)]
    assert passes[0] != passes[1] != sorted(passes[1])


SIZES = [3, 9, 5, 17, 2, 30, 8, 8, 4, 12, 6, 3, 3, 20, 11, 10]


@pytest.fixture
def dataset(tmp_path):
    write_binidx(tmp_path / "data", [np.array([n + 1] * (size - 1) + [0]) for n, size in enumerate(SIZES)])
    config = DataConfig(data_file=str(tmp_path / "data"), tokenizer="bytes", length_buckets=True)
    return open_dataset(config, ctx_len=16, vocab_size=256, seed=3)


def test_a_batch_is_as_long_as_its_longest_document(dataset):
    for batch in TrainLoader(dataset, BatchPlan(micro_bsz=2, epoch_steps=8), 0, 8):
        lengths = batch.weights.sum(1).tolist()
        assert batch.input_ids.shape == (2, max(lengths))
        assert [int((row != 0).sum()) for row in batch.input_ids] == lengths


def test_batches_of_all_ranks_at_one_step_have_similar_lengths(dataset):
    ranks = [
        list(TrainLoader(dataset, BatchPlan(micro_bsz=2, epoch_steps=4, rank=rank, world_size=2), 0, 4))
        for rank in range(2)
    ]
    drawn = [
        sorted(int(weight) for batch in step for weight in batch.weights.sum(1)) for step in zip(*ranks, strict=True)
    ]
    every = sorted(min(size, 17) - 1 for size in SIZES)
    assert sorted(drawn) == [every[begin : begin + 4] for begin in range(0, 16, 4)]


def test_an_evaluation_goes_by_length_and_counts_what_padded_rows_count(dataset, tmp_path):
    batches = list(evaluation_batches(dataset, 3))
    longest = [batch.input_ids.shape[1] for batch in batches]
    assert longest == sorted(longest)
    padded = replace(DataConfig(data_file=str(tmp_path / "data"), tokenizer="bytes"), dataload="pad")
    whole = evaluation_batches(open_dataset(padded, ctx_len=16, vocab_size=256, seed=3), 3)
    assert sum(batch.weights.sum() for batch in batches) == sum(batch.weights.sum() for batch in whole)


def test_a_run_taken_up_draws_what_an_uninterrupted_one_draws(dataset):
    plan = BatchPlan(micro_bsz=3, epoch_steps=20)
    through = [batch.input_ids.tolist() for batch in TrainLoader(dataset, plan, 0, 20)]
    assert [batch.input_ids.tolist() for batch in TrainLoader(dataset, plan, 13, 20)] == through[13:]
