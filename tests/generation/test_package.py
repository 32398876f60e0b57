"""The same numbers and words as the ``rwkv`` package, from plain, tuned and merged checkpoints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rwkvpeft.adapters.build import build_adapter
from rwkvpeft.checkpoints.adapter import Recipe, save_adapter
from rwkvpeft.checkpoints.files import fingerprint, load_tensors, save_tensors
from rwkvpeft.checkpoints.load import load_model
from rwkvpeft.checkpoints.merge import merge_files
from rwkvpeft.checkpoints.quantised import Quantiser
from rwkvpeft.data.tokenizer import load_tokenizer
from rwkvpeft.generation.generate import TextGenerator
from rwkvpeft.generation.sampling import Sampler, SamplingConfig
from rwkvpeft.generation.tuned import load_tuned

pytestmark = pytest.mark.golden
VERSIONS = ["5", "6", "7"]
TOLERANCE = {"5": 1e-4, "6": 1e-4, "7": 2e-5}

PACKAGE = """
import sys
import numpy as np
import torch
from rwkv.model import RWKV
source = np.load(sys.argv[2])
model = RWKV(model=sys.argv[1].removesuffix(".pth"), strategy="cpu fp32")
state = None
if "time_state" in source.files:
    state = model.generate_zero_state()
    for layer, memory in enumerate(torch.from_numpy(source["time_state"])):
        state[3 * layer + 1] = memory.clone()
logits = []
for token in source["tokens"].tolist():
    out, state = model.forward([token], state)
    logits.append(out.float().clone())
greedy = []
for _ in range(12):
    greedy.append(int(out.argmax()))
    out, state = model.forward([greedy[-1]], state)
np.savez(sys.argv[3], logits=torch.stack(logits).numpy(), greedy=np.array(greedy))
"""


@pytest.fixture(autouse=True)
def _one_thread():
    """Single tokens of tiny models: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run_package(version: str, path: Path, folder: Path, **arrays) -> tuple[torch.Tensor, list[int]]:
    """Logits and greedy continuation of a checkpoint in the package, which reads its settings from the environment."""
    pytest.importorskip("rwkv")
    np.savez(folder / "in.npz", **arrays)
    settings = {"RWKV_V7_ON": "1" if version == "7" else "0", "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}
    settings["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", PACKAGE, str(path), str(folder / "in.npz"), str(folder / "out.npz")],
        env={**os.environ, **settings}, capture_output=True, text=True, check=False,
    )
    assert done.returncode == 0, done.stderr
    result = np.load(folder / "out.npz")
    return torch.from_numpy(result["logits"]), result["greedy"].tolist()


def logits_of(model, tokens) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.as_tensor(tokens)[None])[0][0]


def greedy_of(model, tokens, count: int) -> list[int]:
    generator = TextGenerator(model, load_tokenizer("bytes"), chunk=7)
    sampler = Sampler(SamplingConfig(temperature=0))
    logits, state = generator.read(list(tokens))
    continuation = []
    for _ in range(count):
        continuation.append(sampler.draw(logits))
        logits, state = generator.read(continuation[-1:], state)
    return continuation


def fp32_base(golden: Path, version: str, folder: Path) -> Path:
    """The tiny checkpoint in fp32: the package rounds its embedding to the dtype of the file."""
    tensors = load_tensors(golden / f"tiny_v{version}.pth")
    save_tensors(folder / "base.pth", {name: tensor.float() for name, tensor in tensors.items()})
    return folder / "base.pth"


@pytest.mark.parametrize("version", VERSIONS)
def test_real_checkpoints_give_the_packages_logits_and_greedy_text(golden, version):
    stored = np.load(golden / f"package_v{version}.npz")
    model = load_model(golden / f"tiny_v{version}.pth", dtype=torch.float32)
    found = logits_of(model, stored["prompt_tokens"])
    torch.testing.assert_close(found, torch.from_numpy(stored["logits"]), rtol=0, atol=TOLERANCE[version])
    assert greedy_of(model, stored["prompt_tokens"].tolist(), 64) == stored["greedy"].tolist()


