"""What a training step costs beside forward pass, backward pass and the optimizer's own step.

    python benchmarks/loop_overhead.py [--steps 300] [--n_layer 2] [--n_embd 64] [--threads 1]

A random v7 model is trained by ``fit`` itself, with its files, records, progress and guards, from a binidx file.
The three parts are timed from inside, the whole from outside; the rest is the loop's: data, seeds, learning rates,
clipping, the figures' way to the processor, records, callbacks, Lightning. Clipping is counted as the loop's here, and
given apart as well. A second line says what share of a step of 0.1B parameters that would be: its three parts are timed
once, for ``--tokens`` tokens a step.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from rwkvpeft.checkpoints.adapter import Recipe
from rwkvpeft.config.groups import TrainConfig
from rwkvpeft.config.resolve import Machine, resolve
from rwkvpeft.data.binidx import write_binidx
from rwkvpeft.data.datamodule import TrainingData
from rwkvpeft.data.dataset import open_dataset
from rwkvpeft.models.rwkv7 import Rwkv7
from rwkvpeft.models.shape import ModelShape, new_shape
from rwkvpeft.ops.wkv7.chunked import BACKEND
from rwkvpeft.training import make_module as making
from rwkvpeft.training.fit import fit
from rwkvpeft.training.module import RwkvModule


class Stopwatch:
    """Seconds spent in functions, by name."""

    def __init__(self) -> None:
        self.spent: dict[str, list[float]] = {}

    def timed(self, name: str, function: Callable) -> Callable:
        """The function, timed."""
        times = self.spent.setdefault(name, [])

        def run(*args, **kwargs):
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                times.append(time.perf_counter() - began)

        return run

    def median(self, name: str) -> float:
        """Without the first tenth, which warms up."""
        times = self.spent[name]
        return statistics.median(times[len(times) // 10 :])


def watch(module: RwkvModule, clock: Stopwatch) -> None:
    """Time the parts of a step of this module."""
    module.objective = clock.timed("forward", module.objective)
    module.sharing.gradient_norm = clock.timed("clipping", module.sharing.gradient_norm)
    configure = module.configure_optimizers

    def timed_optimizer():
        optimizer = configure()
        optimizer.step = clock.timed("optimizer", optimizer.step)
        return optimizer

    module.configure_optimizers = timed_optimizer
    # what Lightning calls for the backward pass alone
    module.backward = clock.timed("backward", lambda loss, *args, **kwargs: loss.backward())


def settings(folder: Path, steps: int, tokens: int) -> TrainConfig:
    """A run of so many steps of one row."""
    given = {"load_model": "m", "data_file": str(folder / "d"), "proj_dir": str(folder / "run"), "random_seed": 1,
             "resume": "none", "report": False, "ctx_len": tokens, "micro_bsz": 1, "epoch_steps": steps,
             "epoch_count": 1, "accelerator": "cpu"}
    return resolve(given, Machine("cpu", has_bf16=True))[0]


def measure(shape: ModelShape, steps: int, tokens: int) -> dict[str, float]:
    """Median seconds of a step's parts, and of what is between the end of one step and that of the next."""
    torch.manual_seed(0)
    model = Rwkv7(shape, BACKEND.run)
    model.load_state_dict(Rwkv7.initial_weights(shape))
    clock = Stopwatch()
    ends: list[float] = []
    finish = RwkvModule.on_train_batch_end

    class Watched(RwkvModule):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            watch(self, clock)

        def on_train_batch_end(self, *args):
            finish(self, *args)
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw = np.random.default_rng(0)
        write_binidx(folder / "d", (draw.integers(1, shape.vocab_size, tokens + 1).astype(np.uint16) for _ in range(8)))
        config = settings(folder, steps, tokens)
        rows = open_dataset(config.data, ctx_len=tokens, vocab_size=shape.vocab_size, seed=1)
        data = TrainingData(rows, schedule=config.schedule, data=config.data, seed=1)
        original, making.RwkvModule = making.RwkvModule, Watched
        try:
            fit(model=model, adapter=None, data=data, config=config, recipe=Recipe("none"), report=len)
        finally:
            making.RwkvModule = original
    whole = statistics.median(np.diff(ends)[len(ends) // 10 :].tolist())
    parts = {name: clock.median(name) for name in ("forward", "backward", "optimizer", "clipping")}
    return {**parts, "whole": whole}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--n_layer", type=int, default=2)
    parser.add_argument("--n_embd", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512, help="of a step of the 0.1B model")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    small = new_shape("x070", n_layer=arguments.n_layer, n_embd=arguments.n_embd, vocab_size=1024)
    found = measure(small, arguments.steps, 16)
    rest = found["whole"] - found["forward"] - found["backward"] - found["optimizer"]
    print("milliseconds a step: " + ", ".join(f"{name} {1e3 * value:.2f}" for name, value in found.items()))
    print(f"the loop: {1e3 * rest:.2f} ms a step, {1e3 * (rest - found['clipping']):.2f} without clipping")
    large = measure(new_shape("x070", n_layer=12, n_embd=768, vocab_size=65536), 6, arguments.tokens)
    own = large["whole"] - large["forward"] - large["backward"] - large["optimizer"]
    print(f"0.1B, {arguments.tokens} tokens a step: {large['whole']:.2f} s, of which the loop {1e3 * own:.1f} ms "
          f"({100 * own / large['whole']:.2f} %), clipping {1e3 * large['clipping']:.1f} ms of it")


if __name__ == "__main__":
    main()
