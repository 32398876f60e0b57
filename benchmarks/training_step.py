"""How fast whole training steps are, and how much of that is more than matrix products.

    python benchmarks/training_step.py --device cuda --sizes 0.1B 0.4B 1.5B 2.9B 7.2B --micro_bsz 1 8
    python benchmarks/training_step.py --device cuda --sizes 1.5B --grad_cp 0 selective 1 --fused_kernel true false
    python benchmarks/training_step.py                     0.1B v7, LoRA r 32, ctx 512, fp32 and bf16, on a CPU
    python benchmarks/training_step.py --version x060 --precision fp32

With --sizes: every combination of size, method, rows, context and option is trained for some steps on random weights,
and a table shows tokens/s, the peak of memory (what PyTorch allocated, and what the driver says of the whole GPU), and
the share of the roofline: the time the base's matrix products would take at the rate of a large product, measured in
the same run, over the time of the step. --peer NAME=PATH (see peers.py) repeats it all with others' wkv7 in our model.

Without: one step (forward, loss, backward) of a randomly initialised model is timed; then every matrix product the step
asked for outside the WKV operator is timed alone on tensors of the same shapes, strides and dtype, in the same process.
The ratio of the two is printed, with the peak memory of the process.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import peers
import torch
from gpu_memory import METHODS, SIZES, driver_figure
from measuring import machine, print_table, product_peak, synchronize, write_json
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from whole_step import Settings, WholeStep, is_finite

from rwkvpeft.adapters.lora import LoraAdapter
from rwkvpeft.checkpoints.load import build_model, fill_model, operator_of
from rwkvpeft.cli.guard import guarded
from rwkvpeft.models.backbone import Rwkv
from rwkvpeft.models.recompute import LEVELS
from rwkvpeft.models.shape import new_shape
from rwkvpeft.ops.bench import first_line
from rwkvpeft.ops.choose import choose_backend
from rwkvpeft.ops.contract import Needs, Wkv
from rwkvpeft.ops.cross_entropy import linear_cross_entropy
from rwkvpeft.registry import MODELS, find

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_aten = torch.ops.aten
# what is timed for each: the same product, without writing to what is given
PRODUCTS = {
    _aten.mm.default: _aten.mm.default,
    _aten.mm.out: _aten.mm.default,
    _aten.addmm.default: _aten.addmm.default,
    _aten.addmm_.default: _aten.addmm.default,
    _aten.bmm.default: _aten.bmm.default,
}


class Recorder(TorchDispatchMode):
    """Writes down shapes, strides and dtypes of every matrix product outside the WKV operator."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[Any, list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]]]] = []
        self.inside_operator = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in PRODUCTS and not self.inside_operator:
            tensors = [(tuple(t.shape), t.stride(), t.dtype) for t in args if isinstance(t, Tensor)]
            self.products.append((PRODUCTS[func], tensors))
        return func(*args, **(kwargs or {}))


def make_model(options: argparse.Namespace, dtype: torch.dtype) -> Rwkv:
    shape = new_shape(options.version, n_layer=options.n_layer, n_embd=options.n_embd, vocab_size=options.vocab_size)
    needs = Needs(device_type=options.device, dtype=dtype, head_size=shape.head_size, training=True)
    wkv = choose_backend(operator_of(shape), options.op, needs).run
    model = build_model(shape, wkv)
    weights = find(MODELS, options.version, flag="--version").initial_weights(shape)
    # zero matrices would make products and gradients unlike those of a trained model
    weights = {name: torch.randn_like(t) * 0.02 if not t.any() and t.dim() > 1 else t for name, t in weights.items()}
    fill_model(model, weights, device=options.device, dtype=dtype, source="random weights")
    return model.train()


def operator_calls(model: Rwkv, recorder: Recorder) -> None:
    """Keep the products of the WKV operator, forward and backward, out of the record."""
    from rwkvpeft.models.backbone import TimeMixing

    class Marker(torch.autograd.Function):
        """Identity whose backward moves the recorder into or out of the operator."""

        @staticmethod
        def forward(ctx, step, *tensors):
            ctx.step = step
            return tuple(t.view_as(t) for t in tensors)

        @staticmethod
        def backward(ctx, *grads):
            recorder.inside_operator += ctx.step
            return (None, *grads)

    for module in model.modules():
        if not isinstance(module, TimeMixing):
            continue
        run = module.wkv

        def marked(run=run, **inputs):
            names = [name for name, tensor in inputs.items() if tensor is not None]
            entered = dict(zip(names, Marker.apply(-1, *(inputs[name] for name in names)), strict=True))
            recorder.inside_operator += 1
            outputs = run(**(inputs | entered))
            recorder.inside_operator -= 1
            return Marker.apply(1, *outputs)

        module.wkv = marked


