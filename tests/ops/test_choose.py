"""Which backend is taken, and what is said when none can be."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

from rwkvpeft.errors import UserError
from rwkvpeft.ops import choose
from rwkvpeft.ops.bench import Bench, GpuLost, surviving
from rwkvpeft.ops.choose import choose_backend, rule
from rwkvpeft.ops.contract import Backend, Needs, Supports
from rwkvpeft.registry import BACKENDS

NEEDS = Needs("cpu", torch.float32, 64, training=True)
ON_GPU = Needs("cuda", torch.bfloat16, 64, training=True, batch=1, tokens=1024, heads=32)
RIGHT = {"y": 1e-3, "gradient of w": 1e-3}
WRONG = {"y": 1e-3, "gradient of w": 3e-1}
COARSE = {"y": 1e-3, "gradient of w": 2e-2}


def backend(name, **supports):
    return Backend(name, "for this test", lambda **_: None, Supports(**supports))


FUSSY = backend("fussy", dtypes=frozenset({torch.float16, torch.float32}), head_sizes=frozenset({64}))
TRITON = backend("triton")
CUDA = backend("cuda")
UNBUILT = dataclasses.replace(CUDA, waits_for=lambda: "not built: --op cuda builds it")


@pytest.fixture
def row(monkeypatch):
    """Put backends of this file before wkv7's own."""

    def put(**places):
        ours = {name: f"{__name__}:{place}" for name, place in places.items()}
        portable = {name: BACKENDS["wkv7"][name] for name in ("torch", "reference")}
        monkeypatch.setattr(choose, "BACKENDS", {"wkv7": {**ours, **portable}})

    choose_backend.cache_clear()
    yield put
    choose_backend.cache_clear()


class Gpu:
    """A pretended GPU: errors and milliseconds by backend, and what was asked of it."""

    def __init__(self, errors=None, times=None, memory=None):
        self.errors, self.times = errors or {}, times or {}
        self.tried, self.timed, self.said = [], [], []
        self.bench = Bench("Pretended GPU", 132, self._errors, self._milliseconds, memory, self.said.append)

    def _errors(self, operator, backend, needs):
        self.tried.append(backend.name)
        return self._answer(self.errors.get(backend.name, RIGHT))

    def _milliseconds(self, operator, backend, needs):
        self.timed.append(backend.name)
        return self._answer(self.times[backend.name])

    def _answer(self, answer):
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_auto_on_a_cpu_takes_the_first_backend_that_can():
    choice = choose_backend("wkv7", "auto", NEEDS)
    assert choice.report == "wkv7 by torch, chunked matrix products"
    assert any("reference" in line for line in choice.listing)


@pytest.mark.parametrize("operator", BACKENDS)
@pytest.mark.parametrize("name", ["torch", "reference"])
def test_a_backend_can_be_asked_for_by_name(operator, name):
    choice = choose_backend(operator, name, NEEDS)
    assert callable(choice.run)
    assert choice.report == f"{operator} by {name}, as asked"


@pytest.mark.parametrize("op", ["cuda", "triton", "fla"])
def test_a_gpu_program_is_refused_on_a_cpu_with_the_reason_and_what_works(op, row):
    row(**{op: "FUSSY"})
    with pytest.raises(UserError, match=f"--op {op} cannot run this job") as caught:
        choose_backend("wkv7", op, NEEDS)
    assert "device cpu" in str(caught.value)
    assert "auto, torch, reference" in str(caught.value)


def test_an_unknown_name_is_refused_with_the_names_that_work():
    with pytest.raises(UserError, match="does not know 'torhc'") as caught:
        choose_backend("wkv7", "torhc", NEEDS)
    assert "auto, torch, reference" in str(caught.value)


def test_auto_passes_over_what_cannot_serve_and_lists_each_reason(row):
    row(fussy="FUSSY")
    gpu = Gpu(times={"torch": 3.4})
    choice = choose_backend("wkv7", "auto", dataclasses.replace(ON_GPU, head_size=32), gpu.bench)
    assert choice.report.startswith("wkv7 by torch")
    assert "wkv7 by fussy: precision bf16 (it can fp16, fp32), head size 32 (it can 64)" in choice.listing


