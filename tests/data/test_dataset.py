import json
import pickle
from dataclasses import replace

import numpy as np
import pytest

from rwkvpeft.config.groups import DataConfig
from rwkvpeft.data import rows as rows_module
from rwkvpeft.data.binidx import write_binidx
from rwkvpeft.data.dataset import open_dataset
from rwkvpeft.data.sampling import magic_prime_window
from rwkvpeft.errors import UserError

BYTES = DataConfig(tokenizer="bytes", data_shuffle=0)
LATE_ANSWER = "User: " + "a" * 40 + "\n\nAssistant: b"


def open_rows(config, ctx_len=16, vocab_size=65536, seed=1):
    return open_dataset(config, ctx_len=ctx_len, vocab_size=vocab_size, seed=seed)


@pytest.fixture
def binidx(tmp_path):
    def write(*documents):
        write_binidx(tmp_path / "data", [np.array(document) for document in documents])
        return replace(BYTES, data_file=str(tmp_path / "data"))

    return write


@pytest.fixture
def jsonl(tmp_path):
    def write(*records):
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return replace(BYTES, data_file=str(path), data_type="jsonl")

    return write


def texts(*documents):
    return [[*document.encode(), 0] for document in documents]


def trained(row):
    return bytes(row.labels[row.weights > 0].tolist())


@pytest.mark.golden
@pytest.mark.parametrize("tree", ["newest", "june"])
def test_padded_rows_are_those_of_upstream(golden, tree):
    expected = json.loads((golden / f"docs_{tree}.json").read_text())
    config = replace(BYTES, data_file=str(golden / "doclens"))
    dataset = open_rows(config, ctx_len=expected["ctx_len"])
    # upstream keeps a document without any target, here it is left out
    wanted = [row for row in expected["pad"] if max(row["y"]) >= 0]
    assert len(dataset) == len(wanted)
    for index, row in enumerate(wanted):
        got = dataset.row(index)
        assert got.input_ids.tolist() == row["x"]
        assert np.where(got.weights > 0, got.labels, -100).tolist() == row["y"]


@pytest.mark.golden
def test_unpadded_rows_are_those_of_upstream(golden):
    expected = json.loads((golden / "docs_june.json").read_text())
    config = replace(BYTES, data_file=str(golden / "doclens"), dataload="only")
    dataset = open_rows(config, ctx_len=expected["ctx_len"])
    wanted = [row for row in expected["only"] if row["y"]]
    assert len(dataset) == len(wanted)
    for index, row in enumerate(wanted):
        got = dataset.row(index)
        assert (got.input_ids.tolist(), got.labels.tolist()) == (row["x"], row["y"])
        assert got.weights.tolist() == [1] * len(row["x"])


@pytest.mark.golden
def test_windows_are_read_where_rwkv_lm_reads_them(golden):
    config = replace(BYTES, data_file=str(golden / "make_data_a"), dataload="get", magic_prime=113)
    dataset = open_rows(config, ctx_len=64)
    row = dataset.sample(7)
    start = magic_prime_window(7, 113) * 64
    assert row.input_ids.tolist() == dataset.source.tokens(start, 64).tolist()
    assert row.labels.tolist() == dataset.source.tokens(start + 1, 64).tolist()


def test_labels_are_ids_the_model_has_even_where_nothing_is_trained(binidx):
    row = open_rows(binidx([5, 6, 0]), ctx_len=8, vocab_size=7).row(0)
    assert row.input_ids.shape == row.labels.shape == row.weights.shape == (8,)
    assert row.labels.min() >= 0
    assert row.weights.tolist() == [1, 1, 0, 0, 0, 0, 0, 0]


def test_a_prefix_and_the_paths_of_both_files_open_the_same_data(binidx):
    config = binidx([1, 2, 0])
    for suffix in ("", ".bin", ".idx"):
        assert len(open_rows(replace(config, data_file=config.data_file + suffix))) == 1


def test_a_jsonl_file_is_known_by_its_name(jsonl):
    assert len(open_rows(replace(jsonl({"text": "abc"}), data_type="binidx"))) == 1


def test_half_a_pair_is_refused_with_the_missing_half(binidx, tmp_path):
    config = binidx([1, 2, 0])
    (tmp_path / "data.idx").unlink()
    with pytest.raises(UserError, match=r"data\.idx"):
        open_rows(config)


