"""Make the small base model of the scripts, ``scripts/data/base-v7-bytes.pth``, from text every Python carries.

Runs the repository's own commands one after the other and prints each: corpus, ``make_data.py``, initial weights,
``train.py`` with all weights trained, held-out loss, bf16 file. Takes about half an hour on one core.

    python scripts/make_base_model.py
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import subprocess
import sys
from pathlib import Path

import base_corpus
import torch

from rwkvpeft.checkpoints.files import load_tensors, save_tensors
from rwkvpeft.models.rwkv7 import Rwkv7
from rwkvpeft.models.shape import new_shape

ROOT = Path(__file__).resolve().parents[1]
HELD_OUT_EVERY = 60
CTX_LEN = 256
ROWS = 4
EPOCH_STEPS = 100


def main() -> int:
    """Make the model and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "scripts" / "data" / "base-v7-bytes.pth")
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "base-model", help="folder for what comes between")
    parser.add_argument("--steps", type=int, default=1800, help="optimizer steps of 4 rows x 256 bytes")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)

    corpus, held_out = write_corpus(work)
    run("make_data.py", corpus, 1, CTX_LEN, "--tokenizer", "bytes", "--seed", 0, "--output", work / "corpus")
    initial = write_initial_weights(work / "initial.pth")
    trained = train(initial, work, max(1, arguments.steps // EPOCH_STEPS))
    tensors = load_tensors(trained)
    save_tensors(arguments.output, {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()})
    evaluate(arguments.output, held_out)
    return 0


def write_corpus(work: Path) -> tuple[Path, Path]:
    """Write the corpus as jsonl, every 60th document into a file of its own for the held-out loss."""
    documents = list(base_corpus.documents())
    random.Random(0).shuffle(documents)
    paths = work / "corpus.jsonl", work / "held-out.jsonl"
    parts: tuple[list[dict], list[dict]] = [], []
    for number, document in enumerate(documents):
        parts[number % HELD_OUT_EVERY == 0].append(document)
    for path, part in zip(paths, parts, strict=True):
        path.write_text("".join(json.dumps(document) + "\n" for document in part), encoding="utf-8")
        print(f"{path.name}: {len(part)} documents")
    return paths


def write_initial_weights(path: Path) -> Path:
    """Write untrained weights of a model with one million parameters."""
    torch.manual_seed(0)
    shape = new_shape("x070", n_layer=4, n_embd=128, vocab_size=256)
    save_tensors(path, Rwkv7.initial_weights(shape))
    return path


def train(initial: Path, work: Path, epochs: int) -> Path:
    """Train every weight on windows of the whole corpus."""
    run(
        "train.py", "--load_model", initial, "--proj_dir", work, "--resume", "none",
        "--data_file", work / "corpus", "--tokenizer", "bytes", "--dataload", "get", "--ctx_len", CTX_LEN,
        "--micro_bsz", ROWS, "--epoch_steps", EPOCH_STEPS, "--epoch_count", epochs, "--epoch_save", 1,
        "--lr_init", "3e-3", "--lr_final", "1e-4", "--warmup_steps", 30, "--weight_decay", "0.1",
        "--accelerator", "cpu", "--precision", "fp32", "--random_seed", 1,
    )  # fmt: skip
    return work / f"rwkv-{epochs - 1}.pth"


def evaluate(model: Path, held_out: Path) -> None:
    """Print the loss on the documents kept apart."""
    run("-m", "rwkvpeft.evaluate", "--model", model, "--data_file", held_out)


def run(*words: object) -> None:
    """Run one of the repository's commands; a failure ends the program."""
    command = [sys.executable, *map(str, words)]
    print("+", shlex.join(command), flush=True)
    subprocess.run(command, cwd=ROOT, check=True)


if __name__ == "__main__":
    sys.exit(main())
