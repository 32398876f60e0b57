"""Training on long rows in chunks: memory by length of the row, and speed with exact and with truncated gradients.

    python benchmarks/long_context.py                                   1k to 64k tokens, chunks of 512, on a CPU
    python benchmarks/long_context.py --lengths 1024 --peft lora --json long.json

Each case is a process of its own: it trains one row once, all weights or with LoRA, and every tensor that PyTorch makes
and lets go is counted. ``peak`` is the most that was there at once beside the weights; ``states`` are the boundary
states among it (all but the first chunk has one); ``rest`` is what remains: activations, logits, gradients.
``whole`` is the row without --infctx, tried up to --whole tokens.

Speed is that of forward and backward pass over one row of --timed tokens, exact and truncated in turns in one process,
the best of --rounds, in seconds of the processor: what else the machine does plays a small part.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time

import torch
from measuring import machine, print_table, write_json

from rwkvpeft.adapters.build import build_adapter
from rwkvpeft.checkpoints.load import build_model, fill_model, operator_of
from rwkvpeft.cli.guard import guarded
from rwkvpeft.data.batches import TokenBatch
from rwkvpeft.memory.dry_run import Tally
from rwkvpeft.models.backbone import Rwkv
from rwkvpeft.models.recompute import LEVELS
from rwkvpeft.models.shape import ModelShape, new_shape
from rwkvpeft.objectives.base import Objective
from rwkvpeft.objectives.language_modelling import LanguageModelling
from rwkvpeft.objectives.long_context import LongContext
from rwkvpeft.registry import BACKENDS, MODELS, find

WAYS = ("whole", "truncated", "exact")


def build(options: argparse.Namespace) -> Rwkv:
    torch.manual_seed(0)
    sizes = {"n_layer": options.n_layer, "n_embd": options.n_embd, "vocab_size": options.vocab_size}
    shape = new_shape(options.version, **sizes)
    model = build_model(shape, find(BACKENDS[operator_of(shape)], "torch", flag="").run)
    weights = find(MODELS, options.version, flag="--version").initial_weights(shape)
    fill_model(model, weights, device="cpu", dtype=torch.float32, source="random weights")
    settings = {"r": 16, "lora_dropout": 0} if options.peft == "lora" else {}
    adapter = build_adapter(options.peft, settings, [] if options.peft == "state" else ["time", "ln"])
    if adapter is None:
        model.requires_grad_(True)
    else:
        adapter.attach(model)
    model.recompute = LEVELS[options.grad_cp]
    return model.train()


def row(options: argparse.Namespace, tokens: int) -> TokenBatch:
    ids = torch.randint(1, options.vocab_size, (1, tokens + 1))
    weights = torch.ones(1, tokens)
    return TokenBatch(ids[:, :-1], ids[:, 1:], weights, weights.sum().double())


def objective(options: argparse.Namespace, way: str) -> Objective:
    per_token = LanguageModelling(1e-4)
    return per_token if way == "whole" else LongContext(per_token, options.chunk, exact=way == "exact")


def step(model: Rwkv, batch: TokenBatch, loss: Objective) -> None:
    model.zero_grad(set_to_none=True)
    loss(model, batch).total.backward()


def states(options: argparse.Namespace, shape: ModelShape, way: str, tokens: int) -> int:
    """Bytes between chunks while the last chunk is differentiated."""
    if way == "whole":
        return 0
    each = shape.n_layer * 4 * (2 * shape.n_embd + shape.dim_att * shape.head_size)
    count = -(-tokens // options.chunk) - 1
    return each * (count if way == "exact" else min(count, 1))


def measure(options: argparse.Namespace, way: str, tokens: int) -> dict[str, object]:
    model, batch = build(options), row(options, tokens)
    loss = objective(options, way)
    with Tally([*model.parameters(), *model.buffers(), *batch[:4]]) as tally:
        step(model, batch, loss)
    peak = max(moment.bytes for moment in tally.worst.values())
    between = states(options, model.shape, way, tokens)
    return {
        "tokens": tokens, "gradients": way, "peak, MB": peak / 1e6, "states, MB": between / 1e6,
        "rest, MB": (peak - between) / 1e6,
    }


def speeds(options: argparse.Namespace) -> list[dict[str, object]]:
    model, batch = build(options), row(options, options.timed)
    seconds = dict.fromkeys(("truncated", "exact"), math.inf)
    for _ in range(options.rounds):
        for way in seconds:
            start = time.process_time()
            step(model, batch, objective(options, way))
            seconds[way] = min(seconds[way], time.process_time() - start)
    return [
        {"tokens": options.timed, "gradients": way, "tokens/s": options.timed / seconds[way],
         "time": seconds[way] / seconds["truncated"]}
        for way in seconds
    ]


def alone(options: argparse.Namespace, way: str, tokens: int) -> dict[str, object]:
    """``measure`` in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--case", way, str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 4096, 16384, 65536])
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--whole", type=int, default=4096, help="longest row to try without chunks")
    parser.add_argument("--timed", type=int, default=4096, help="length of the row whose time is taken; 0: none")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--version", default="x070", choices=MODELS)
    parser.add_argument("--n_layer", type=int, default=4)
    parser.add_argument("--n_embd", type=int, default=128)
    parser.add_argument("--vocab_size", type=int, default=256)
    parser.add_argument("--peft", default="none", choices=("none", "lora", "state"))
    parser.add_argument("--grad_cp", default="0", choices=LEVELS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", default="", metavar="FILE")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.case:
        print(json.dumps(measure(options, options.case[0], int(options.case[1]))))
        return
    memory = [
        alone(options, way, tokens)
        for way in WAYS
        for tokens in options.lengths
        if way != "whole" or tokens <= options.whole
    ]
    print_table(memory)
    timed = speeds(options) if options.timed else []
    print_table(timed)
    about = {"settings": vars(options), "machine": machine(torch.device("cpu"))}
    write_json(options.json, {**about, "memory": memory, "speed": timed})


if __name__ == "__main__":
    sys.exit(guarded(main))
