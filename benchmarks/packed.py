"""Time of short documents in one packed row, against each document alone and against a padded batch of them.

    python benchmarks/packed.py                                      32 documents of 16 to 64 tokens, on a CPU
    python benchmarks/packed.py --documents 8 --longest 512 --heads 12 --head-size 64

Forward and backward of one WKV operator without states, in milliseconds; the smallest of some rounds, in which the
three take turns. The padded batch reads every document as if it were as long as the longest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from measuring import fastest, print_table
from torch import Tensor

from rwkvpeft.cli.guard import guarded
from rwkvpeft.ops.contract import Backend, Needs
from rwkvpeft.ops.sequences import Sequences, taking_sequences
from rwkvpeft.ops.trial import sample_operands
from rwkvpeft.registry import BACKENDS, find


def passes(run: Callable[..., tuple[Tensor, Tensor]], operands: dict[str, Tensor], **more: Any) -> Callable[[], object]:
    """A forward and a backward, to be timed."""
    seed = torch.ones_like(operands["v"])
    return lambda: torch.autograd.grad(run(**operands, state=None, **more)[0], list(operands.values()), seed)


def measure(operator: str, lengths: list[int], needs: Needs, options: argparse.Namespace) -> dict[str, Any]:
    """One row: the three ways by the operator's backend."""
    backend: Backend = find(BACKENDS[operator], options.op, flag="--op")
    sequences, device = Sequences(lengths), options.device
    row = sample_operands(operator, replace(needs, batch=1, tokens=sequences.tokens), device)
    padded = sample_operands(operator, replace(needs, batch=len(lengths), tokens=max(lengths)), device)
    times = fastest(
        {
            "packed ms": passes(taking_sequences(operator, backend), row, sequences=sequences),
            "alone ms": passes(taking_sequences(operator, replace(backend, packed=False)), row, sequences=sequences),
            "padded ms": passes(backend.run, padded),
        },
        device, options.rounds,
    )
    said = {"operator": operator, "heads": f"{needs.heads}x{needs.head_size}", "documents": len(lengths),
            "tokens": sequences.tokens, "padded tokens": len(lengths) * max(lengths)}
    return said | {name: 1e3 * seconds for name, seconds in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=32, help="(%(default)s)")
    parser.add_argument("--shortest", type=int, default=16, help="tokens (%(default)s)")
    parser.add_argument("--longest", type=int, default=64, help="tokens (%(default)s)")
    parser.add_argument("--heads", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--head-size", type=int, nargs="+", default=[64, 16], help="(64 and 16)")
    parser.add_argument("--op", default="torch", help="backend (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (%(default)s)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    drawn = torch.randint(options.shortest, options.longest + 1, (options.documents,),
                          generator=torch.Generator().manual_seed(0))
    rows = []
    for operator in ("wkv5", "wkv6", "wkv7"):
        for size in options.head_size:
            needs = Needs(options.device.type, torch.float32, size, training=True, heads=options.heads)
            rows.append(measure(operator, drawn.tolist(), needs, options))
    print_table(rows)


if __name__ == "__main__":
    sys.exit(guarded(main))
