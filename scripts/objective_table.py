"""Every objective with every kind of training, each really run: does it train, go on exactly, and merge?

    python scripts/objective_table.py                 run everything, write the table into README.md
    python scripts/objective_table.py --only dpo,kto  some objectives, print the table alone

Each cell is train.py on a small model with random weights: 4 steps at once, and 2 steps that another start goes on
from, whose last checkpoint must be the same bit for bit; then merge.py, whose model must compute what base and adapter
do together. A cell that is refused on purpose says so.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from rwkvpeft.cli.merge import main as merge_main
from rwkvpeft.cli.train import main as train_main
from rwkvpeft.config.objective import PREFERENCES
from rwkvpeft.generation.tuned import load_tuned
from rwkvpeft.models.shape import new_shape
from rwkvpeft.registry import MODELS, OBJECTIVES, find

README = Path(__file__).resolve().parents[1] / "README.md"
START, END = "<!-- objective table: written by scripts/objective_table.py -->", "<!-- end of the objective table -->"
METHODS = {
    "full": "--peft none",
    "lora": '--peft lora --peft_config {"r":4,"lora_dropout":0}',
    "miss": '--peft miss --peft_config {"r":4}',
    "state": "--peft state --lr_init 0.1 --lr_final 0.1",
}
VERSIONS = {"v6": "x060", "v7": "x070"}
BASES = ("none", "nf4")
_NAMES = ("red", "blue", "green", "grey", "black", "white")
_SHORT = "--ctx_len 64 --micro_bsz 2 --epoch_steps 2 --epoch_count 2 --epoch_save 1 --random_seed 3 --report false"
_RUN = f"{_SHORT} --precision fp32 --tokenizer bytes"
_REWARD = '''def short(prompts, answers, records):
    return [-float(len(answer)) for answer in answers]
'''
MOST = 2e-4


class Cell(NamedTuple):
    """What came out; ``problem`` is empty where all is well."""

    problem: str = ""
    refused: bool = False


def make_inputs(folder: Path) -> None:
    """Models, data of every kind and a reward."""
    for name, version in VERSIONS.items():
        for layers, what in ((2, "base"), (3, "teacher")):
            torch.manual_seed(layers)
            shape = new_shape(version, n_layer=layers, n_embd=64, vocab_size=256, head_size=16)
            weights = find(MODELS, version, flag="model").initial_weights(shape)
            noisy = {key: tensor + 0.05 * torch.randn_like(tensor) for key, tensor in weights.items()}
            torch.save(noisy, folder / f"{what}-{name}.pth")
    pairs = [{"prompt": f"{a} or {b}?", "chosen": a, "rejected": b} for a in _NAMES for b in _NAMES if a != b]
    texts = [{"text": f"User: {p['prompt']}\n\nAssistant: {p['chosen']}"} for p in pairs]
    prompts = [{"prompt": p["prompt"], "answer": p["chosen"]} for p in pairs]
    for name, records in (("pairs", pairs), ("texts", texts), ("prompts", prompts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "reward.py").write_text(_REWARD)


def words_of(objective: str, version: str, folder: Path) -> list[str]:
    """The flags of an objective."""
    if objective in PREFERENCES:
        return ["--data_file", str(folder / "pairs.jsonl")]
    if objective == "distill":
        return ["--data_file", str(folder / "texts.jsonl"), "--teacher", str(folder / f"teacher-{version}.pth")]
    if objective == "grpo":
        reward = f"--reward {folder / 'reward.py'}:short --group_size 3 --answer_tokens 6"
        return ["--data_file", str(folder / "prompts.jsonl"), *reward.split()]
    return ["--data_file", str(folder / "texts.jsonl")]


def quietly(command: Callable[[list[str]], int], words: list[str]) -> tuple[int, str]:
    """The exit code of a command of ours, and the last line it wrote of an error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = command(words)
        except Exception as reason:  # noqa: BLE001
            # a table of all that works is worth more than its first failure
            return 1, repr(reason)
    return code, err.getvalue().strip()


