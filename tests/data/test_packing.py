import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkvpeft.config.groups import DataConfig
from rwkvpeft.data.binidx import write_binidx
from rwkvpeft.data.datamodule import BatchPlan, TrainLoader, evaluation_batches
from rwkvpeft.data.dataset import open_dataset
from rwkvpeft.data.packing import pack_in_order, pack_tightly
from rwkvpeft.data.preview import preview
from rwkvpeft.errors import ContractError

CTX_LEN = 16
SIZES = [3, 9, 5, 17, 2, 30, 8, 8, 4, 12, 6, 3, 3]

lengths_and_capacity = st.integers(1, 40).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(1, capacity), max_size=60), st.just(capacity))
)


@given(lengths_and_capacity, st.sampled_from([pack_tightly, pack_in_order]))
def test_every_document_is_in_one_row_and_no_row_is_too_long(case, pack):
    lengths, capacity = np.array(case[0], dtype=np.int64), case[1]
    packing = pack(lengths, capacity)
    assert sorted(packing.documents.tolist()) == list(range(len(lengths)))
    rows = [packing.row(index) for index in range(len(packing))]
    assert all(len(row) and lengths[row].sum() <= capacity for row in rows)


@given(lengths_and_capacity)
def test_a_tight_packing_is_the_best_fit_of_the_longest_first(case):
    lengths, capacity = np.array(case[0], dtype=np.int64), case[1]
    rooms = []
    for length in sorted(case[0], reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else capacity) - length)
    packing = pack_tightly(lengths, capacity)
    left = [capacity - int(lengths[packing.row(index)].sum()) for index in range(len(packing))]
    assert sorted(left) == sorted(rooms)


@given(lengths_and_capacity, st.randoms())
def test_the_order_of_the_documents_changes_no_row_of_a_tight_packing(case, random):
    lengths, capacity = np.array(case[0], dtype=np.int64), case[1]
    shuffled = lengths.copy()
    random.shuffle(shuffled)

    def rows(of):
        packing = pack_tightly(of, capacity)
        return [of[packing.row(index)].tolist() for index in range(len(packing))]

    assert rows(shuffled) == rows(lengths)


def test_a_packing_in_order_keeps_the_order_and_fills_a_row_before_the_next():
    packing = pack_in_order(np.array([3, 3, 4, 1, 5, 5]), 10)
    assert [packing.row(index).tolist() for index in range(len(packing))] == [[0, 1, 2], [3, 4], [5]]


def test_a_document_longer_than_a_row_cannot_be_packed():
    with pytest.raises(ContractError, match="11"):
        pack_tightly(np.array([3, 11]), 10)


@pytest.fixture
def config(tmp_path):
    documents = [[number + 1] * (size - 1) + [0] for number, size in enumerate(SIZES)]
    write_binidx(tmp_path / "data", [np.array(document) for document in documents])
    return DataConfig(data_file=str(tmp_path / "data"), tokenizer="bytes", dataload="pack")


def open_rows(config, seed=3, ctx_len=CTX_LEN):
    return open_dataset(config, ctx_len=ctx_len, vocab_size=256, seed=seed)


def documents_of(row):
    """Number and trained tokens of each document of a row; the number is its first token."""
    bounds = itertools.pairwise(np.cumsum([0, *row.lengths]))
    return [(int(row.input_ids[begin]), int(row.weights[begin:end].sum())) for begin, end in bounds]


def test_each_pass_holds_every_document_once_cut_as_when_padded(config):
    dataset = open_rows(config)
    trained = [(number + 1, min(size, CTX_LEN + 1) - 1) for number, size in enumerate(SIZES)]
    for passed in range(3):
        drawn = [dataset.sample(passed * dataset.pass_rows + index) for index in range(dataset.pass_rows)]
        assert sorted(document for row in drawn for document in documents_of(row)) == trained
        assert all(len(row.input_ids) == sum(row.lengths) <= CTX_LEN for row in drawn)