@pytest.mark.parametrize("version", VERSIONS)
def test_a_tuned_state_applied_unmerged_gives_the_packages_logits(golden, tmp_path, version):
    stored = np.load(golden / f"package_v{version}.npz")
    states = torch.from_numpy(stored["time_state"])
    save_tensors(tmp_path / "s.pth", {f"blocks.{i}.att.time_state": state for i, state in enumerate(states)})
    model = load_tuned(golden / f"tiny_v{version}.pth", tmp_path / "s.pth", device="cpu", precision="fp32").model
    expected = torch.from_numpy(stored["logits_time_state"])
    found = logits_of(model, stored["prompt_tokens"][: len(expected)])
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE[version])
    assert greedy_of(model, stored["prompt_tokens"].tolist(), 16) == stored["greedy_time_state"].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_a_merged_state_is_read_by_the_package(golden, tmp_path, version):
    stored = np.load(golden / f"package_v{version}.npz")
    tokens, base = stored["prompt_tokens"][:12], fp32_base(golden, version, tmp_path)
    states = torch.from_numpy(stored["time_state"])
    tensors = {f"blocks.{i}.att.time_state": state for i, state in enumerate(states)}
    save_adapter(tmp_path / "s.pth", tensors, Recipe(method="state", base_fingerprint=fingerprint(base)))
    merge_files(base, tmp_path / "s.pth", tmp_path / "merged.pth")
    # its v7 class ignores the tensors in the file, so that they are set by hand there
    by_hand = {"time_state": stored["time_state"]} if version == "7" else {}
    logits, _ = run_package(version, tmp_path / "merged.pth", tmp_path, tokens=tokens, **by_hand)
    expected = torch.from_numpy(stored["logits_time_state"])[: len(tokens)]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(logits_of(load_model(tmp_path / "merged.pth"), tokens), logits, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("version", "method", "quant"),
    [*((version, "lora", "none") for version in VERSIONS), ("7", "miss", "none"), ("6", "bat", "none"),
     ("7", "dora", "none"), ("7", "pissa", "fp8")],
)
def test_a_model_tuned_and_merged_here_gives_the_same_logits_in_the_package(golden, tmp_path, version, method, quant):
    base = fp32_base(golden, version, tmp_path)
    tokens = np.load(golden / f"package_v{version}.npz")["prompt_tokens"][:24]
    plain = logits_of(load_model(base, dtype=torch.float32), tokens)
    adapter = build_adapter(method, {"r": 4}, ["time", "ln"])
    quantiser = None if quant == "none" else Quantiser(quant, keep=adapter.trains)
    model = load_model(base, dtype=torch.float32, quantiser=quantiser, prepare=adapter.prepare)
    adapter.attach(model)
    tune(model, adapter, torch.as_tensor(tokens)[None])
    recipe = Recipe(method=method, config=adapter.settings(), base_fingerprint=fingerprint(base), quant=quant)
    save_adapter(tmp_path / "rwkv-0.pth", adapter.file_tensors(model), recipe)
    merge_files(base, tmp_path / "rwkv-0.pth", tmp_path / "merged.pth")

    here = logits_of(load_model(tmp_path / "merged.pth"), tokens)
    unmerged = load_tuned(base, tmp_path / "rwkv-0.pth", device="cpu").model
    there, greedy = run_package(version, tmp_path / "merged.pth", tmp_path, tokens=tokens)
    assert (here - plain).abs().max() > 0.05
    torch.testing.assert_close(here, logits_of(model.eval(), tokens), rtol=0, atol=1e-4)
    torch.testing.assert_close(here, logits_of(unmerged, tokens), rtol=0, atol=1e-4)
    torch.testing.assert_close(here, there, rtol=0, atol=1e-4)
    assert greedy_of(load_model(tmp_path / "merged.pth"), tokens.tolist(), 12) == greedy


def tune(model, adapter, tokens, steps: int = 5) -> None:
    optimizer = torch.optim.Adam(adapter.trained_tensors(model).values(), lr=3e-3)
    for _ in range(steps):
        logits, _ = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