def test_a_backend_that_cannot_serve_is_refused_with_its_limits(row):
    row(fussy="FUSSY")
    with pytest.raises(UserError, match="--op fussy cannot run this job") as caught:
        choose_backend("wkv7", "fussy", ON_GPU, Gpu().bench)
    assert "precision bf16 (it can fp16, fp32)" in str(caught.value)
    assert "auto, torch, reference" in str(caught.value)


def test_a_backend_whose_package_is_missing_is_passed_over_with_that_reason(monkeypatch):
    table = {"wkv7": {"fla": "no_such_package.kernels:BACKEND", "torch": BACKENDS["wkv7"]["torch"]}}
    monkeypatch.setattr(choose, "BACKENDS", table)
    choose_backend.cache_clear()
    choice = choose_backend("wkv7", "auto", ON_GPU, Gpu(times={"torch": 3.0}).bench)
    assert "wkv7 by fla: no_such_package is not installed" in choice.listing
    choose_backend.cache_clear()


def test_auto_on_a_gpu_takes_the_fastest_and_says_how_fast_the_others_are(row):
    row(triton="TRITON", cuda="CUDA")
    gpu = Gpu(times={"triton": 0.21, "cuda": 0.6, "torch": 3.4})
    choice = choose_backend("wkv7", "auto", ON_GPU, gpu.bench)
    assert choice.report == "wkv7 by triton, 0.21 ms a layer (cuda 0.6, torch 3.4)"
    assert gpu.timed == ["triton", "cuda", "torch"]
    assert "timing triton, cuda, torch for wkv7" in gpu.said[-1]


def test_a_backend_with_wrong_results_is_neither_timed_nor_taken(row):
    row(triton="TRITON", cuda="CUDA")
    gpu = Gpu(errors={"triton": WRONG}, times={"triton": 0.2, "cuda": 0.6, "torch": 3.4})
    choice = choose_backend("wkv7", "auto", ON_GPU, gpu.bench)
    assert choice.report == "wkv7 by cuda, 0.6 ms a layer (torch 3.4); triton failed its trial here"
    assert "triton" not in gpu.timed
    assert any("gradient of w is wrong by 3.0e-01" in line for line in choice.listing)


def test_a_backend_that_raises_in_its_trial_is_passed_over_with_what_it_said(row):
    row(triton="TRITON")
    gpu = Gpu(errors={"triton": RuntimeError("out of resource: shared memory\nmore")}, times={"torch": 3.4})
    choice = choose_backend("wkv7", "auto", ON_GPU, gpu.bench)
    assert choice.report.startswith("wkv7 by torch")
    reason = "failed its trial here: RuntimeError: out of resource: shared memory"
    assert f"wkv7 by triton: {reason}" in choice.listing


def test_a_backend_that_fails_at_the_runs_size_is_not_the_fastest(row):
    row(triton="TRITON", cuda="CUDA")
    gpu = Gpu(times={"triton": torch.OutOfMemoryError("no"), "cuda": 0.6, "torch": torch.OutOfMemoryError("no")})
    assert choose_backend("wkv7", "auto", ON_GPU, gpu.bench).report.startswith("wkv7 by cuda, 0.6 ms")


def test_times_are_kept_so_that_a_later_run_makes_the_same_choice(row, tmp_path):
    row(triton="TRITON", cuda="CUDA")
    memory = tmp_path / "cache" / "times.json"
    choose_backend("wkv7", "auto", ON_GPU, Gpu(times={"triton": 0.2, "cuda": 0.6, "torch": 3.4}, memory=memory).bench)
    later = Gpu(times={"triton": 0.7, "cuda": 0.6, "torch": 3.4}, memory=memory)
    near = dataclasses.replace(ON_GPU, tokens=1000)
    assert choose_backend("wkv7", "auto", near, later.bench).report.startswith("wkv7 by triton, 0.2 ms")
    assert later.timed == []
    assert later.tried == ["triton"]
    assert later.said == []


