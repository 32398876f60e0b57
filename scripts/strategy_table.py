"""Every strategy, method and number of processes, each really run: does it give what one process gives?

    python scripts/strategy_table.py [--markdown docs/strategies.md]
    python scripts/strategy_table.py --accelerator gpu --processes 1    # on a machine with one GPU

A small v7 model with random weights is trained for 6 optimizer steps of 8 rows each: full, lora and state
tuning, by one process and by two. Each run is compared with the same method by one process without a strategy, which
takes 8 rows at once: the largest difference of a step's loss, and of a final weight. The micro-batches are 4 rows a
process, accumulated where one process runs: 1 x 8, 1 x 4 x 2 and 2 x 4 are compared too. The command fails if
a loss differs by more than 1e-5.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from rwkvpeft.models.rwkv7 import Rwkv7
from rwkvpeft.models.shape import new_shape
from rwkvpeft.registry import STRATEGIES

ROOT = Path(__file__).resolve().parents[1]
METHODS = {
    "full": "--peft none",
    "lora": '--peft lora --peft_config {"r":4,"lora_dropout":0} --quant nf4',
    "state": "--peft state --lr_init 0.1",
}
MOST = 1e-5
MARK = "<!-- strategy table: written by scripts/strategy_table.py -->"
_BESIDE_AUTO = tuple(name for name in STRATEGIES if name != "auto")


class Difference(NamedTuple):
    """How far a run is from the one it is compared with; ``problem`` instead, if it failed."""

    loss: float
    weight: float
    problem: str = ""

    @property
    def is_fine(self) -> bool:
        """Whether the runs agree to round-off."""
        return not self.problem and self.loss <= MOST

    def cell(self) -> str:
        """For the table."""
        return self.problem or f"{self.loss:.1e} / {self.weight:.1e}"


def make_inputs(folder: Path, accelerator: str) -> list[str]:
    """A model, data, and the words that name them."""
    torch.manual_seed(0)
    weights = Rwkv7.initial_weights(new_shape("x070", n_layer=3, n_embd=64, vocab_size=256, head_size=16))
    torch.save({name: tensor + 0.02 * torch.randn_like(tensor) for name, tensor in weights.items()}, folder / "m.pth")
    records = [{"text": f"User: {n} and {m}?\n\nAssistant: {n + m}."} for n in range(8) for m in range(8)]
    (folder / "d.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    files = f"--load_model {folder / 'm.pth'} --data_file {folder / 'd.jsonl'} --tokenizer bytes"
    run = "--ctx_len 32 --epoch_count 2 --epoch_save 2 --random_seed 3 --lr_init 1e-3 --report false --resume none"
    return [*files.split(), *run.split(), "--accelerator", accelerator, "--precision", "fp32"]


def train(words: list[str]) -> str:
    """Run the command; returns what went wrong, or nothing. One thread: tiny tensors gain nothing from more."""
    command = [sys.executable, str(ROOT / "train.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    lines = done.stderr.strip().splitlines()
    return "" if done.returncode == 0 else (lines[-1] if lines else f"exit code {done.returncode}")


def batches(processes: int, rows: int) -> list[str]:
    """Flags for 3 optimizer steps of 8 rows in a mini-epoch."""
    count = 8 // (rows * processes)
    return f"--micro_bsz {rows} --accumulate_grad_batches {count} --epoch_steps {3 * count}".split()


def compare(one: Path, other: Path) -> Difference:
    """The largest differences of two runs."""
    losses = [[json.loads(line)["loss"] for line in (folder / "loss_data.jsonl").open()] for folder in (one, other)]
    weights = [torch.load(folder / "rwkv-1.pth", weights_only=True) for folder in (one, other)]
    return Difference(
        max(abs(a - b) for a, b in zip(*losses, strict=True)),
        max((tensor.float() - weights[1][name].float()).abs().max().item() for name, tensor in weights[0].items()),
    )


def run_all(folder: Path, accelerator: str, processes: list[int]) -> dict[tuple[str, str, int], Difference]:
    """All runs, by strategy, method and processes."""
    common = make_inputs(folder, accelerator)
    found = {}
    for method, words in METHODS.items():
        alone = folder / f"{method}-alone"
        problem = train([*common, *words.split(), *batches(1, 8), "--proj_dir", str(alone)])
        if problem:
            raise SystemExit(f"{method} by one process: {problem}")
        for strategy in _BESIDE_AUTO:
            for count in processes:
                place = folder / f"{method}-{strategy}-{count}"
                more = [*batches(count, 4), "--devices", str(count), "--strategy", strategy]
                problem = train([*common, *words.split(), *more, "--proj_dir", str(place)])
                difference = Difference(0, 0, problem) if problem else compare(alone, place)
                found[strategy, method, count] = difference
                print(strategy, method, count, difference.cell(), flush=True)
    return found


def table(found: dict[tuple[str, str, int], Difference]) -> str:
    """The differences (loss / weight) as Markdown."""
    columns = list(dict.fromkeys((method, processes) for _, method, processes in found))
    lines = ["| strategy | " + " | ".join(f"{method}, {count}" for method, count in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    lines += [
        f"| {strategy} | " + " | ".join(found[(strategy, *column)].cell() for column in columns) + " |"
        for strategy in _BESIDE_AUTO
    ]
    return "\n".join(lines)


def main() -> int:
    """Run, print, and fail if a run failed or differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", type=Path, help="put the table behind its mark in this file, too")
    parser.add_argument("--accelerator", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = run_all(Path(folder), arguments.accelerator, arguments.processes)
    text = table(found)
    print(text)
    if arguments.markdown:
        before = arguments.markdown.read_text(encoding="utf-8").partition(MARK)[0]
        arguments.markdown.write_text(f"{before}{MARK}\n\n{text}\n", encoding="utf-8")
    return 0 if all(difference.is_fine for difference in found.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
