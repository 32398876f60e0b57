"""What each method learns, how fast, on each kind of base: the table of docs/methods.md.

    python benchmarks/methods.py --results out/methods.json --output docs/methods.md
    python benchmarks/methods.py --results out/methods.json --only lora,nf4     cases with both words in their name
    python benchmarks/methods.py --results out/methods.json --list              the cases, and which are done
    python benchmarks/methods.py --results out/methods.json --speeds            time what is done again

The task is the quickstart's: the shipped byte-level model learns the shipped conversations of a library's help desk,
and is then asked for its loss on conversations it has not seen. Every case is a run of train.py and one of
rwkvpeft.evaluate in fresh processes on one thread, with the same rows in the same order. A method's learning rate is
the one of a small grid with the lowest training loss in the last mini-epoch on the fp32 base; its runs on other bases
take that rate. Cases in the results file are not run again; speeds mean something on an idle machine only.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "scripts" / "data"
MODEL = DATA / "base-v7-bytes.pth"
EPOCHS = 4
CTX_LEN = 160
MICRO_BSZ = 4
# the first steps warm up caches
STEPS_NOT_TIMED = 5
SPEED_STEPS = 30

THIN = {"r": 32, "lora_alpha": 32, "lora_dropout": 0.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": THIN,
    "dora": THIN,
    "pissa": {"r": 32},
    "miss": {"r": 32},
    "bat": {"r": 32},
    "state": {},
    "lora+state": THIN,
    "full": {},
}
GRID = {
    "lora": (2e-3, 6e-3, 1.8e-2),
    "dora": (2e-3, 6e-3, 1.8e-2),
    "pissa": (6e-4, 2e-3, 6e-3),
    "miss": (2e-3, 6e-3, 1.8e-2),
    "bat": (6e-4, 2e-3, 6e-3),
    "state": (0.3, 1.0, 3.0),
    "lora+state": (2e-3, 6e-3, 1.8e-2),
    "full": (6e-4, 2e-3, 6e-3),
}
# methods of Hugging Face peft with its default settings, and one rate each
FOREIGN = {
    "adalora": 6e-3,
    "loha": 6e-3,
    "lokr": 6e-3,
    "oft": 2e-3,
    "boft": 2e-3,
    "hra": 6e-3,
    "vera": 2e-2,
    "ia3": 2e-2,
}
FORMATS = ("int8", "nf4", "fp4", "fp8")
ON_FORMATS = ("lora", "dora", "pissa", "miss", "bat", "state")


class Case(NamedTuple):
    """One run. ``rate`` None is the best of the method's grid."""

    method: str
    base: str
    rate: float | None

    @property
    def name(self) -> str:
        """As in the results file and for --only."""
        return f"{self.method} {self.base}" + ("" if self.rate is None else f" {self.rate:g}")


def cases() -> Iterator[Case]:
    """All of them; those a rate is chosen from come first."""
    for method, rates in GRID.items():
        for rate in rates:
            yield Case(method, "fp32", rate)
    for method in GRID:
        yield Case(method, "bf16", None)
    for base in FORMATS:
        for method in ON_FORMATS:
            yield Case(method, base, None)
    for method, rate in FOREIGN.items():
        yield Case(method, "fp32", rate)


def best_rate(method: str, results: dict[str, Any]) -> float | None:
    """The rate of the grid with the lowest training loss; None as long as one is missing or all have failed."""
    found = [results.get(Case(method, "fp32", rate).name) for rate in GRID[method]]
    if None in found:
        return None
    losses = [(result["training_loss"], rate) for result, rate in zip(found, GRID[method], strict=True)
              if "error" not in result]
    return min(losses)[1] if losses else None