def test_rows_come_in_another_order_in_each_pass_and_depend_on_nothing_but_position_and_seed(config):
    dataset, other = open_rows(config), open_rows(config)
    positions = list(range(3 * dataset.pass_rows))
    drawn = [dataset.sample(position).input_ids.tolist() for position in positions]
    assert [other.sample(position).input_ids.tolist() for position in reversed(positions)] == drawn[::-1]
    one_pass = dataset.pass_rows
    assert drawn[:one_pass] != drawn[one_pass : 2 * one_pass]
    assert [open_rows(config, seed=4).sample(position).input_ids.tolist() for position in positions] != drawn


def test_without_shuffle_documents_stay_in_the_order_of_the_file(config):
    dataset = open_rows(replace(config, data_shuffle=0))
    drawn = [document for position in range(dataset.pass_rows) for document in documents_of(dataset.sample(position))]
    assert [number for number, _ in drawn] == list(range(1, len(SIZES) + 1))


def test_all_rows_of_an_evaluation_hold_every_document_once(config):
    dataset = open_rows(config)
    found = [document for index in range(len(dataset)) for document in documents_of(dataset.row(index))]
    assert sorted(number for number, _ in found) == list(range(1, len(SIZES) + 1))


def test_a_batch_of_packed_rows_is_one_row_that_knows_its_documents(config):
    dataset = open_rows(config)
    plan = BatchPlan(micro_bsz=2, epoch_steps=4, accumulate=2)
    batches = list(TrainLoader(dataset, plan, 0, 4))
    for number, batch in enumerate(batches):
        rows = [dataset.sample(position) for position in plan.positions(number)]
        assert batch.sequences.lengths == rows[0].lengths + rows[1].lengths
        assert batch.input_ids.shape == batch.labels.shape == batch.weights.shape == (1, batch.sequences.tokens)
        assert batch.input_ids[0].tolist() == [*rows[0].input_ids, *rows[1].input_ids]
    shared = batches[0].weights.sum() + batches[1].weights.sum()
    assert batches[0].step_weight == batches[1].step_weight == shared


def test_an_evaluation_counts_as_many_tokens_packed_as_padded(config):
    packed = evaluation_batches(open_rows(config), 2)
    padded = evaluation_batches(open_rows(replace(config, dataload="pad")), 2)
    assert sum(batch.weights.sum() for batch in packed) == sum(batch.weights.sum() for batch in padded)


def test_the_report_tells_how_full_the_rows_are(config):
    text = open_rows(config).report().render()
    tokens = sum(min(size, CTX_LEN + 1) - 1 for size in SIZES)
    rows = -(-tokens // CTX_LEN)
    assert f"rows: {rows} of at most 16 tokens" in text
    filled = 100 * tokens / rows / CTX_LEN
    assert f"packed: {len(SIZES) / rows:.1f} documents a row, {filled:.1f} % of it filled" in text


def test_much_padding_is_told_where_packing_would_spare_it(config):
    padded = open_rows(replace(config, dataload="pad"), ctx_len=64).report().render()
    tokens = sum(SIZES) - len(SIZES)
    assert f"note: {100 - 100 * tokens / 64 / len(SIZES):.0f} % of the rows is padding" in padded
    assert "padding" not in open_rows(replace(config, dataload="pad"), ctx_len=8).report().render()
    assert "padding" not in open_rows(config, ctx_len=64).report().render()


def test_a_preview_shows_each_document_of_a_row_on_its_own(tmp_path):
    write_binidx(tmp_path / "data", [np.array([*text.encode(), 0]) for text in ("ab", "cd")])
    config = DataConfig(data_file=str(tmp_path / "data"), tokenizer="bytes", dataload="pack", data_shuffle=0)
    text = preview(open_rows(config), 1)
    assert "a⟦b<end>⟧\nc⟦d<end>⟧" in text


def test_the_most_crowded_row_is_the_one_with_most_documents_where_they_are_short(config):
    packed = open_rows(config)
    most = max(len(packed.row(index).lengths) for index in range(len(packed)))
    assert len(packed.crowded_row) == most
    assert sum(packed.crowded_row) <= CTX_LEN
    assert open_rows(replace(config, dataload="pad")).crowded_row == ()