def test_times_of_another_size_are_not_used(row, tmp_path):
    row(triton="TRITON")
    memory = tmp_path / "times.json"
    choose_backend("wkv7", "auto", ON_GPU, Gpu(times={"triton": 0.2, "torch": 3.4}, memory=memory).bench)
    later = Gpu(times={"triton": 5.0, "torch": 3.4}, memory=memory)
    larger = dataclasses.replace(ON_GPU, tokens=4096)
    assert choose_backend("wkv7", "auto", larger, later.bench).report.startswith("wkv7 by torch")
    assert len(json.loads(memory.read_text())) == 2


def test_a_broken_memory_of_times_is_measured_anew(row, tmp_path):
    row(triton="TRITON")
    memory = tmp_path / "times.json"
    memory.write_text('{"half')
    gpu = Gpu(times={"triton": 0.2, "torch": 3.4}, memory=memory)
    assert choose_backend("wkv7", "auto", ON_GPU, gpu.bench).report.startswith("wkv7 by triton")
    assert json.loads(memory.read_text())


def test_a_folder_that_cannot_be_written_only_costs_the_memory(row, tmp_path):
    row(triton="TRITON")
    (tmp_path / "file").write_text("")
    gpu = Gpu(times={"triton": 0.2, "torch": 3.4}, memory=tmp_path / "file" / "times.json")
    assert choose_backend("wkv7", "auto", ON_GPU, gpu.bench).report.startswith("wkv7 by triton")


def test_a_process_that_waited_for_another_takes_the_times_that_one_kept(row, tmp_path, monkeypatch):
    row(triton="TRITON", cuda="CUDA")
    memory = tmp_path / "times.json"
    first = Gpu(times={"triton": 0.2, "cuda": 0.6, "torch": 3.4}, memory=memory).bench
    waiting = Gpu(memory=memory)

    @contextmanager
    def after_the_first(path, waits):
        first.remember("wkv7", ["triton", "cuda", "torch"], ON_GPU, {"triton": 0.2, "cuda": 0.6, "torch": 3.4})
        yield

    monkeypatch.setattr("rwkvpeft.ops.bench.alone", after_the_first)
    assert choose_backend("wkv7", "auto", ON_GPU, waiting.bench).report.startswith("wkv7 by triton, 0.2 ms")
    assert waiting.timed == []


@pytest.mark.parametrize("where", ["errors", "times"])
def test_nothing_is_taken_after_a_program_that_made_the_gpu_unusable(row, where):
    row(triton="TRITON")
    broken = {"triton": GpuLost("--op triton failed so badly", fix="--op torch")}
    gpu = Gpu(**{"times": {"torch": 3.4}, where: broken})
    with pytest.raises(GpuLost, match="--op torch"):
        choose_backend("wkv7", "auto", ON_GPU, gpu.bench)


