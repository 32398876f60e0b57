"""Memory that does not suffice, for real: the system refuses a process more than a limit."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rwkvpeft.cli.out_of_memory import is_out_of_memory

ROOT = Path(__file__).resolve().parents[2]
# what is freed goes back to the system at once and so counts no more, and threads set no memory aside
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
WORDS = (
    "--accelerator cpu --tokenizer bytes --ctx_len 256 --epoch_steps 3 --epoch_count 1 --save_steps 1 --random_seed 3 "
    "--epoch_save 1 --loss_mask none --lr_init 1e-3 --precision fp64 --report false"
)

# a first, small run brings everything into memory that every run needs
SCRIPT = """
import resource, sys, threading, time
from pathlib import Path
from rwkvpeft.cli.train import main

def words(folder, more):
    return [*sys.argv[2].split(), "--proj_dir", folder, *more.split()]

assert main(words(sys.argv[1] + "/small", "--micro_bsz 1 --epoch_steps 1")) == 0
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + int(sys.argv[5]) * 2**20

def hold():
    log = Path(sys.argv[1] + "/run/loss_data.jsonl")
    while not (log.is_file() and log.read_bytes().count(b"\\n") >= int(sys.argv[4])):
        time.sleep(0.001)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

if int(sys.argv[4]):
    threading.Thread(target=hold, daemon=True).start()
else:
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.exit(main(words(sys.argv[1] + "/run", sys.argv[3])))
"""


def limited_run(folder, model, data, more, *, after=0, room=60):
    """The command within ``room`` MiB above what every run needs, once ``after`` steps are done."""
    words = f"--load_model {model} --data_file {data} {WORDS}"
    command = [sys.executable, "-c", SCRIPT, str(folder), words, more, str(after), str(room)]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=300)


def undisturbed_run(folder, model, data, more):
    words = f"--load_model {model} --data_file {data} --proj_dir {folder} {WORDS} {more}"
    command = [sys.executable, "train.py", *words.split()]
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)


needs_limits = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux, to limit memory")


@needs_limits
@pytest.mark.slow
def test_memory_that_does_not_suffice_is_one_message_with_ways_out(tiny_model, binidx_prefix, tmp_path):
    done = limited_run(tmp_path, tiny_model, binidx_prefix, "--micro_bsz 32")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    message = done.stderr[done.stderr.index("error:") :]
    assert "error: there is not enough memory for this run" in message
    assert "--micro_split 32" in message
    assert "--grad_cp 1" in message


@needs_limits
@pytest.mark.slow
@pytest.mark.parametrize(
    ("after", "method"),
    [pytest.param(0, "--peft none --epoch_steps 0", marks=pytest.mark.faults), (2, "--peft state")],
)
def test_a_run_that_goes_on_in_smaller_batches_ends_with_the_same_weights(
    tiny_model, binidx_prefix, tmp_path, after, method
):
    more = f"--micro_bsz 32 {method}"
    undisturbed_run(tmp_path / "calm", tiny_model, binidx_prefix, more)
    done = limited_run(tmp_path, tiny_model, binidx_prefix, f"{more} --on_oom halve", after=after)
    assert done.returncode == 0, done.stderr
    assert "out of memory: going on from" in done.stdout
    calm, halved = (torch.load(tmp_path / name / "rwkv-0.pth", weights_only=True) for name in ("calm", "run"))
    for name, tensor in calm.items():
        # in fp64, which Adam makes no steps of from round-off: where a gradient is zero it would divide it by itself
        torch.testing.assert_close(halved[name], tensor, rtol=1e-5, atol=1e-7)
    assert "micro_bsz: 32" in (tmp_path / "run/config.yaml").read_text()
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/loss_data.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))


def test_several_devices_do_not_go_on_in_smaller_batches(train):
    code, _, errors = train("--on_oom", "halve", "--devices", 2)
    assert code == 2
    assert "--on_oom halve is for one device" in errors


@pytest.mark.parametrize(
    "reason",
    [
        MemoryError(),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_every_way_to_say_it_is_understood(reason):
    assert is_out_of_memory(reason)


@pytest.mark.parametrize("reason", [RuntimeError("shapes do not match"), OSError(errno.ENOSPC, "no space"), KeyError()])
def test_other_errors_are_not_taken_for_it(reason):
    assert not is_out_of_memory(reason)
