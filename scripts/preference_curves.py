"""Held-out accuracy of preference objectives while they train: figures and picture of docs/preferences.md.

    python scripts/preference_curves.py                          run all cases, write the three files in docs/
    python scripts/preference_curves.py --only dpo,kto           some cases, print alone
    python scripts/preference_curves.py --only dpo --seed 2 --rate 3e-3      another rate on other pairs, print alone

The pairs are those of scripts/preference_pairs.py, the model is the shipped byte-level one, which has seen none of
them. Each case is a run of train.py in a process of its own on one CPU thread. Runs that are there are not run again.

``accuracy`` is the share of held-out pairs whose chosen answer has the larger reward, as the objective defines it. With
a reference all rewards are 0 before the first step: no pair is told apart, which is written as 0.5. ``by probability``
is the same for every objective: the share of held-out pairs whose chosen answer is the likelier one.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from preference_pairs import write_pairs

from rwkvpeft.atomic import write_whole
from rwkvpeft.config.groups import DataConfig
from rwkvpeft.config.objective import WITH_REFERENCE
from rwkvpeft.data.batches import PreferenceBatch
from rwkvpeft.data.pair_batches import PAIR, PairCollator
from rwkvpeft.data.pair_source import open_pair_source
from rwkvpeft.data.pairs import PairRows
from rwkvpeft.generation.tuned import load_tuned
from rwkvpeft.objectives.base import Provided
from rwkvpeft.objectives.preference.scores import score_answers

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
MODEL = ROOT / "scripts" / "data" / "base-v7-bytes.pth"
PUBLISHED_SEED = 1
PAIRS, HELD_OUT = 480, 200
EVERY, SHOWN, MICRO_BSZ, CTX_LEN = 40, 80, 8, 256
START, END = "<!-- figures: written by scripts/preference_curves.py -->", "<!-- end of the figures -->"
LORA = {"r": 32, "lora_alpha": 32, "lora_dropout": 0.0}


@dataclass(frozen=True)
class Case:
    """A run: an objective, what is trained, its learning rate, and flags beside those of all."""

    objective: str
    rate: float
    peft: str = "lora"
    settings: Mapping[str, Any] = field(default_factory=lambda: LORA)
    flags: tuple[str, ...] = ()
    steps: int = 160

    @property
    def name(self) -> str:
        """As in tables and for --only."""
        return self.objective + {"lora": "", "none": " full"}.get(self.peft, f" {self.peft}")

    @property
    def words(self) -> list[str]:
        """The flags that differ from one case to another."""
        words = ["--objective", self.objective, "--lr_init", f"{self.rate:g}", "--lr_final", f"{self.rate / 10:g}"]
        words += ["--peft", self.peft, *self.flags]
        return words + (["--peft_config", json.dumps(self.settings)] if self.settings else [])


CASES = (
    Case("dpo", 2e-3),
    Case("orpo", 3e-3, flags=("--beta", "1"), steps=200),
    Case("simpo", 2e-3, flags=("--beta", "10")),
    Case("kto", 2e-3),
    Case("dpo", 3.0, "state", {}, steps=320),
    Case("dpo", 1e-3, "none", {}),
    Case("ipo", 2e-3),
)


@dataclass(frozen=True)
class Result:
    """What a run found: its evaluations by step, the last one by probability, and how long it took."""

    case: Case
    points: list[dict[str, float]]
    by_probability: float
    seconds: float


def run(case: Case, seed: int, folder: Path) -> Result:
    """Train, unless it is done, and read what was found."""
    pairs, held_out = write_pairs(folder / f"pairs-{seed}", seed, PAIRS, HELD_OUT)
    proj_dir = folder / "-".join([*case.name.split(), f"{case.rate:g}", *case.flags, "seed", str(seed)])
    done = proj_dir / "result.json"
    if not done.is_file():
        began = time.perf_counter()
        train(case, seed, proj_dir, pairs, held_out)
        seconds = time.perf_counter() - began
        found = {"by_probability": by_probability(case, held_out, proj_dir / "rwkv-0.pth"), "seconds": seconds}
        write_whole(done, lambda partial: partial.write_text(json.dumps(found), encoding="utf-8"))
    return Result(case, points(case, proj_dir), **json.loads(done.read_text(encoding="utf-8")))


def train(case: Case, seed: int, proj_dir: Path, pairs: Path, held_out: Path) -> None:
    """Run train.py. Raises: RuntimeError with what it said if it fails."""
    command = [
        sys.executable, "train.py", "--load_model", MODEL, "--proj_dir", proj_dir, "--resume", "none",
        "--data_file", pairs, "--val_data_file", held_out, "--val_steps", EVERY, "--tokenizer", "bytes",
        "--ctx_len", CTX_LEN, "--micro_bsz", MICRO_BSZ, "--epoch_steps", case.steps, "--epoch_count", 1,
        "--epoch_save", 1, "--warmup_steps", 10, "--random_seed", seed, "--accelerator", "cpu", "--precision", "fp32",
        "--grad_cp", "0", "--report", "false", *case.words,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{case.name}: {(done.stderr or done.stdout).strip()}")


def points(case: Case, proj_dir: Path) -> list[dict[str, float]]:
    """Step, accuracy, margin and loss of each evaluation of the held-out pairs."""
    found = []
    for line in (proj_dir / "val_data.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        metrics = record["metrics"]
        ties = record["step"] == 0 and case.objective in WITH_REFERENCE
        found.append({
            "step": record["step"], "accuracy": 0.5 if ties else metrics["accuracy"], "margin": metrics["margin"],
            "loss": record["val_loss"],
        })
    return found


def by_probability(case: Case | None, held_out: Path, tuned: Path | None) -> float:
    """Share of the pairs of a file whose chosen answer is likelier than the rejected one, by a trained model or, of no
    case, by the base."""
    files = (tuned or MODEL, None) if case is not None and case.peft == "none" else (MODEL, tuned)
    model = load_tuned(*files, device="cpu", tokenizer="bytes").model
    right = 0
    for batch in batches(held_out):
        with torch.no_grad():
            logprobs = score_answers(model, batch, Provided(rows="torch")).logprobs
        right += int((logprobs[:, 0] > logprobs[:, 1]).sum())
    return right / HELD_OUT


def batches(path: Path) -> Iterator[PreferenceBatch]:
    """All pairs of a file, in its order."""
    source = open_pair_source(DataConfig(tokenizer="bytes"), str(path), unpaired=False)
    rows, collator = PairRows(source, CTX_LEN, seed=0, shuffle=False, answers=PAIR), PairCollator(PAIR)
    for start in range(0, len(rows), MICRO_BSZ):
        part = [rows.row(index) for index in range(start, min(start + MICRO_BSZ, len(rows)))]
        yield collator.batch(collator.join(part), collator.weigh(part))


def table(results: list[Result], base: float) -> str:
    """One row for each case."""
    lines = [
        f"Before training the chosen answer is the likelier one in {base:.1%} of the held-out pairs.",
        "",
        f"| objective | trained | learning rate | flags | after {SHOWN} steps | after all | steps | by probability |",
        "|---|---|---:|---|---:|---:|---:|---:|",
    ]
    for found in results:
        case = found.case
        trained = {"lora": "LoRA", "none": "all weights", "state": "the states"}[case.peft]
        flags = f"`{' '.join(case.flags)}`" if case.flags else ""
        shown = next(point for point in found.points if point["step"] == SHOWN)
        lines.append(f"| {case.objective} | {trained} | {case.rate:g} | {flags} | {shown['accuracy']:.1%} "
                     f"| {found.points[-1]['accuracy']:.1%} | {case.steps} | {found.by_probability:.1%} |")
    return "\n".join(lines)


def write_csv(results: list[Result], path: Path) -> None:
    """Every evaluation."""

    def write(partial: Path) -> None:
        with partial.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["objective", "trained", "step", "accuracy", "margin", "loss"])
            for found in results:
                for point in found.points:
                    figures = [f"{point[name]:.6g}" for name in ("accuracy", "margin", "loss")]
                    writer.writerow([found.case.objective, found.case.peft, point["step"], *figures])

    write_whole(path, write)


def draw(results: list[Result], path: Path) -> None:
    """Accuracy by step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="optimizer step", ylabel="accuracy", ylim=(0.4, 1.02),
                              title="held-out pairs in the preferred order")
    for found in results:
        style = {"lora": "-", "state": "--"}.get(found.case.peft, ":")
        steps, accuracies = ([point[name] for point in found.points] for name in ("step", "accuracy"))
        axes.plot(steps, accuracies, style, marker="o", markersize=3, label=found.case.name)
    axes.axhline(0.5, color="grey", linewidth=0.8)
    axes.axhline(0.9, color="grey", linewidth=0.8, linestyle=":")
    axes.legend(ncols=2)
    axes.grid(alpha=0.3)
    write_whole(path, lambda partial: figure.savefig(partial, format="png", dpi=120))