def call(*words: object) -> str:
    """Run a program of this repository on one thread and return what it prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *(str(word) for word in words)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        message = (done.stderr or done.stdout).strip().splitlines()
        raise RuntimeError(next((line for line in message if line.startswith("error")), message[-1]))
    return done.stdout


def heldout_loss(*model: object) -> float:
    """In fp32, on the base as it was stored in training."""
    data = ("--data_file", DATA / "library_heldout.jsonl", "--tokenizer", "bytes", "--loss_mask", "qa")
    printed = call("-m", "rwkvpeft.evaluate", "--model", *model, *data, "--json")
    return float(json.loads(printed.splitlines()[-1])["loss"])


def train(case: Case, rate: float, folder: Path, *, epoch_steps: int, epochs: int) -> tuple[str, list[dict[str, Any]]]:
    """Train one case into its own folder. Returns what was printed, and the record of each step."""
    data = folder / "data"
    if not data.with_suffix(".bin").is_file():
        library = DATA / "library.jsonl"
        call("make_data.py", library, 1, CTX_LEN, "--seed", 1, "--tokenizer", "bytes", "--output", data)
    proj_dir = proj_dir_of(case, folder)
    words: list[object] = ["--load_model", MODEL, "--proj_dir", proj_dir, "--resume", "none", "--data_file", data]
    words += ["--tokenizer", "bytes", "--dataload", "pad", "--loss_mask", "qa", "--ctx_len", CTX_LEN]
    words += ["--micro_bsz", MICRO_BSZ, "--epoch_steps", epoch_steps, "--epoch_count", epochs, "--epoch_save", 0]
    words += ["--lr_init", rate, "--lr_final", rate / 20, "--warmup_steps", 10, "--random_seed", 1]
    words += ["--accelerator", "cpu", "--precision", "bf16" if case.base == "bf16" else "fp32"]
    if case.method != "full":
        words += ["--peft", case.method, "--peft_config", json.dumps(SETTINGS.get(case.method, {}))]
    if case.base in FORMATS:
        words += ["--quant", case.base]
    printed = call("train.py", *words)
    return printed, [json.loads(line) for line in (proj_dir / "loss_data.jsonl").read_text().splitlines()]


def proj_dir_of(case: Case, folder: Path) -> Path:
    return folder / case.name.replace(" ", "-")


def speed(steps: list[dict[str, Any]]) -> float:
    """Tokens per second after the first steps."""
    timed = steps[STEPS_NOT_TIMED:]
    return sum(step["tokens"] for step in timed) / sum(step["t_cost"] for step in timed)


def run(case: Case, rate: float, folder: Path) -> dict[str, Any]:
    """Train and evaluate one case."""
    start = time.perf_counter()
    printed, steps = train(case, rate, folder, epoch_steps=0, epochs=EPOCHS)
    seconds = time.perf_counter() - start
    last = [step for step in steps if step["epoch"] == EPOCHS - 1]
    result = proj_dir_of(case, folder) / f"rwkv-{EPOCHS - 1}.pth"
    tuned = (result,) if case.method == "full" else (MODEL, "--adapter", result)
    trained = re.search(r"trained: .*?, ([\d.,]+(?: [MB])?) of [\d.,]+ ?[MB]? parameters", printed)
    return {
        "rate": rate,
        "steps": len(steps),
        "training_loss": sum(step["loss"] * step["weight"] for step in last) / sum(step["weight"] for step in last),
        "heldout_loss": heldout_loss(*tuned),
        "tokens_per_second": speed(steps),
        "trained": trained[1] if trained else "?",
        "file_bytes": result.stat().st_size,
        "seconds": seconds,
    }


PAGE = """\
# What the methods learn

One task, one budget: the shipped byte-level v7 model (1 M parameters) trains {epochs} passes over the shipped 290
conversations ({steps} steps of {rows} rows, the answers alone), and is then evaluated on 40 it has not seen. Same rows
in the same order, one CPU thread, Adam, a cosine from the learning rate to a twentieth of it. Each method's rate is
the best of three by training loss on the fp32 base; the methods of Hugging Face peft run with its default settings at
one rate, so a better one may exist. Ranks are 32. Adapters train the norms and time parameters too
(`--train_parts time ln`), state tuning nothing but the states. int8, nf4, fp4 and fp8 bases compute in fp32, and the
tuned model is evaluated on the base as it was trained on. So small a model tells whether a method works and what it
costs, not which one is best for a large one.

