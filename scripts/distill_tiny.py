"""Does a teacher help? A small model learns from text alone, and from the shipped base model's words beside it.

Both read the same documents in the same order, as many tokens, from the same initial weights, on one schedule; the
learning rate is the one that is best for text alone. Rates, and the teacher's weight and temperature, are chosen with a
seed and held-out documents that the result does not use. The runs are ``train.py``'s own, in this process. The teacher
never saw the held-out documents of Python 3.11.7; of another version's it may have.

    OMP_NUM_THREADS=1 python scripts/distill_tiny.py --output docs/distillation

writes docs/distillation.csv and docs/distillation.png. Takes about 20 minutes on one core.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import random
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import base_corpus
import torch

from rwkvpeft.checkpoints.files import save_tensors
from rwkvpeft.cli.teacher import main as teach
from rwkvpeft.cli.train import main as train
from rwkvpeft.models.shape import new_shape
from rwkvpeft.registry import MODELS, find

ROOT = Path(__file__).resolve().parents[1]
TEACHER = ROOT / "scripts" / "data" / "base-v7-bytes.pth"
HELD_OUT_EVERY = 60
CTX_LEN = 256
ROWS = 4
TOP_K = 32
CHOSEN_WITH = 100
RATES = (2e-3, 4e-3, 8e-3, 1.6e-2)
MIXES = ((0.5, 1.0), (0.9, 1.0), (0.9, 2.0))


class Run(NamedTuple):
    """One training: ``alpha`` 0 is text alone."""

    version: str
    seed: int
    rate: float
    alpha: float = 0.0
    temperature: float = 1.0

    @property
    def name(self) -> str:
        """For its folder."""
        return f"{self.version}-seed{self.seed}-lr{self.rate:g}-alpha{self.alpha:g}-T{self.temperature:g}"


class Work(NamedTuple):
    """Where everything is, and how long runs are."""

    folder: Path
    steps: int
    documents: Path
    labels: Path
    held_out: dict[str, Path]


class Point(NamedTuple):
    """A held-out loss, in nats a byte."""

    step: int
    tokens: int
    loss: float


def main() -> int:
    """Choose, compare, write, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "distillation")
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "distill-tiny")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of 4 rows of 256 bytes")
    parser.add_argument("--seeds", type=int, default=3, help="of the v7 student; one less of the v6 one")
    arguments = parser.parse_args()
    work = prepare(arguments.work.resolve(), arguments.steps)

    def last(run: Run) -> float:
        return curve(work, run, "choose")[-1].loss

    rate = min(RATES, key=lambda rate: last(Run("x070", CHOSEN_WITH, rate)))
    alpha, temperature = min(MIXES, key=lambda mix: last(Run("x070", CHOSEN_WITH, rate, *mix)))
    print(f"chosen: --lr_init {rate:g}, --distill_alpha {alpha:g}, --distill_temperature {temperature:g}", flush=True)
    curves = {
        run: curve(work, run, "report")
        for version, seeds in (("x070", arguments.seeds), ("x060", arguments.seeds - 1))
        for seed in range(seeds)
        for run in (Run(version, seed, rate), Run(version, seed, rate, alpha, temperature))
    }
    write_csv(arguments.output.with_suffix(".csv"), curves)
    draw(arguments.output.with_suffix(".png"), curves)
    for line in summary(curves):
        print(line)
    return 0


def prepare(folder: Path, steps: int) -> Work:
    """Write documents for about one pass, those held out, and the teacher's words about the former."""
    folder.mkdir(parents=True, exist_ok=True)
    # as the teacher's own training had them: it never saw those held out
    documents = list(base_corpus.documents())
    random.Random(0).shuffle(documents)
    held_out = documents[::HELD_OUT_EVERY]
    trained = [document for number, document in enumerate(documents) if number % HELD_OUT_EVERY]
    needed, enough = 0, 0
    while needed < steps * ROWS * CTX_LEN:
        needed += min(len(json.dumps(trained[enough])), CTX_LEN)
        enough += 1
    parts = {"documents": trained[:enough], "choose": held_out[::2], "report": held_out[1::2]}
    paths = {}
    for name, part in parts.items():
        paths[name] = folder / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps(document) + "\n" for document in part), encoding="utf-8")
        print(f"{paths[name].name}: {len(part)} documents", flush=True)
    labels = folder / f"labels-{steps}"
    started = time.monotonic()
    words = ["--model", TEACHER, "--data_file", paths["documents"], "--output", labels, "--top_k", TOP_K,
             "--temperature", "1", "2", "--ctx_len", CTX_LEN, "--device", "cpu"]  # fmt: skip
    if teach([str(word) for word in words]):
        raise SystemExit("the teacher did not label the documents")
    print(f"labels took {time.monotonic() - started:.0f} seconds", flush=True)
    return Work(folder, steps, paths.pop("documents"), labels, paths)