def test_a_gpu_on_which_nothing_runs_after_a_failure_is_lost(monkeypatch):
    def still_broken(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", still_broken)
    with pytest.raises(GpuLost, match="--op triton"), surviving("cuda", "--op triton", "--op torch"):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_a_failure_that_a_gpu_survives_is_what_it_was(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    with pytest.raises(torch.OutOfMemoryError), surviving("cuda", "--op triton", "--op torch"):
        raise torch.OutOfMemoryError("no")


def test_auto_leaves_alone_what_is_not_built_and_says_so(row):
    row(triton="TRITON", cuda="UNBUILT")
    gpu = Gpu(times={"triton": 0.2, "torch": 3.4})
    choice = choose_backend("wkv7", "auto", ON_GPU, gpu.bench)
    assert choice.report == "wkv7 by triton, 0.2 ms a layer (torch 3.4); cuda not built"
    assert "cuda" not in gpu.tried


def test_auto_passes_over_what_would_run_each_document_of_a_packed_row_alone(row):
    row(triton="TRITON")
    gpu = Gpu(times={"triton": 0.2, "torch": 3.4})
    choice = choose_backend("wkv7", "auto", dataclasses.replace(ON_GPU, packed=True), gpu.bench)
    assert choice.report.startswith("wkv7 by torch")
    assert "wkv7 by triton: runs each document of a packed row alone" in choice.listing


def test_what_is_not_built_is_taken_when_asked_for(row):
    row(cuda="UNBUILT")
    assert choose_backend("wkv7", "cuda", ON_GPU, Gpu().bench).report == "wkv7 by cuda, as asked"


def test_a_backend_asked_for_by_name_that_is_wrong_here_is_refused_with_the_figures(row):
    row(triton="TRITON")
    with pytest.raises(UserError, match="--op triton cannot run this job") as caught:
        choose_backend("wkv7", "triton", ON_GPU, Gpu(errors={"triton": WRONG}).bench)
    assert "gradient of w is wrong by 3.0e-01, 4e-02 allowed" in str(caught.value)


def test_a_coarse_backend_is_taken_by_name_and_not_by_auto(row):
    row(triton="TRITON")
    gpu = Gpu(errors={"triton": COARSE}, times={"triton": 0.2, "torch": 3.4})
    assert choose_backend("wkv7", "triton", ON_GPU, gpu.bench).report == "wkv7 by triton, as asked"
    assert choose_backend("wkv7", "auto", ON_GPU, gpu.bench).report.startswith("wkv7 by torch")


def test_a_failed_build_keeps_its_own_message(row):
    row(cuda="UNBUILT")
    said = UserError("the CUDA kernels could not be built", fix="--op triton")
    with pytest.raises(UserError, match="the CUDA kernels could not be built"):
        choose_backend("wkv7", "cuda", ON_GPU, Gpu(errors={"cuda": said}).bench)


def test_without_sizes_nothing_is_timed_and_the_rule_decides(row):
    row(triton="TRITON", cuda="CUDA")
    gpu = Gpu()
    choice = choose_backend("wkv7", "auto", Needs("cuda", torch.bfloat16, 64, training=True), gpu.bench)
    assert choice.report == "wkv7 by triton, for this test"
    assert gpu.timed == []
    assert gpu.tried == ["triton"]


@pytest.mark.parametrize(
    ("batch", "tokens", "first"), [(1, 1024, "triton"), (4, 1024, "triton"), (9, 1024, "cuda"), (1, 16, "cuda")]
)
def test_the_rule_goes_by_the_heads_that_run_side_by_side(batch, tokens, first):
    needs = dataclasses.replace(ON_GPU, batch=batch, tokens=tokens)
    assert rule(["triton", "cuda", "torch"], needs, 132)[0] == first


def test_the_operators_stay_functions_when_their_backends_are_imported():
    code = (
        "import torch\nfrom rwkvpeft import ops\n"
        "x = torch.zeros(1, 2, 1, 4)\n"
        "for op in ('torch', 'reference'):\n"
        "    ops.wkv7(r=x, w=x, k=x, v=x, a=x, b=x, op=op)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nothing_of_a_gpu_program_is_imported_for_a_run_on_a_cpu():
    code = (
        "import sys, torch\n"
        "from rwkvpeft.ops.block.choose import choose_block_ops\n"
        "from rwkvpeft.ops.choose import choose_backend\n"
        "from rwkvpeft.ops.contract import Needs\n"
        "from rwkvpeft.ops.cross_entropy import row_program\n"
        "needs = Needs('cpu', torch.bfloat16, 64, training=True, batch=1, tokens=8, heads=2)\n"
        "for operator in ('wkv5', 'wkv6', 'wkv7'):\n"
        "    choose_backend(operator, 'auto', needs)\n"
        "choose_block_ops('auto', needs)\n"
        "row_program('auto', torch.zeros(1, 2))\n"
        "print(*(name for name in sys.modules if name.startswith('rwkvpeft') and\n"
        "        any(word in name for word in ('triton', 'cuda', 'fla'))))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
