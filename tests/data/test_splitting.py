import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkvpeft.config.groups import DataConfig
from rwkvpeft.data.binidx import BinidxSource, write_binidx
from rwkvpeft.data.dataset import open_split
from rwkvpeft.data.source import TokenSource
from rwkvpeft.data.splitting import shared_out, split_source, without_copies
from rwkvpeft.errors import ContractError, UserError


class Numbers(TokenSource):
    """Documents of the tokens 0, 1, 2 and so on over all of them."""

    name = "numbers"

    def __init__(self, sizes):
        self.sizes = np.array(sizes, dtype=np.int32)
        self.starts = np.cumsum(self.sizes, dtype=np.int64) - self.sizes
        self.stream = np.arange(self.sizes.sum())


sources = st.lists(st.integers(1, 5), min_size=2, max_size=40).map(Numbers)


def texts(source):
    return [source.read(index).tolist() for index in range(len(source))]


@given(sources, st.data())
def test_every_document_is_on_one_side_and_the_count_is_what_was_asked(source, data):
    count = data.draw(st.integers(1, len(source) - 1))
    trained, held_out = split_source(source, count, seed=data.draw(st.integers(0, 100)))
    assert len(held_out) == count
    assert sorted(texts(trained) + texts(held_out)) == texts(source)


@given(sources, st.data())
def test_the_stream_of_some_documents_is_theirs_alone(source, data):
    trained, _ = split_source(source, 1, seed=0)
    whole = [token for text in texts(trained) for token in text]
    assert trained.n_tokens == len(whole)
    start = data.draw(st.integers(0, len(whole)))
    length = data.draw(st.integers(0, len(whole) - start))
    assert trained.tokens(start, length).tolist() == whole[start : start + length]
    with pytest.raises(ContractError):
        trained.tokens(start, len(whole) - start + 1)


def test_a_split_depends_on_the_seed_and_the_number_of_documents_alone():
    one, other = Numbers([2] * 50), Numbers([5] * 50)
    chosen = split_source(one, 0.2, seed=1)[1].documents.tolist()
    assert len(chosen) == 10
    assert split_source(other, 0.2, seed=1)[1].documents.tolist() == chosen
    assert split_source(one, 0.2, seed=2)[1].documents.tolist() != chosen


@pytest.mark.parametrize(("sizes", "share"), [([3], 0.5), ([3, 3], 2), ([3, 3, 3], 0.99)])
def test_neither_side_may_be_empty(sizes, share):
    with pytest.raises(UserError, match="--val_split"):
        split_source(Numbers(sizes), share, seed=0)


@given(st.integers(0, 50), st.lists(st.integers(1, 100), min_size=1, max_size=5))
def test_a_number_of_documents_is_shared_out_by_size(count, sizes):
    counts = shared_out(count, sizes)
    assert sum(counts) == count
    assert all(abs(own - count * size / sum(sizes)) < 1 for own, size in zip(counts, sizes, strict=True))


def split(config, share, **change):
    return open_split(replace(config, **change), share, ctx_len=12, vocab_size=256, seed=3)


def firsts(dataset):
    return [int(dataset.row(index).input_ids[0]) for index in range(len(dataset))]


@pytest.fixture
def config(tmp_path):
    write_binidx(tmp_path / "data", [np.array([number] * 7 + [0]) for number in range(1, 21)])
    return DataConfig(data_file=str(tmp_path / "data"), tokenizer="bytes")


@pytest.mark.parametrize("dataload", ["pad", "only", "pack", "get"])
def test_no_token_of_a_held_out_document_is_in_a_trained_row(config, dataload):
    trained, held_out = split(config, 0.25, dataload=dataload)

    def tokens(dataset, draw):
        rows = [draw(dataset)(index) for index in range(dataset.pass_rows)]
        return {int(token) for row in rows for token in (*row.input_ids, *row.labels)} - {0}

    held = tokens(held_out, lambda dataset: dataset.row)
    assert len(held) == 5
    assert not held & tokens(trained, lambda dataset: dataset.sample)


def test_who_says_a_token_is_known_on_both_sides(tmp_path):
    path = tmp_path / "chat.jsonl"
    chats = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": "abc"[n % 3] * (n + 1)}]
             for n in range(9)]
    path.write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    config = DataConfig(data_file=str(path), data_type="jsonl", tokenizer="bytes", loss_mask="qa")
    sides = open_split(config, 3, ctx_len=64, vocab_size=256, seed=3)
    assert [len(side) for side in sides] == [6, 3]
    rows = [side.row(index) for side in sides for index in range(len(side))]
    found = sorted(bytes(row.labels[row.weights > 0].tolist()).strip(b" \0").decode() for row in rows)
    assert found == sorted(chat[1]["content"] for chat in chats)


def test_each_file_of_a_mixture_gives_its_part(config, tmp_path):
    write_binidx(tmp_path / "more", [np.array([number] * 7 + [0]) for number in range(101, 111)])
    files = f"{config.data_file}:1,{tmp_path / 'more'}:1"
    trained, held_out = split(config, 6, data_file=files)
    assert (sum(first < 100 for first in firsts(held_out)), len(held_out)) == (4, 6)
    assert not set(firsts(trained)) & set(firsts(held_out))


@pytest.mark.parametrize("dataload", ["pad", "pack", "get"])
def test_no_copy_of_a_held_out_document_is_trained(config, tmp_path, dataload):
    # as make_data.py writes them for several epochs, and once more in another file
    copies = [np.array([number] * 7 + [0]) for number in [*range(1, 21)] * 2]
    write_binidx(tmp_path / "copies", copies)
    files = f"{tmp_path / 'copies'}:1,{config.data_file}:1"
    trained, held_out = split(config, 6, data_file=files, dataload=dataload)
    held = {int(token) for index in range(len(held_out)) for token in held_out.row(index).input_ids} - {0}
    rows = [trained.row(index) for index in range(len(trained))]
    seen = {int(token) for row in rows for token in (*row.input_ids, *row.labels)} - {0}
    assert not held & seen
    assert len(held | seen) == 20 or dataload == "get"
    assert any("copies of held-out documents" in note for note in trained.report().notes)


def test_documents_that_only_begin_and_end_alike_are_no_copies():
    source = Numbers([200] * 4)
    alike = [np.array([1] * 90 + [number] + [1] * 90) for number in range(4)]
    source.sizes = np.array([181] * 4, dtype=np.int32)
    source.starts = np.cumsum(source.sizes, dtype=np.int64) - source.sizes
    source.stream = np.concatenate(alike)
    trained, held_out = split_source(source, 1, seed=0)
    assert without_copies(trained, [held_out]) is trained


def test_data_that_repeat_one_document_cannot_be_split(tmp_path):
    write_binidx(tmp_path / "data", [np.array([5, 6, 7, 0])] * 3)
    with pytest.raises(UserError, match="a copy of a held-out one"):
        split(DataConfig(data_file=str(tmp_path / "data"), tokenizer="bytes"), 1)


def test_a_worker_is_sent_the_name_of_a_mapped_file_not_its_tokens(tmp_path):
    write_binidx(tmp_path / "data", [np.arange(50_000) % 250 + 1] * 4)
    trained, _ = split_source(BinidxSource(tmp_path / "data"), 1, seed=0)
    sent = pickle.dumps(trained)
    assert len(sent) < 5000
    assert texts(pickle.loads(sent)) == texts(trained)
