"""Does learning from rewards raise the reward of problems that were never trained? Curves of several seeds.

    OMP_NUM_THREADS=1 python benchmarks/arithmetic_reward.py --output docs/arithmetic_reward

Makes the problems and the base model of ``scripts/run_grpo.sh``, then trains it with ``--objective grpo`` once for each
seed, by the repository's own commands. Writes NAME.csv, the share of right answers to held-out problems by step (8
answers to each, drawn at temperature 1), and NAME.png. Ends with 1 if a seed's gain is below ``--least_gain``.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from rwkvpeft.config.groups import RewardConfig

ROOT = Path(__file__).resolve().parents[1]
ARITHMETIC = ROOT / "scripts" / "arithmetic"


class Point(NamedTuple):
    """What the held-out problems said after some steps of a seed's run."""

    seed: int
    step: int
    reward: float
    entropy: float


def main() -> int:
    """Run all seeds and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=80, help="optimizer steps of 32 prompts x 8 answers")
    parser.add_argument("--advantage", default=RewardConfig.advantage)
    parser.add_argument("--least_gain", type=float, default=0.1)
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "arithmetic_reward", help="folder of the runs")
    parser.add_argument("--output", type=Path, default=ROOT / "out" / "arithmetic_reward" / "curves")
    flags = parser.parse_args()
    work = flags.work.resolve()
    began = time.perf_counter()
    if not (work / "base.pth").exists():
        run(ARITHMETIC / "problems.py", "--output", work)
        run(ARITHMETIC / "base.py", "--problems", work, "--output", work / "base.pth")
        print(f"problems and base model: {time.perf_counter() - began:.0f} s", flush=True)
    points = []
    for seed in range(1, flags.seeds + 1):
        points += train(work, seed, flags.steps, flags.advantage)
    write_csv(flags.output.with_suffix(".csv"), points)
    draw(flags.output.with_suffix(".png"), points)
    gains = [gain(points, seed) for seed in range(1, flags.seeds + 1)]
    seconds = time.perf_counter() - began
    print(f"gain: mean {statistics.mean(gains):.3f}, least {min(gains):.3f}; {seconds:.0f} s in all")
    return int(min(gains) < flags.least_gain)


def train(work: Path, seed: int, steps: int, advantage: str) -> list[Point]:
    """One run; what its evaluations found."""
    began = time.perf_counter()
    folder = work / f"seed-{seed}"
    run(
        ROOT / "train.py", "--load_model", work / "base.pth", "--proj_dir", folder, "--resume", "none",
        "--objective", "grpo", "--reward", f"{ARITHMETIC / 'reward.py'}:right", "--advantage", advantage,
        "--data_file", work / "train.jsonl", "--val_data_file", work / "heldout.jsonl", "--val_steps", 20,
        "--tokenizer", "bytes", "--ctx_len", 12, "--answer_tokens", 4, "--group_size", 8, "--micro_bsz", 32,
        "--epoch_steps", steps, "--epoch_count", 1, "--lr_init", "3e-3", "--lr_final", "1e-3",
        "--peft", "lora", "--peft_config", '{"r": 16, "lora_alpha": 32, "lora_dropout": 0.0}', "--train_parts", "none",
        "--accelerator", "cpu", "--precision", "fp32", "--random_seed", seed, "--report", "false",
    )  # fmt: skip
    lines = (folder / "val_data.jsonl").read_text(encoding="utf-8").splitlines()
    points = []
    for record in map(json.loads, lines):
        figures = record["metrics"]
        points.append(Point(seed, record["step"], figures["reward"], figures["entropy"]))
    print(f"seed {seed}: {points[0].reward:.3f} -> {points[-1].reward:.3f}, {time.perf_counter() - began:.0f} s",
          flush=True)
    return points


def gain(points: list[Point], seed: int) -> float:
    """What a seed's last reward is above its first."""
    own = [point.reward for point in points if point.seed == seed]
    return own[-1] - own[0]


def run(*words: object) -> None:
    """Run a program of the repository; one that fails ends this one, with what it said."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr)


def write_csv(path: Path, points: list[Point]) -> None:
    """Write one line for each evaluation."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Point._fields)
        writer.writerows((p.seed, p.step, f"{p.reward:.4f}", f"{p.entropy:.4f}") for p in points)


def draw(path: Path, points: list[Point]) -> None:
    """Draw each seed's curve and their mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3.2))
    for seed in sorted({point.seed for point in points}):
        own = [point for point in points if point.seed == seed]
        axes.plot([p.step for p in own], [p.reward for p in own], color="tab:blue", alpha=0.35, linewidth=1)
    steps = sorted({point.step for point in points})
    means = [statistics.mean(p.reward for p in points if p.step == step) for step in steps]
    axes.plot(steps, means, color="tab:blue", linewidth=2, label="mean of the seeds")
    axes.set(xlabel="optimizer step", ylabel="right answers, held-out problems", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