def main() -> int:
    """Run, print and, of all cases, write. Returns 1 if a published case stays below 90 %."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [case.name for case in CASES]
    parser.add_argument("--only", default=",".join(names), help="cases, with commas between them")
    parser.add_argument("--seed", type=int, default=PUBLISHED_SEED, help="of the pairs and of the runs")
    parser.add_argument("--rate", type=float, help="another learning rate")
    parser.add_argument("--flags", default="", help="other flags of the case")
    parser.add_argument("--output", type=Path, default=ROOT / "out" / "preference_curves", help="folder of the runs")
    flags = parser.parse_args()
    asked = flags.only.split(",")
    if unknown := [name for name in asked if name not in names]:
        parser.error(f"no case {', '.join(unknown)}; cases: {', '.join(names)}")
    chosen = [case for case in CASES if case.name in asked]
    if flags.rate:
        chosen = [replace(case, rate=flags.rate) for case in chosen]
    if flags.flags:
        chosen = [replace(case, flags=tuple(flags.flags.split())) for case in chosen]
    _, held_out = write_pairs(flags.output.resolve() / f"pairs-{flags.seed}", flags.seed, PAIRS, HELD_OUT)
    base = by_probability(None, held_out, None)
    print(f"base: {base:.1%}", flush=True)
    results = []
    for case in chosen:
        results.append(run(case, flags.seed, flags.output.resolve()))
        shown = " ".join(f"{point['accuracy']:.3f}" for point in results[-1].points)
        print(f"{case.name} {case.rate:g}: {shown}, by probability {results[-1].by_probability:.3f}, "
              f"{results[-1].seconds:.0f} s", flush=True)
    if asked == names and flags.seed == PUBLISHED_SEED and not (flags.rate or flags.flags):
        write_csv(results, DOCS / "preferences.csv")
        draw(results, DOCS / "preferences.png")
        page = DOCS / "preferences.md"
        before, rest = page.read_text(encoding="utf-8").split(START)
        page.write_text(f"{before}{START}\n{table(results, base)}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    return int(any(found.points[-1]["accuracy"] <= 0.9 for found in results))


if __name__ == "__main__":
    sys.exit(main())