@contextmanager
def plain_operators(model: Rwkv) -> Iterator[None]:
    kept = {module: module.wkv for module in model.modules() if hasattr(module, "wkv")}
    yield
    for module, run in kept.items():
        module.wkv = run


def timed(run: Callable[[], object], repeats: int, device: str) -> float:
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def measure(options: argparse.Namespace, precision: str) -> None:
    dtype = DTYPES[precision]
    model = make_model(options, dtype)
    if options.rank:
        LoraAdapter.from_settings({"r": options.rank, "lora_alpha": options.rank, "lora_dropout": 0.0}).attach(model)
    model.recompute = LEVELS[options.grad_cp]
    tokens = torch.randint(1, options.vocab_size, (options.batch, options.ctx_len + 1), device=options.device)
    weights = torch.ones(options.batch, options.ctx_len, device=options.device)

    def step() -> None:
        hidden, _ = model.hidden(tokens[:, :-1])
        loss = linear_cross_entropy(
            hidden,
            model.head.weight,
            tokens[:, 1:],
            weights,
            normaliser=weights.sum(),
            logit_penalty=1e-4,
            chunk_rows=256,
        )
        loss.backward()

    step()
    recorder = Recorder()
    with plain_operators(model):
        operator_calls(model, recorder)
        with recorder:
            step()
    made = [
        (
            func,
            [
                torch.randn(1, dtype=torch.float32).to(kind).as_strided((1,), (1,))
                if not shape
                else torch.empty_strided(shape, stride, dtype=kind, device=options.device).normal_()
                for shape, stride, kind in tensors
            ],
        )
        for func, tensors in _unique(recorder.products)
    ]
    counts = [recorder.products.count(entry) for entry in _unique(recorder.products)]
    whole, products = [], []
    for _ in range(options.rounds):
        whole.append(timed(step, options.repeats, options.device))
        products.append(
            sum(
                count * timed(lambda f=func, t=tensors: f(*t), options.repeats, options.device)
                for (func, tensors), count in zip(made, counts, strict=True)
            )
        )
    ratio = min(whole) / min(products)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{options.version} {precision}: step {min(whole) * 1e3:8.1f} ms   products {min(products) * 1e3:8.1f} ms   "
        f"ratio {ratio:.2f}   peak {peak:.2f} GiB   {options.batch * options.ctx_len / min(whole):.0f} tokens/s"
    )
    if options.profile:
        with torch.profiler.profile() as profile:
            step()
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=30))


def _unique(products: list) -> list:
    seen: list = []
    for entry in products:
        if entry not in seen:
            seen.append(entry)
    return seen


def whole_steps(settings: Settings, seconds: float, wkv: Wkv | None) -> dict[str, float | str | None]:
    """Figures of one combination: at least two steps, and as many as fit into ``seconds``."""
    device = settings.device
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step = WholeStep(settings, wkv)
    # a step that is replayed runs as it is at first, then is recorded
    for _ in range(6 if settings.cuda_graph else 2):
        loss = step.run(step.batch())
    if not is_finite(loss):
        raise ArithmeticError(f"the loss is {loss.item()}")
    if device.type == "cuda":
        # what compiling and measuring took is not the run's
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    while len(times) < 2 or sum(times) < seconds:
        batch = step.batch()
        synchronize(device)
        start = time.perf_counter()
        # two at once, so that the CPU may run ahead as it does in training
        step.run(batch)
        step.run(batch)
        synchronize(device)
        times.append((time.perf_counter() - start) / 2)
    best = statistics.median(times)
    on_gpu = device.type == "cuda"
    return {
        "step ms": 1e3 * best,
        "tokens/s": settings.micro_bsz * settings.ctx_len / best,
        "allocated GB": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None,
        "driver GB": driver_figure() / 1e9 if on_gpu else None,
        "TFLOP": step.flops() / 1e12,
        "operator": step.operator if wkv is None else "",
    }