def run_cell(objective: str, method: str, version: str, base: str, folder: Path, accelerator: str = "cpu") -> Cell:
    """One combination, in a folder of its own."""
    place = Path(tempfile.mkdtemp(dir=folder))
    model = folder / f"base-{version}.pth"
    words = [*words_of(objective, version, folder), *_RUN.split(), *METHODS[method].split(), "--quant", base,
             "--load_model", str(model), "--objective", objective, "--accelerator", accelerator]
    code, error = quietly(train_main, [*words, "--proj_dir", str(place / "whole")])
    if code:
        refused = method == "full" and base != "none" and "--quant" in error
        return Cell("" if refused else error, refused)
    for stop in (["--my_exit", "0"], []):
        code, error = quietly(train_main, [*words, *stop, "--proj_dir", str(place / "parts")])
        if code:
            return Cell(f"going on: {error}")
    last = [torch.load(place / run / "rwkv-1.pth", weights_only=True) for run in ("whole", "parts")]
    if any(not torch.equal(tensor, last[1][name]) for name, tensor in last[0].items()):
        return Cell("another result after going on")
    first = torch.load(place / "whole" / "rwkv-0.pth", weights_only=True)
    if all(torch.equal(tensor, first[name]) for name, tensor in last[0].items()):
        return Cell("nothing was trained")
    return Cell() if method == "full" else check_merge(model, place / "whole" / "rwkv-1.pth", place, base)


def check_merge(model: Path, adapter: Path, place: Path, base: str) -> Cell:
    """Whether the merged model computes what base and adapter do together."""
    merged = place / "merged.pth"
    code, error = quietly(merge_main, ["--base_model", str(model), "--lora_checkpoint", str(adapter), "--output",
                                       str(merged)])
    if code:
        return Cell(f"merge: {error}")
    tokens = torch.tensor([list(b"User: red or blue?")])
    with torch.no_grad():
        whole = load_tuned(str(merged), device="cpu").model(tokens)[0]
        beside = load_tuned(str(model), str(adapter), device="cpu").model(tokens)[0]
    difference = (whole - beside).abs().max().item()
    return Cell("" if difference < MOST else f"merged differs by {difference:.1e}")


def table(found: dict[tuple[str, str, str, str], Cell]) -> str:
    """One row for each objective, one column for each method and base; versions are named where not all passed."""
    columns = list(dict.fromkeys((method, base) for _, method, _, base in found))
    heads = [method if base == "none" else f"{method}, {base}" for method, base in columns]
    lines = ["| `--objective` | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for objective in dict.fromkeys(name for name, *_ in found):
        row = [_cell({v: found[objective, m, v, b] for v in VERSIONS}) for m, b in columns]
        lines.append(f"| {objective} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def _cell(by_version: dict[str, Cell]) -> str:
    if all(cell.refused for cell in by_version.values()):
        return "refused"
    passed = [version for version, cell in by_version.items() if not cell.problem]
    return "yes" if len(passed) == len(by_version) else ", ".join(passed) or "no"


def main() -> int:
    """Run, then write or print. Returns 1 if a cell failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(OBJECTIVES), help="objectives, with commas between them")
    parser.add_argument("--accelerator", default="cpu", choices=("cpu", "gpu"))
    flags = parser.parse_args()
    asked = flags.only.split(",")
    found: dict[tuple[str, str, str, str], Cell] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder)
        for key in [(o, m, v, b) for o in asked for b in BASES for m in METHODS for v in VERSIONS]:
            found[key] = run_cell(*key, folder, flags.accelerator)
            print(*key, "refused" if found[key].refused else found[key].problem or "yes", flush=True)
    text = table(found)
    print(text)
    if asked == list(OBJECTIVES):
        whole = README.read_text(encoding="utf-8")
        before, rest = whole.split(START)
        README.write_text(f"{before}{START}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    return int(any(cell.problem for cell in found.values()))


if __name__ == "__main__":
    sys.exit(main())
