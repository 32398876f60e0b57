"""Make the model that ``run_grpo.sh`` teaches: it has imitated a careless pupil's sums, from nothing, in a minute.

    python scripts/arithmetic/base.py --problems out/arithmetic --output out/arithmetic/base.pth

RWKV v7, 2 layers, width 64, one token per byte; every weight trained by ``train.py`` on ``demonstrations.jsonl``.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from rwkvpeft.checkpoints.files import load_tensors, save_tensors
from rwkvpeft.models.rwkv7 import Rwkv7
from rwkvpeft.models.shape import new_shape

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    """Make the model and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=Path, default=Path("out/arithmetic"), help="folder of problems.py")
    parser.add_argument("--output", type=Path, default=Path("out/arithmetic/base.pth"), help="the model's file")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps of 128 answers (default: %(default)s)")
    flags = parser.parse_args()
    work = flags.output.resolve().parent / "base"
    torch.manual_seed(0)
    shape = new_shape("x070", n_layer=2, n_embd=64, vocab_size=256, head_size=32)
    save_tensors(work / "initial.pth", Rwkv7.initial_weights(shape))
    run(
        "train.py", "--load_model", work / "initial.pth", "--proj_dir", work, "--resume", "none",
        "--data_file", flags.problems.resolve() / "demonstrations.jsonl", "--tokenizer", "bytes",
        "--ctx_len", 12, "--micro_bsz", 128, "--epoch_steps", flags.steps, "--epoch_count", 1,
        "--lr_init", "5e-3", "--lr_final", "3e-4", "--warmup_steps", 20,
        "--accelerator", "cpu", "--precision", "fp32", "--random_seed", 1, "--report", "false",
    )  # fmt: skip
    save_tensors(flags.output, load_tensors(work / "rwkv-0.pth"))
    return 0


def run(*words: object) -> None:
    """Run one of the repository's commands; a failure ends the program."""
    command = [sys.executable, *map(str, words)]
    print("+", shlex.join(command), flush=True)
    subprocess.run(command, cwd=ROOT, check=True)


if __name__ == "__main__":
    sys.exit(main())