def curve(work: Work, run: Run, held_out: str) -> list[Point]:
    """The held-out losses of a run, which is trained if it has not been."""
    project = work.folder / f"{work.steps}-{held_out}" / run.name
    if not (project / "done").exists():
        started = time.monotonic()
        train_once(work, run, work.held_out[held_out], project)
        (project / "done").write_text("")
        print(f"{run.name}: {time.monotonic() - started:.0f} seconds, "
              f"held-out loss {points(project)[-1].loss:.4f}", flush=True)
    return points(project)


def train_once(work: Work, run: Run, held_out: Path, project: Path) -> None:
    """Call train.py; what it says goes into a file."""
    # what a run that was stopped has left
    shutil.rmtree(project, ignore_errors=True)
    project.mkdir(parents=True)
    initial = write_initial_weights(project / "initial.pth", run)
    words = [
        "--load_model", initial, "--proj_dir", project, "--resume", "none", "--data_file", work.documents,
        "--tokenizer", "bytes", "--dataload", "pack", "--ctx_len", CTX_LEN, "--micro_bsz", ROWS,
        "--epoch_steps", work.steps, "--epoch_count", 1, "--lr_init", run.rate, "--lr_final", run.rate / 20,
        "--warmup_steps", 20, "--accelerator", "cpu", "--precision", "fp32", "--random_seed", run.seed,
        "--val_data_file", held_out, "--val_steps", max(1, work.steps // 6), "--report", "false",
    ]  # fmt: skip
    if run.alpha:
        words += ["--objective", "distill", "--teacher", work.labels, "--distill_alpha", run.alpha,
                  "--distill_temperature", run.temperature]  # fmt: skip
    with (project / "said.txt").open("w") as said, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = train([str(word) for word in words])
    # a run that is asked to stop ends well, too early
    if code or points(project)[-1].step != work.steps:
        raise SystemExit(f"{run.name} failed: see {project / 'said.txt'}")


def write_initial_weights(path: Path, run: Run) -> Path:
    """Untrained weights: a fifth of the teacher's parameters or fewer."""
    torch.manual_seed(run.seed)
    shape = new_shape(run.version, n_layer=2, n_embd=64, vocab_size=256, head_size=32)
    save_tensors(path, find(MODELS, run.version, flag="").initial_weights(shape))
    return path


def points(project: Path) -> list[Point]:
    """The held-out losses that a run has written."""
    lines = [json.loads(line) for line in (project / "val_data.jsonl").read_text().splitlines()]
    return [Point(line["step"], line["step"] * ROWS * CTX_LEN, line["val_loss"]) for line in lines]


def write_csv(path: Path, curves: dict[Run, list[Point]]) -> None:
    """All held-out losses of the runs that are compared."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["student", "seed", "learns_from", "alpha", "temperature", "step", "held_out_loss"])
        for run, found in curves.items():
            source = "teacher" if run.alpha else "text alone"
            for point in found:
                writer.writerow([run.version, run.seed, source, run.alpha, run.temperature, point.step,
                                 f"{point.loss:.5f}"])


def draw(path: Path, curves: dict[Run, list[Point]]) -> None:
    """Held-out loss against step, one line a run."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    versions = list(dict.fromkeys(run.version for run in curves))
    figure, axes = plt.subplots(1, len(versions), figsize=(4.2 * len(versions), 3.2), sharey=True, squeeze=False)
    for version, axis in zip(versions, axes[0], strict=True):
        for run, found in curves.items():
            if run.version == version:
                label = ("with the teacher" if run.alpha else "text alone") if run.seed == 0 else None
                # the first figures are those of untrained weights, far above all others
                axis.plot([point.step for point in found[1:]], [point.loss for point in found[1:]],
                          color="tab:blue" if run.alpha else "tab:orange", label=label, linewidth=1)
        axis.set_title(f"v{version[2]} student of the v7 teacher")
        axis.set_xlabel("optimizer step")
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0][0].set_ylabel("held-out loss, nats a byte")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def summary(curves: dict[Run, list[Point]]) -> list[str]:
    """For each version the last losses of both ways, and their difference seed by seed."""
    lines = []
    for version in dict.fromkeys(run.version for run in curves):
        last = {(run.seed, bool(run.alpha)): found[-1].loss for run, found in curves.items() if run.version == version}
        seeds = sorted({seed for seed, _ in last})
        alone, taught = ([last[seed, by_teacher] for seed in seeds] for by_teacher in (False, True))
        gains = [a - b for a, b in zip(alone, taught, strict=True)]
        lines.append(
            f"{version}, {len(seeds)} seeds: text alone {statistics.mean(alone):.4f}, teacher "
            f"{statistics.mean(taught):.4f}; better by {min(gains):.4f} to {max(gains):.4f}, mean "
            f"{statistics.mean(gains):.4f}"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
