"""What packing saves on short documents: the quickstart's task, padded, padded by similar lengths, and packed.

    python benchmarks/packing.py
    python benchmarks/packing.py --packing     instead: the time to pack a million documents, and how full rows get
    python benchmarks/packing.py --ctx_len 160 --epochs 9    the quickstart's own rows, of which a third is padding

Every run is one of train.py in a fresh process on one thread, with LoRA and the quickstart's rates, over the same
documents as often, and as many documents at a step as comes nearest; then the held-out loss is measured. A step's time
is the median of its run's. On a busy machine compare the processor time of the whole processes, their start included.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from methods import DATA, MODEL, STEPS_NOT_TIMED, THIN, call, heldout_loss

from rwkvpeft.data.packing import pack_tightly


class Run(NamedTuple):
    """What a run did: optimizer steps, seconds and tokens of one of them, processor time of all, held-out loss."""

    steps: int
    seconds: float
    tokens: float
    processor: float
    loss: float

    @property
    def total(self) -> float:
        """Seconds of all steps."""
        return self.steps * self.seconds


def cases(ctx_len: int, documents: int, mean: float) -> dict[str, list[object]]:
    """Each kind of rows and the flags that ask for it, with ``documents`` at a step, whose mean length is given."""
    rows = max(1, round(documents * mean / ctx_len)) if mean * 2 < ctx_len else documents
    return {
        "padded": ["--dataload", "pad", "--micro_bsz", documents],
        "similar lengths": ["--dataload", "pad", "--length_buckets", "--micro_bsz", documents],
        "packed": ["--dataload", "pack", "--micro_bsz", rows],
    }


def measure(name: str, words: list[object], folder: Path, flags: argparse.Namespace) -> Run:
    """Train, and measure the held-out loss of what came out."""
    proj_dir = folder / name.replace(" ", "_")
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    call(
        "train.py", "--load_model", MODEL, "--proj_dir", proj_dir, "--resume", "none",
        "--data_file", DATA / "library.jsonl", "--tokenizer", "bytes", "--loss_mask", "qa", "--ctx_len", flags.ctx_len,
        "--epoch_steps", 0, "--epoch_count", flags.epochs, "--epoch_save", 0, "--lr_init", 6e-3, "--lr_final", 3e-4,
        "--random_seed", 1, "--accelerator", "cpu", "--precision", "fp32", "--peft", "lora",
        "--peft_config", json.dumps(THIN), *words,
    )  # fmt: skip
    processor = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    steps = [json.loads(line) for line in (proj_dir / "loss_data.jsonl").read_text().splitlines()]
    return Run(
        steps=len(steps),
        seconds=statistics.median(step["t_cost"] for step in steps[STEPS_NOT_TIMED:]),
        tokens=statistics.mean(step["tokens"] for step in steps),
        processor=processor,
        loss=heldout_loss(MODEL, "--adapter", proj_dir / f"rwkv-{flags.epochs - 1}.pth"),
    )


def mean_length() -> float:
    """Tokens of a document of the task, bytes all of them, without the few that its layout adds."""
    records = [json.loads(line) for line in (DATA / "library.jsonl").read_text().splitlines()]
    return statistics.mean(sum(len(turn["content"]) for turn in record["messages"]) for record in records)


def time_packing() -> None:
    """Print what packing a million documents of random lengths takes, without training."""
    draw = np.random.default_rng(0)
    for longest in (1024, 4096, 65536):
        lengths = np.clip(draw.lognormal(np.log(longest / 8), 1, 10**6), 1, longest).astype(np.int64)
        start = time.perf_counter()
        packing = pack_tightly(lengths, longest)
        seconds = time.perf_counter() - start
        filled = 100 * lengths.sum() / len(packing) / longest
        print(f"10^6 documents of up to {longest:,} tokens: {seconds:.2f} s, rows {filled:.2f} % full")


def main() -> None:
    """Run all kinds of rows and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ctx_len", type=int, default=512, help="tokens of a row (default 512)")
    parser.add_argument("--epochs", type=int, default=4, help="passes over the documents (default 4)")
    parser.add_argument("--documents", type=int, default=4, help="documents at a step (default 4, as the quickstart)")
    parser.add_argument("--output", type=Path, default=Path("out/packing"), help="folder of the runs")
    parser.add_argument("--only", default="", help="the one kind of rows to run: padded, similar lengths or packed")
    parser.add_argument("--packing", action="store_true", help="time the packing alone")
    flags = parser.parse_args()
    if flags.packing:
        time_packing()
        return
    print(f"untrained: held-out loss {heldout_loss(MODEL):.3f}")
    print(f"{'rows':16} {'steps':>6} {'tokens a step':>14} {'s a step':>9} {'s in all':>9} {'CPU s':>7} {'loss':>9}")
    first = None
    for name, words in cases(flags.ctx_len, flags.documents, mean_length()).items():
        if flags.only not in ("", name):
            continue
        run = measure(name, words, flags.output.resolve(), flags)
        first = first or run
        print(
            f"{name:16} {run.steps:6} {run.tokens:14.0f} {run.seconds:9.3f} {run.total:9.1f} {run.processor:7.1f} "
            f"{run.loss:9.3f}   {first.total / run.total:.2f} x",
            flush=True,
        )


if __name__ == "__main__":
    main()
