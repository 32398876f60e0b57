"""Train a model from scratch here and by RWKV-LM's own code, and compare the losses step by step.

    python benchmarks/against_rwkv_lm.py --rwkv_lm RWKV-LM --version x070

``--rwkv_lm`` is a checkout of BlinkDL/RWKV-LM; ``rwkv_lm_peer.py`` says how its trainer runs on a CPU. Both read the
same binidx (the documentation inside Python's standard library, as bytes) in the same order (magic prime), start from
the same weights, which its code draws, and follow the same schedule. Ours runs by ``train.py`` as a user would.

Training magnifies round-off: in fp32, equal programs that add in another order agree to the last digits at first and
then drift apart. ``--again`` shows how far: RWKV-LM beside itself with another number of threads. ``--precision fp64``
leaves hardly any round-off to magnify.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rwkvpeft.data.binidx import BinidxSource
from rwkvpeft.data.prime import magic_prime

ROOT = Path(__file__).resolve().parents[1]
_EQUAL = 1e-5
_SMOOTHED = 10


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(options.keep or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        settings = _settings(options, folder)
        theirs = _theirs(settings)
        again = _theirs(settings, threads=2) if options.again else None
        ours = _ours(settings, options.op)
        picture = folder / "loss.png"
        if options.keep:
            _draw(theirs, ours, picture)
    tokens = options.steps * options.micro_bsz * options.ctx_len
    print(f"{options.version}, {options.n_layer} layers of {options.n_embd}, {options.steps} steps of "
          f"{options.micro_bsz} x {options.ctx_len} tokens, {tokens:,} in all")
    for step in sorted({0, 9, *range(49, options.steps, 50), options.steps - 1}):
        print(f"step {step + 1:5}  RWKV-LM {theirs[step]:.5f}  here {ours[step]:.5f}")
    _compare("here", theirs, ours)
    if again is not None:
        _compare("RWKV-LM with two threads", theirs, again)


def _compare(name: str, theirs: list[float], other: list[float]) -> None:
    apart = [abs(one - two) for one, two in zip(theirs, other, strict=True)]
    equal = next((step for step, difference in enumerate(apart) if difference > _EQUAL), len(apart))
    means = [abs(_mean(theirs, step) - _mean(other, step)) for step in range(len(theirs))]
    print(f"{name}: the first {equal} steps within {_EQUAL:g}; largest difference {max(apart):.1e} at step "
          f"{apart.index(max(apart)) + 1}, of means over {_SMOOTHED} steps {max(means):.1e}, mean "
          f"{sum(apart) / len(apart):.1e}")


def _mean(losses: list[float], step: int) -> float:
    last = losses[max(0, step + 1 - _SMOOTHED) : step + 1]
    return sum(last) / len(last)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rwkv_lm", required=True, type=Path, help="a checkout of BlinkDL/RWKV-LM")
    parser.add_argument("--version", choices=("x052", "x060", "x070"), default="x070")
    parser.add_argument("--n_layer", type=int, default=12)
    parser.add_argument("--n_embd", type=int, default=128)
    parser.add_argument("--ctx_len", type=int, default=128)
    parser.add_argument("--micro_bsz", type=int, default=8)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--lr_init", type=float, default=6e-4, help="it falls to a tenth")
    parser.add_argument("--precision", choices=("fp32", "fp64"), default="fp32")
    parser.add_argument("--op", default="torch", help="our program for the recurrence")
    parser.add_argument("--again", action="store_true", help="run RWKV-LM a second time, with two threads")
    parser.add_argument("--keep", help="folder for data, weights, logs and loss.png; otherwise nothing is kept")
    return parser.parse_args()


def _settings(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What both trainers are told."""
    corpus, prefix = folder / "corpus.jsonl", folder / "corpus"
    sys.path.insert(0, str(ROOT / "scripts"))
    from base_corpus import documents  # type: ignore[import-not-found]

    corpus.write_text("".join(json.dumps(record) + "\n" for record in documents()), encoding="utf-8")
    _run("make_data.py", str(corpus), "1", str(options.ctx_len), "--seed", "0", "--tokenizer", "bytes",
         "--output", str(prefix))
    source = BinidxSource(prefix)
    return {
        "checkout": str(options.rwkv_lm.resolve()), "seed": 0, "steps": options.steps,
        "precision": options.precision,
        "init": str(folder / "rwkv-init.pth"), "losses": str(folder / "rwkv-lm.json"), "proj_dir": str(folder / "ours"),
        "my_testing": options.version, "n_layer": options.n_layer, "n_embd": options.n_embd,
        "ctx_len": options.ctx_len, "micro_bsz": options.micro_bsz, "vocab_size": 256, "head_size": 64,
        "data_file": str(prefix), "magic_prime": magic_prime(source.n_tokens, options.ctx_len),
        # a step more, for both end when the tokens are reached
        "my_exit_tokens": (options.steps + 1) * options.micro_bsz * options.ctx_len,
        "lr_init": options.lr_init, "lr_final": options.lr_init / 10, "warmup_steps": 10,
        "weight_decay": 0.001, "adam_eps": 1e-18,
    }


def _theirs(settings: dict[str, Any], threads: int = 1) -> list[float]:
    _run("benchmarks/rwkv_lm_peer.py", json.dumps({**settings, "threads": threads}))
    losses: list[float] = json.loads(Path(settings["losses"]).read_text(encoding="utf-8"))
    return losses


def _ours(settings: dict[str, Any], op: str) -> list[float]:
    same = ("ctx_len", "micro_bsz", "magic_prime", "my_exit_tokens", "lr_init", "lr_final", "warmup_steps",
            "weight_decay", "adam_eps", "proj_dir", "data_file", "precision")
    flags = [word for name in same for word in (f"--{name}", str(settings[name]))]
    _run("train.py", "--load_model", settings["init"], "--dataload", "get", "--accelerator", "cpu", "--op", op,
         "--epoch_steps", str(settings["steps"]), "--epoch_count", "1", "--random_seed", "0", "--resume", "none",
         "--tokenizer", "bytes", *flags)
    lines = (Path(settings["proj_dir"]) / "loss_data.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def _run(script: str, *words: str) -> None:
    subprocess.run([sys.executable, str(ROOT / script), *words], check=True, cwd=ROOT, stdout=sys.stderr)


def _draw(theirs: list[float], ours: list[float], picture: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    axes.plot(theirs, label="RWKV-LM", linewidth=3, alpha=0.5)
    axes.plot(ours, label="rwkvpeft", linewidth=1)
    axes.legend()
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    main()