def test_a_token_the_model_does_not_have_is_refused(binidx):
    with pytest.raises(UserError, match="document 1, position 2"):
        open_rows(binidx([1, 0], [1, 2, 9, 0]), vocab_size=9)


def test_answers_are_trained_from_the_roles(jsonl):
    record = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}]}
    dataset = open_rows(replace(jsonl(record), loss_mask="qa"), ctx_len=64)
    assert trained(dataset.row(0)) == b" yes\0"


def test_answers_of_tokenised_documents_are_found_in_the_text(binidx):
    config = binidx(*texts("User: a\n\nAssistant: b\n\nUser: c\n\nAssistant: d"))
    dataset = open_rows(replace(config, loss_mask="qa"), ctx_len=64)
    assert trained(dataset.row(0)) == b" b\n\n d\0"


def test_an_answer_cut_by_the_row_trains_what_is_left_of_it(binidx):
    text = "User: a\n\nAssistant: b\n\nUser: c"
    for ctx_len in range(21, len(text)):
        row = open_rows(replace(binidx(*texts(text)), loss_mask="qa"), ctx_len=ctx_len).row(0)
        assert trained(row) == b" b\n\n"[: ctx_len - 18]


def test_text_between_markers_is_trained(binidx):
    config = binidx(*texts("a<b>c"))
    dataset = open_rows(replace(config, loss_mask="se", mask_id={"mask0": "<", "mask1": ">"}))
    assert trained(dataset.row(0)) == b"b"


def test_documents_without_an_answer_are_counted_and_never_drawn(jsonl):
    config = jsonl({"text": "just text"}, {"text": "Assistant: b"}, {"text": "more"})
    dataset = open_rows(replace(config, loss_mask="qa", data_shuffle=1), ctx_len=32)
    assert len(dataset) == 1
    assert dataset.report().empty_rows == 2
    assert all(trained(dataset.sample(position)) == b" b\0" for position in range(5))


def test_the_report_counts_documents_cut_endings_and_trained_tokens(binidx):
    report = open_rows(binidx([1, 2, 3, 4, 0], [1, 2, 0], [0]), ctx_len=3).report()
    assert (report.documents, report.tokens, report.longest, report.rows) == (3, 9, 5, 2)
    assert (report.trained_tokens, report.cut_endings, report.empty_rows) == (5, 1, 1)
    assert "1 document (33.3 %) longer" in report.render()


@pytest.mark.parametrize("ctx_len", [13, 17, 19, 20, 21, 64])
@pytest.mark.parametrize("mask", ["qa", "se"])
def test_documents_counted_together_count_as_each_alone(binidx, mask, ctx_len):
    config = binidx(*texts("User: a\n\nAssistant: bc", "x", "", "Assistant: d\n\nUser: e"), [0, 1, 0], [65] * 9)
    markers = {"mask0": ":", "mask1": "U"}
    dataset = open_rows(replace(config, loss_mask=mask, mask_id=markers, data_file=config.data_file), ctx_len=ctx_len)
    sizes = [min(int(size), ctx_len + 1) for size in dataset.source.sizes]
    alone = [dataset.rule.weights(dataset.source, index, size)[1:].sum() for index, size in enumerate(sizes)]
    assert dataset.rule.count(dataset.source, sizes) == alone


def test_beyond_the_bound_documents_are_not_scanned_and_the_report_says_so(jsonl, monkeypatch):
    monkeypatch.setattr(rows_module, "SCANNED_DOCUMENTS", 2)
    config = replace(jsonl({"text": "Assistant: b"}, {"text": "a"}, {"text": "c d"}), loss_mask="qa")
    dataset = open_rows(config, ctx_len=32)
    assert len(dataset) == 2
    assert "in the first 2 documents" in dataset.report().render()


@pytest.mark.parametrize(
    ("records", "change", "words"),
    [
        ([{"text": "hello"}], {"loss_mask": "qa"}, ["'hello'", "blank line"]),
        ([{"text": "User: a\nAssistant: b"}], {"loss_mask": "qa"}, ["single newline"]),
        ([{"text": LATE_ANSWER}], {"loss_mask": "qa"}, ["beyond --ctx_len 16", "--ctx_len 60"]),
        ([{"text": "abc"}], {"loss_mask": "se", "mask_id": {"mask0": "<", "mask1": ">"}}, ["'<'"]),
        ([{"text": ""}], {}, ["no document has two tokens"]),
    ],
)
def test_data_in_which_nothing_would_be_trained_are_refused_with_the_reason(jsonl, records, change, words):
    with pytest.raises(UserError) as error:
        open_rows(replace(jsonl(*records), **change))
    assert all(word in str(error.value) for word in words)


