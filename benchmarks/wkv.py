"""Time the WKV operators beside the matrix products of the layer they stand in.

    python benchmarks/wkv.py --versions 7 --shapes 1x512x12x64 --threads 2

A shape is BxTxHxN: batch, tokens, heads, head size; the layer is C = H·N channels wide. Every time is the smallest of
``--repeats`` runs in milliseconds; operators and products take turns, so that a busy machine slows both alike.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from rwkvpeft.ops import wkv5, wkv6, wkv7
from rwkvpeft.registry import BACKENDS

OPERATORS = {"wkv5": wkv5, "wkv6": wkv6, "wkv7": wkv7}
SQUARE = {"wkv5": 5, "wkv6": 5, "wkv7": 4}
"""C x C weights of a time mixing."""
SQUARE_CHANNEL = {"wkv5": 1, "wkv6": 1, "wkv7": 0}
"""C x C weights of a channel mixing, beside its two of C x hidden."""
HIDDEN = {"wkv5": 3.5, "wkv6": 3.5, "wkv7": 4}
"""hidden / C."""


@dataclass(frozen=True)
class Row:
    """One line of the table, times in milliseconds."""

    operator: str
    shape: tuple[int, int, int, int]
    backend: str
    forward: float
    both: float
    product_forward: float
    product_both: float


def operands(operator: str, shape: tuple[int, int, int, int], device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random arguments with decays as of a fresh model."""
    _, _, heads, size = shape
    w_shape = (heads, size) if operator == "wkv5" else shape
    drawn = {"r": torch.randn(shape), "w": torch.randn(w_shape) - 3, "k": torch.randn(shape), "v": torch.randn(shape)}
    if operator == "wkv7":
        removal = normalize(torch.randn(shape), dim=-1)
        drawn |= {"a": -removal, "b": removal * torch.rand(shape)}
    else:
        drawn["u"] = torch.randn(heads, size)
    return {name: x.to(device, dtype).requires_grad_() for name, x in drawn.items()}


def layer_products(
    operator: str, shape: tuple[int, int, int, int], device: str, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """Input (B·T, C) and the weights of one layer's large products, the last two C x hidden."""
    batch, tokens, heads, size = shape
    width, hidden = heads * size, int(HIDDEN[operator] * heads * size)
    squares = SQUARE[operator] + SQUARE_CHANNEL[operator]
    weights = [torch.randn(width, width) for _ in range(squares)] + [torch.randn(width, hidden) for _ in range(2)]
    x = torch.randn(batch * tokens, width).to(device, dtype).requires_grad_()
    # the frozen weights of adapter training: their gradient is not computed
    return x, [(weight / width**0.5).to(device, dtype) for weight in weights]


def fastest(runs: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, float]:
    """Smallest time of every run in milliseconds, taking turns."""
    best = dict.fromkeys(runs, float("inf"))
    for repeat in range(repeats + 2):
        for name, run in runs.items():
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            if repeat >= 2:
                best[name] = min(best[name], 1e3 * (time.perf_counter() - start))
    return best


def _wait(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def measure(operator: str, shape: tuple[int, int, int, int], options: argparse.Namespace) -> list[Row]:
    """Time every asked backend of ``operator`` and the layer's products."""
    dtype = getattr(torch, options.dtype)
    arguments = operands(operator, shape, options.device, dtype)
    x, weights = layer_products(operator, shape, options.device, dtype)

    def products() -> list[Tensor]:
        square, (up, down) = [x @ weight for weight in weights[:-2]], weights[-2:]
        return [*square, (x @ up) @ down.mT]

    def backwards(outputs: list[Tensor], inputs: list[Tensor]) -> None:
        torch.autograd.grad(outputs, inputs, [torch.ones_like(output) for output in outputs])

    runs: dict[str, Callable[[], object]] = {
        "products": products,
        "products both": lambda: backwards(products(), [x]),
    }
    for backend in options.backends:
        runs[backend] = lambda op=backend: OPERATORS[operator](**arguments, op=op)
        runs[f"{backend} both"] = lambda op=backend: backwards(
            [OPERATORS[operator](**arguments, op=op)[0]], list(arguments.values())
        )
    times = fastest(runs, options.repeats, options.device)
    return [
        Row(operator, shape, name, times[name], times[f"{name} both"], times["products"], times["products both"])
        for name in options.backends
    ]


def parse_shape(text: str) -> tuple[int, int, int, int]:
    """``"1x512x12x64"`` as four integers."""
    parts = tuple(int(part) for part in text.split("x"))
    if len(parts) != 4:
        raise argparse.ArgumentTypeError(f"a shape is BxTxHxN, found {text!r}")
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", nargs="+", default=["5", "6", "7"], choices=["5", "6", "7"])
    parser.add_argument("--shapes", nargs="+", type=parse_shape, default=[(1, 512, 12, 64)], metavar="BxTxHxN")
    parser.add_argument("--backends", nargs="+", default=["torch"], choices=sorted({*BACKENDS["wkv7"]}))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (%(default)s)")
    parser.add_argument("--repeats", type=int, default=20, help="timed runs of each (%(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16", "float64"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    print(f"{options.threads} threads, {options.dtype}, {options.device}; ms per layer, smallest of {options.repeats}")
    header = ("operator", "BxTxHxN", "backend", "fwd", "fwd+bwd", "products fwd", "fwd+bwd", "operator/products")
    print("{:9} {:>16} {:10} {:>8} {:>8} {:>13} {:>8} {:>18}".format(*header))
    for version in options.versions:
        for shape in options.shapes:
            for row in measure(f"wkv{version}", shape, options):
                print(
                    f"{row.operator:9} {'x'.join(map(str, shape)):>16} {row.backend:10} {row.forward:8.2f}"
                    f" {row.both:8.2f} {row.product_forward:13.2f} {row.product_both:8.2f}"
                    f" {row.both / row.product_both:18.2f}"
                )


if __name__ == "__main__":
    main()