def table(options: argparse.Namespace) -> None:
    """Every combination asked for, each in turn; one that fails says why."""
    device = torch.device(options.device)
    precision = options.precision[0] if options.precision else "bf16" if device.type == "cuda" else "fp32"
    peak = product_peak(device, DTYPES[precision])
    record: dict[str, Any] = {"machine": machine(device), "FLOP/s": peak, "precision": precision, "rows": []}
    others: dict[str, Wkv | None] = {"": None, **dict(peers.load_peer(text) for text in options.peer)}
    combinations = itertools.product(options.sizes, options.method, options.ctx_len, options.micro_bsz, options.grad_cp,
                                     options.fused_kernel, options.cuda_graph, others)
    for size, method, ctx_len, rows, grad_cp, fused, graph, peer in combinations:
        settings = Settings(size, method, rows, ctx_len, grad_cp, options.op, fused, options.rank, options.version,
                            precision, device, cuda_graph=graph == "true")
        row: dict[str, Any] = {"size": size, "method": method, "B": rows, "T": ctx_len, "grad_cp": grad_cp,
                               "fused": fused, "replayed": graph, "op": peer or options.op}
        try:
            figures = whole_steps(settings, options.seconds, others[peer])
            share = figures["TFLOP"] * 1e12 / peak / (figures["step ms"] / 1e3)
            row |= {"step ms": figures["step ms"], "tokens/s": round(figures["tokens/s"]), "of roofline": share,
                    "allocated GB": figures["allocated GB"], "driver GB": figures["driver GB"],
                    "note": figures["operator"]}
        except Exception as reason:  # noqa: BLE001 too little memory for one size must not hide the others
            row |= dict.fromkeys(("step ms", "tokens/s", "of roofline", "allocated GB", "driver GB"))
            row["note"] = first_line(reason)
        gc.collect()
        record["rows"].append(row)
        print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        write_json(options.json, record)
    print(f"\nroofline: {peak / 1e12:.3g} TFLOP/s, a large product in {precision} on {record['machine']['device']}")
    print_table(record["rows"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="whole steps of these sizes, as a table")
    parser.add_argument("--method", nargs="+", default=["lora"], choices=["none", *METHODS])
    parser.add_argument("--micro_bsz", "--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--fused_kernel", nargs="+", default=["auto"], choices=["auto", "true", "false"])
    parser.add_argument("--peer", nargs="+", default=[], metavar="NAME=PATH")
    parser.add_argument("--seconds", type=float, default=2.0, help="of timed steps for each combination (%(default)s)")
    parser.add_argument("--json", default="", metavar="FILE", help="write the table there too")
    parser.add_argument("--version", default="x070", choices=sorted(MODELS))
    parser.add_argument("--precision", nargs="+", choices=sorted(DTYPES),
                        help="default: fp32 and bf16; with --sizes bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--n_layer", type=int, default=12)
    parser.add_argument("--n_embd", type=int, default=768)
    parser.add_argument("--vocab_size", type=int, default=65536)
    parser.add_argument("--ctx_len", nargs="+", type=int, help="default: 512; with --sizes 1024")
    parser.add_argument("--rank", type=int, help="LoRA rank; 0: full training (default: 32; with --sizes 64)")
    parser.add_argument("--grad_cp", nargs="+", choices=LEVELS, default=["0"])
    parser.add_argument("--cuda_graph", nargs="+", default=["false"], choices=["true", "false"],
                        help="with --sizes: replay forward and backward pass (default: false)")
    parser.add_argument("--op", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--profile", action="store_true", help="print where the time of one step goes")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    options.rank = options.rank if options.rank is not None else 64 if options.sizes else 32
    options.ctx_len = options.ctx_len or [1024 if options.sizes else 512]
    if options.sizes:
        table(options)
        return
    options.ctx_len, options.batch, options.grad_cp = options.ctx_len[0], options.micro_bsz[0], options.grad_cp[0]
    for precision in options.precision or ["fp32", "bf16"]:
        measure(options, precision)


if __name__ == "__main__":
    sys.exit(guarded(main))