def test_the_context_length_that_the_message_suggests_is_long_enough(jsonl):
    config = replace(jsonl({"text": LATE_ANSWER}), loss_mask="qa")
    assert trained(open_rows(config, ctx_len=60).row(0)) == b" b\0"


def test_markers_must_both_be_given(binidx):
    with pytest.raises(UserError, match="mask1"):
        open_rows(replace(binidx([1, 0]), loss_mask="se", mask_id={"mask0": "x"}))


def test_windows_follow_each_other_without_shuffling(binidx):
    dataset = open_rows(replace(binidx(range(1, 12), [12, 0]), dataload="get"), ctx_len=4)
    assert [dataset.sample(position).input_ids.tolist() for position in range(4)] == [
        [1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12], [1, 2, 3, 4]
    ]  # fmt: skip


def test_random_windows_lie_in_the_stream_and_depend_on_the_seed_alone(binidx):
    config = replace(binidx(range(1, 100)), dataload="get", data_shuffle=1)
    draws = [[open_rows(config, seed=seed).sample(p).labels.tolist() for p in range(30)] for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert len({tuple(row) for row in draws[0]}) > 20


def test_windows_keep_the_mask_of_their_documents(binidx):
    config = binidx(*texts("User: a\n\nAssistant: b", "Assistant: c", "x" * 30))
    dataset = open_rows(replace(config, dataload="get", loss_mask="qa"), ctx_len=8)
    assert b"".join(trained(dataset.row(index)) for index in range(len(dataset))) == b" b\0 c\0"
    shuffled = open_rows(replace(config, dataload="get", loss_mask="qa", data_shuffle=1), ctx_len=8)
    assert all(shuffled.sample(position).weights.any() for position in range(50))


def test_a_stream_shorter_than_a_window_is_refused_with_the_least_length(binidx):
    with pytest.raises(UserError, match="17"):
        open_rows(replace(binidx([1] * 15 + [0]), dataload="get"))
    assert len(open_rows(replace(binidx([1] * 16 + [0]), dataload="get"))) == 1


@pytest.mark.parametrize("prime", [7, 8, 11, 29])
def test_a_magic_prime_that_does_not_fit_is_refused_with_one_that_does(binidx, prime):
    config = replace(binidx([1] * 40 + [0]), dataload="get", magic_prime=prime)
    with pytest.raises(UserError, match="--magic_prime 5"):
        open_rows(config, ctx_len=4)


def test_the_last_window_of_a_magic_prime_lies_in_the_stream(binidx):
    dataset = open_rows(replace(binidx([1] * 20 + [0]), dataload="get", magic_prime=5), ctx_len=4)
    assert {dataset.sample(position).labels[-1] for position in range(5)} == {0, 1}


@pytest.mark.parametrize("dataload", ["pad", "only", "get"])
def test_a_dataset_survives_the_way_to_a_worker(jsonl, dataload):
    config = replace(jsonl({"text": "Assistant: b"}, {"text": "Assistant: cc"}), loss_mask="qa", dataload=dataload)
    dataset = open_rows(replace(config, tokenizer="world"), ctx_len=4)
    copy = pickle.loads(pickle.dumps(dataset))
    assert all((left == right).all() for left, right in zip(copy.sample(1)[:3], dataset.sample(1)[:3], strict=True))


@pytest.mark.parametrize(
    ("record", "cause"),
    [
        ({"messages": [{"role": "assistant", "content": "a", "train": False}]}, "a weight above 0"),
        ({"text": "User: a"}, 'no document has "Assistant:"'),
    ],
)
def test_what_leaves_nothing_to_train_is_told(tmp_path, record, cause):
    (tmp_path / "in.jsonl").write_text(json.dumps(record))
    path = str(tmp_path / "in.jsonl")
    config = DataConfig(data_file=path, data_type="jsonl", tokenizer="bytes", loss_mask="last")
    with pytest.raises(UserError, match=cause):
        open_dataset(config, ctx_len=64, vocab_size=256, seed=0)
