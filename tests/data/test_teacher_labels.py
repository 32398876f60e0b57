"""Stored words of a teacher: as a live one says them, beside exactly their tokens."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from rwkvpeft.checkpoints.load import build_model, fill_model, operator_of
from rwkvpeft.config.groups import DataConfig
from rwkvpeft.data.dataset import open_dataset, open_source, open_split
from rwkvpeft.data.loader import BatchPlan, TrainLoader, evaluation_batches
from rwkvpeft.data.teacher_labels import TeacherLabels, with_labels
from rwkvpeft.data.tensor_file import TensorFile, write_arrays
from rwkvpeft.errors import UserError
from rwkvpeft.generation.labelling import LabelSettings, begin, index_of, write_labels
from rwkvpeft.models.shape import new_shape
from rwkvpeft.objectives.teaching import Teacher
from rwkvpeft.registry import BACKENDS, MODELS, find

DATA = DataConfig(data_type="jsonl", tokenizer="bytes", data_shuffle=0)
TEXTS = ["a short one", "b", "c" * 3 + " and a rather longer document that goes on and on", "d e f", "", "the last one"]
SETTINGS = LabelSettings(5, "fp32", (1.0, 2.0), ctx_len=0, shard_places=23, tokens_at_once=16, chunk_rows=4)


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(1)
    shape = new_shape("x060", n_layer=2, n_embd=16, vocab_size=256, head_size=8)
    model = build_model(shape, find(BACKENDS[operator_of(shape)], "torch", flag="").run)
    weights = find(MODELS, "x060", flag="").initial_weights(shape)
    weights = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in weights.items()}
    fill_model(model, weights, device="cpu", dtype=torch.float32, source="")
    return model.requires_grad_(False).eval()


def data_of(folder, texts=TEXTS, name="data.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return replace(DATA, data_file=str(path))


def labels_of(teacher, folder, config, settings=SETTINGS, shards=None, tell=lambda places: None):
    sources = [open_source(replace(config, data_file=path)) for path in config.data_file.split(",")]
    index = index_of("t.pth", "f", 256, sources, settings)
    missing = begin(folder, index, sources)
    write_labels(teacher, sources, folder, index, settings, missing if shards is None else shards, tell)
    return folder


def open_rows(config, ctx_len=100, **settings):
    return open_dataset(replace(config, **settings), ctx_len=ctx_len, vocab_size=256, seed=1)


def assert_as_live(teacher, batch, top_k=5, temperature=2.0, **tolerance):
    expected = Teacher(teacher, top_k, temperature).label(batch)
    counted = batch.weights > 0
    assert torch.equal(batch.teacher_ids[counted], expected.teacher_ids[counted])
    for name in ("teacher_logprobs", "teacher_tail"):
        torch.testing.assert_close(getattr(batch, name)[counted], getattr(expected, name)[counted],
                                   **{"atol": 2e-5, "rtol": 2e-5, **tolerance})


@pytest.mark.parametrize("ctx_len", [100, 9])
@pytest.mark.parametrize(
    "rows",
    [{"dataload": "pad"}, {"dataload": "only"}, {"dataload": "pack"}, {"length_buckets": True, "data_shuffle": 1}],
    ids=lambda rows: next(iter(rows.values())),
)
def test_stored_words_are_those_of_a_live_teacher(teacher, tmp_path, rows, ctx_len):
    config = data_of(tmp_path)
    folder = labels_of(teacher, tmp_path / "labels", config)
    dataset = with_labels(open_rows(config, ctx_len, **rows), TeacherLabels(folder, top_k=5, temperature=2.0))
    size = 1 if rows.get("dataload") == "only" else 2
    for batch in evaluation_batches(dataset, size):
        assert_as_live(teacher, batch)


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp16", 2e-3), ("bf16", 2e-2)])
def test_low_precision_is_as_close_as_its_numbers(teacher, tmp_path, dtype, tolerance):
    config = data_of(tmp_path)
    folder = labels_of(teacher, tmp_path / "labels", config, replace(SETTINGS, dtype=dtype))
    dataset = with_labels(open_rows(config), TeacherLabels(folder, top_k=5, temperature=2.0))
    for batch in evaluation_batches(dataset, 2):
        assert_as_live(teacher, batch, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_fewer_tokens_than_stored_add_the_others_to_the_rest(teacher, tmp_path, temperature):
    config = data_of(tmp_path)
    folder = labels_of(teacher, tmp_path / "labels", config)
    dataset = with_labels(open_rows(config), TeacherLabels(folder, top_k=2, temperature=temperature))
    for batch in evaluation_batches(dataset, 2):
        assert_as_live(teacher, batch, 2, temperature)


@pytest.mark.parametrize("top_k", [0, 999])
def test_all_that_is_stored_is_taken_where_more_is_asked_for(teacher, tmp_path, top_k):
    folder = labels_of(teacher, tmp_path / "labels", data_of(tmp_path))
    assert TeacherLabels(folder, top_k=top_k, temperature=1.0).top_k == 5


def test_all_tokens_leave_no_rest(teacher, tmp_path):
    config = data_of(tmp_path)
    folder = labels_of(teacher, tmp_path / "labels", config, replace(SETTINGS, top_k=0))
    dataset = with_labels(open_rows(config), TeacherLabels(folder, top_k=0, temperature=1.0))
    row = dataset.row(0)
    assert row.beside["teacher_ids"].shape == (len(row.input_ids), 256)
    assert np.isneginf(row.beside["teacher_tail"][row.weights > 0]).all()


@pytest.mark.parametrize("tokens_at_once", [1, 7, 4096])
@pytest.mark.parametrize("shard_places", [1, 10, 1000])
def test_labels_do_not_depend_on_how_the_work_is_cut(teacher, tmp_path, shard_places, tokens_at_once):
    config = data_of(tmp_path)
    settings = replace(SETTINGS, shard_places=shard_places, tokens_at_once=tokens_at_once)
    dataset = with_labels(open_rows(config), TeacherLabels(
        labels_of(teacher, tmp_path / "labels", config, settings), top_k=5, temperature=2.0))
    for batch in evaluation_batches(dataset, 2):
        assert_as_live(teacher, batch)


def test_a_shard_of_many_tokens_told_apart_stays_small(tmp_path):
    settings = replace(SETTINGS, top_k=0, shard_places=1 << 18)
    index = index_of("t.pth", "f", 65536, [open_source(data_of(tmp_path))], settings)
    assert index.shard_places * index.bytes_per_place <= 1 << 30


def test_every_place_is_told_once(teacher, tmp_path):
    told = []
    labels_of(teacher, tmp_path / "labels", data_of(tmp_path), tell=told.append)
    assert sum(told) == sum(len(text) for text in TEXTS)


def test_work_that_was_stopped_goes_on_and_gives_the_same_files(teacher, tmp_path):
    config = data_of(tmp_path)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    labels_of(teacher, whole, config)
    labels_of(teacher, parts, config, shards=[0])
    labels_of(teacher, parts, config)
    names = sorted(path.name for path in whole.iterdir())
    assert names == sorted(path.name for path in parts.iterdir())
    first, second = (TeacherLabels(folder, top_k=5, temperature=1.0) for folder in (whole, parts))
    inputs = np.frombuffer(TEXTS[2].encode(), np.uint8).astype(np.int64)
    for name, array in first.of(2, inputs, len(inputs)).items():
        np.testing.assert_allclose(array, second.of(2, inputs, len(inputs))[name], atol=1e-5)


def test_a_finished_shard_is_not_made_again(teacher, tmp_path):
    config = data_of(tmp_path)
    folder = labels_of(teacher, tmp_path / "labels", config)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    labels_of(teacher, folder, config)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_other_settings_do_not_go_on_with_a_folder(teacher, tmp_path):
    config = data_of(tmp_path)
    folder = labels_of(teacher, tmp_path / "labels", config, shards=[0])
    with pytest.raises(UserError, match="made in another way"):
        labels_of(teacher, folder, config, replace(SETTINGS, top_k=6))


def test_labels_that_are_not_complete_are_refused(teacher, tmp_path):
    folder = labels_of(teacher, tmp_path / "labels", data_of(tmp_path), shards=[0, 1])
    with pytest.raises(UserError, match="not complete") as refusal:
        TeacherLabels(folder, top_k=5, temperature=1.0)
    assert "shard 2 of" in str(refusal.value)


def test_a_temperature_that_is_not_stored_is_refused_with_those_that_are(teacher, tmp_path):
    folder = labels_of(teacher, tmp_path / "labels", data_of(tmp_path))
    with pytest.raises(UserError, match="--distill_temperature 3 is not stored") as refusal:
        TeacherLabels(folder, top_k=5, temperature=3.0)
    assert refusal.value.found == "1 2"


@pytest.mark.parametrize("texts", [[*TEXTS, "one more"], [*TEXTS[:-1], "the LAST one"]], ids=["documents", "tokens"])
def test_labels_of_other_data_are_refused(teacher, tmp_path, texts):
    labels = TeacherLabels(labels_of(teacher, tmp_path / "labels", data_of(tmp_path)), top_k=5, temperature=1.0)
    with pytest.raises(UserError, match="not those of"):
        with_labels(open_rows(data_of(tmp_path, texts, "other.jsonl")), labels)


def test_tokens_too_many_to_compare_are_compared_when_they_are_read(teacher, tmp_path, monkeypatch):
    labels = TeacherLabels(labels_of(teacher, tmp_path / "labels", data_of(tmp_path)), top_k=5, temperature=1.0)
    monkeypatch.setattr("rwkvpeft.data.teacher_labels.SCANNED_TOKENS", 3)
    dataset = with_labels(open_rows(data_of(tmp_path, [*TEXTS[:-1], "the LAST one"], "other.jsonl")), labels)
    dataset.row(0)
    with pytest.raises(UserError, match="other tokens than the data, in document 5"):
        dataset.row(len(dataset) - 1)


def test_windows_have_no_stored_labels(teacher, tmp_path):
    config = data_of(tmp_path)
    labels = TeacherLabels(labels_of(teacher, tmp_path / "labels", config), top_k=5, temperature=1.0)
    with pytest.raises(UserError, match="windows") as refusal:
        with_labels(open_rows(config, ctx_len=8, dataload="get"), labels)
    assert "--dataload pad or pack" in refusal.value.fix


def test_labels_of_short_documents_do_not_serve_long_rows(teacher, tmp_path):
    config = data_of(tmp_path)
    folder = labels_of(teacher, tmp_path / "labels", config, replace(SETTINGS, ctx_len=9))
    labels = TeacherLabels(folder, top_k=5, temperature=2.0)
    for batch in evaluation_batches(with_labels(open_rows(config, 9), labels), 2):
        assert_as_live(teacher, batch)
    with pytest.raises(UserError, match="end after 9 tokens"):
        with_labels(open_rows(config, 10), labels)


def test_documents_that_are_not_held_out_keep_their_labels(teacher, tmp_path):
    config = data_of(tmp_path)
    folder = labels_of(teacher, tmp_path / "labels", config)
    trained, _ = open_split(config, 2, ctx_len=100, vocab_size=256, seed=1)
    for batch in evaluation_batches(with_labels(trained, TeacherLabels(folder, top_k=5, temperature=2.0)), 2):
        assert_as_live(teacher, batch)


def test_several_files_have_their_labels_in_one_folder(teacher, tmp_path):
    first, second = data_of(tmp_path), data_of(tmp_path, ["x y z", "and a second text"], "more.jsonl")
    both = replace(DATA, data_file=f"{first.data_file},{second.data_file}")
    labels = TeacherLabels(labels_of(teacher, tmp_path / "labels", both), top_k=5, temperature=2.0)
    for dataload in ("pad", "pack"):
        for batch in evaluation_batches(with_labels(open_rows(both, dataload=dataload), labels), 2):
            assert_as_live(teacher, batch)


def test_data_workers_read_the_same_labels(teacher, tmp_path):
    config = data_of(tmp_path)
    labels = TeacherLabels(labels_of(teacher, tmp_path / "labels", config), top_k=5, temperature=2.0)
    dataset = with_labels(open_rows(config, dataload="pack", ctx_len=60), labels)
    plan = BatchPlan(micro_bsz=1, epoch_steps=3)
    here, there = (list(TrainLoader(dataset, plan, 0, 3, num_workers=workers)) for workers in (0, 1))
    for own, others in zip(here, there, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(own[:7], others[:7], strict=True))
        assert_as_live(teacher, own)


def test_labels_can_be_sent_to_another_process(teacher, tmp_path):
    config = data_of(tmp_path)
    labels = TeacherLabels(labels_of(teacher, tmp_path / "labels", config), top_k=5, temperature=2.0)
    dataset = with_labels(open_rows(config), labels)
    dataset.row(0)
    copy = pickle.loads(pickle.dumps(dataset))
    np.testing.assert_array_equal(copy.row(1).beside["teacher_tail"], dataset.row(1).beside["teacher_tail"])


@pytest.mark.parametrize("broken", ["", "[]", "{}", '{"format": 2}'])
def test_an_index_that_is_none_is_refused(teacher, tmp_path, broken):
    folder = labels_of(teacher, tmp_path / "labels", data_of(tmp_path))
    (folder / "index.json").write_text(broken)
    with pytest.raises(UserError, match="not an index"):
        TeacherLabels(folder, top_k=5, temperature=1.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [("places", -5), ("places", 0), ("top_k", 0), ("temperatures", ["a"]), ("temperatures", [0.0]), ("ctx_len", -3),
     ("documents", -1), ("documents", 10**15), ("shard_places", 10**20), ("tokens", 10**12), ("dtype", "bf16"),
     ("vocab_size", 70_000)],
)  # fmt: skip
def test_an_index_that_does_not_fit_its_files_is_refused(teacher, tmp_path, name, value):
    folder = labels_of(teacher, tmp_path / "labels", data_of(tmp_path))
    path = folder / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(UserError):
        TeacherLabels(folder, top_k=5, temperature=1.0)


def test_a_shard_with_tokens_that_no_vocabulary_has_is_refused(teacher, tmp_path):
    config = data_of(tmp_path)
    folder = labels_of(teacher, tmp_path / "labels", config)
    labels = TeacherLabels(folder, top_k=5, temperature=1.0)
    path, layouts = labels.index.shard_path(folder, 0), labels.index.shard_layouts(0)
    file = TensorFile(path, layouts)
    arrays = {name: file.read(name, 0, layout.shape[0]).copy() for name, layout in layouts.items()}
    arrays["ids"][:] = 65_535
    write_arrays(path, layouts, arrays)
    with pytest.raises(UserError, match="does not know"):
        with_labels(open_rows(config), labels).row(0)


def test_a_folder_without_labels_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no labels"):
        TeacherLabels(tmp_path, top_k=5, temperature=1.0)