Held-out loss of the model before training: **{base:.4f}**. Written by `python benchmarks/methods.py`.

| method | base | learning rate | held-out loss | tokens/s | trained | file |
| --- | --- | ---: | ---: | ---: | ---: | ---: |
"""


def table(results: dict[str, Any]) -> str:
    """docs/methods.md."""
    page = PAGE.format(epochs=EPOCHS, steps=results["steps"], rows=MICRO_BSZ, base=results["base"])
    lines = page.splitlines()
    failed = []
    for case, result in finished(results):
        if "error" in result:
            failed.append(f"- {case.name}: {result['error']}")
            continue
        lines.append(
            f"| {case.method} | {case.base} | {result['rate']:g} | {result['heldout_loss']:.4f} | "
            f"{result['tokens_per_second']:,.0f} | {result['trained']} | {result['file_bytes'] / 1e6:.2f} MB |"
        )
    if failed:
        lines += ["", "Not run:", "", *failed]
    return "\n".join(lines) + "\n"


def finished(results: dict[str, Any]) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Cases with their results, method by method; of a grid only the rate that was chosen."""
    order = {method: number for number, method in enumerate([*GRID, *FOREIGN])}
    for case in sorted(cases(), key=lambda case: order[case.method]):
        chosen = case.rate is None or case.method in FOREIGN or case.rate == best_rate(case.method, results)
        if case.name in results and chosen:
            yield case, results[case.name]


def measure(case: Case, results: dict[str, Any], folder: Path) -> None:
    """Run a case and add what came of it to the results."""
    if "base" not in results:
        results["base"] = heldout_loss(MODEL)
    rate = case.rate or best_rate(case.method, results)
    try:
        if rate is None:
            raise RuntimeError("no rate of the grid worked on the fp32 base")
        found = run(case, rate, folder)
    except RuntimeError as reason:
        results[case.name] = {"error": str(reason)}
        print(f"{case.name}: {reason}", flush=True)
        return
    results |= {case.name: found, "steps": found["steps"]}
    shown = "held-out loss {heldout_loss:.4f}, {tokens_per_second:,.0f} tokens/s, {seconds:.0f} s"
    print(f"{case.name}: {shown.format(**found)}", flush=True)


def measure_speeds(results: dict[str, Any], folder: Path) -> None:
    """Time every finished case again, over a few steps."""
    for case, result in finished(results):
        if "error" in result:
            continue
        _, steps = train(case, result["rate"], folder / "speeds", epoch_steps=SPEED_STEPS, epochs=1)
        result["tokens_per_second"] = speed(steps)
        print(f"{case.name}: {result['tokens_per_second']:,.0f} tokens/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "out" / "methods.json", help="what has been measured")
    parser.add_argument("--output", type=Path, help="write the table there, as docs/methods.md")
    parser.add_argument("--only", default="", help="words, separated by commas, that a case's name must have")
    parser.add_argument("--list", action="store_true", help="name the cases and run none")
    parser.add_argument("--speeds", action="store_true", help="only time the finished cases again, a few steps each")
    options = parser.parse_args()
    folder = options.results.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    results = json.loads(options.results.read_text()) if options.results.is_file() else {}
    if options.speeds:
        (folder / "speeds").mkdir(exist_ok=True)
        measure_speeds(results, folder)
        options.results.write_text(json.dumps(results, indent=1))
    wanted = [word for word in options.only.split(",") if word]
    for case in () if options.speeds else cases():
        if not all(word in case.name.split() for word in wanted):
            continue
        if options.list:
            print(f"{case.name}: {'done' if case.name in results else 'to do'}")
            continue
        # a rate is chosen from the whole grid
        rates = [Case(case.method, "fp32", rate) for rate in GRID[case.method]] if case.rate is None else []
        for needed in (*rates, case):
            if needed.name not in results:
                measure(needed, results, folder)
                options.results.write_text(json.dumps(results, indent=1))
    if options.output and "steps" in results:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(table(results), encoding="utf-8")


if __name__ == "__main__":
    main()
