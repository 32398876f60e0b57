"""Loading when files change, workers die, or nothing comes."""

import os
import signal
import threading
import time
from multiprocessing import active_children

import numpy as np
import pytest

from rwkvpeft.config.groups import DataConfig
from rwkvpeft.data.binidx import write_binidx
from rwkvpeft.data.datamodule import BatchPlan, TrainLoader
from rwkvpeft.data.dataset import open_dataset
from rwkvpeft.data.file_array import FileChanged
from rwkvpeft.data.read_watch import ReadWatch
from rwkvpeft.errors import UserError

PLAN = BatchPlan(micro_bsz=2, epoch_steps=1000)


@pytest.fixture
def prefix(tmp_path):
    """40 documents of 9 tokens: the document's number, eight times, and 0."""
    write_binidx(tmp_path / "numbers", [np.array([i] * 8 + [0]) for i in range(1, 41)])
    return tmp_path / "numbers"


def dataset(prefix, **values):
    config = DataConfig(data_file=str(prefix), tokenizer="bytes", **values)
    return open_dataset(config, ctx_len=8, vocab_size=256, seed=3)


@pytest.mark.parametrize("workers", [{}, {"num_workers": 1}])
def test_a_file_that_shrinks_ends_the_loop_with_a_message_for_people(prefix, workers):
    batches = iter(TrainLoader(dataset(prefix), PLAN, 0, 1000, **workers))
    next(batches)
    os.truncate(f"{prefix}.bin", 10)
    with pytest.raises(FileChanged) as error:
        for _ in batches:
            pass
    assert error.value.what == f"the data file changed while the run was reading it: {prefix}.bin"


@pytest.mark.slow
def test_a_data_worker_that_is_killed_is_named_as_the_cause(prefix):
    batches, worker = begun(TrainLoader(dataset(prefix), PLAN, 0, 1000, num_workers=1))
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(UserError, match="a process that prepares batches has died"):
        for _ in batches:
            pass


def begun(loader):
    """The batches of a loader behind the first one, and the process that makes them."""
    before = active_children()
    batches = iter(loader)
    next(batches)
    [worker] = set(active_children()) - set(before)
    return batches, worker.pid


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_data_worker_outlives_what_a_scheduler_sends_to_every_process(prefix, number):
    batches, worker = begun(TrainLoader(dataset(prefix), PLAN, 0, 200, num_workers=1))
    os.kill(worker, number)
    assert sum(1 for _ in batches) == 199


def test_documents_of_a_step_are_those_its_rows_begin_with(prefix):
    rows = dataset(prefix)
    loader = TrainLoader(rows, PLAN, 4, 7)
    drawn = [number for batch in loader for number in batch.input_ids[:, 0].tolist()]
    assert loader.labels(range(4, 7)) == [f"{prefix}.bin, document {number - 1}" for number in drawn]


def test_documents_of_a_step_are_those_of_all_ranks(prefix):
    plans = [BatchPlan(micro_bsz=2, epoch_steps=10, rank=rank, world_size=2) for rank in (0, 1)]
    one, other = (TrainLoader(dataset(prefix), plan, 0, 10) for plan in plans)
    assert one.labels(range(3)) == other.labels(range(3))
    assert len(set(one.labels(range(3)))) == 12


@pytest.mark.parametrize(
    "how",
    [{"length_buckets": True}, {"dataload": "pack"}, {"dataload": "get"}, {"data_shuffle": 0}],
    ids=lambda how: next(iter(how)),
)
def test_every_way_to_make_rows_names_their_documents(prefix, how):
    loader = TrainLoader(dataset(prefix, **how), PLAN, 0, 3)
    for label, batch in loader.documents(range(3)):
        numbers = [int(word) for word in label.rpartition(" document ")[2].split(" to ")]
        begins = int(batch.input_ids[0, 0]) or int(batch.input_ids[0, 1])
        assert numbers[0] <= begins - 1 <= numbers[-1]


def test_documents_of_mixed_files_are_named_by_their_files(prefix, tmp_path):
    write_binidx(tmp_path / "more", [np.array([i] * 8 + [0]) for i in range(101, 141)])
    loader = TrainLoader(dataset(f"{prefix}:1,{tmp_path}/more:1"), PLAN, 0, 3)
    for label, batch in loader.documents(range(3)):
        file, _, number = label.rpartition(", document ")
        beginning = int(batch.input_ids[0, 0])
        assert (file, int(number)) == (
            (f"{prefix}.bin", beginning - 1) if beginning < 100 else (f"{tmp_path}/more.bin", beginning - 101)
        )


def test_documents_of_jsonl_are_named_by_their_lines(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two"}\n')
    rows = dataset(path, data_type="jsonl", data_shuffle=0)
    assert TrainLoader(rows, PLAN, 0, 1).labels(range(1)) == [f"{path}:1", f"{path}:3"]


def test_a_read_that_takes_long_is_told_of_and_ended():
    told, ended = [], threading.Event()
    watch = ReadWatch("data.bin", told.append, 0.4, lambda message: (told.append(message), ended.set()))
    with watch, watch.waiting():
        assert ended.wait(10)
    assert told[0].startswith("waiting for data from data.bin since ")
    assert told[-1].startswith("no data from data.bin for ")


def test_reads_that_come_in_time_are_not_told_of():
    told = []
    with ReadWatch("data.bin", told.append, 0.4, told.append) as watch:
        for _ in range(12):
            with watch.waiting():
                time.sleep(0.05)
    assert not told
    assert "read watch" not in [thread.name for thread in threading.enumerate()]
