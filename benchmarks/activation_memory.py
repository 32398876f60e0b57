"""What a block keeps for its backward pass, by method and by what is computed twice; nothing is computed here.

    python benchmarks/activation_memory.py                             1.5B, every method, level and program
    python benchmarks/activation_memory.py --sizes 0.1B 2.9B --methods lora state --json kept.json

Real models, adapters and operators run forward on tensors without data, in bf16, and every allocation is counted.
``D`` is what a further block keeps, per token, in numbers as large as an activation (its bytes / (2 x width)); the
floor of ``selective`` is 12 (24 x width bytes: the block's two inputs, r, k, v, the recurrence's output and its states,
the 4 D of the channel mixing, thin products), that of ``1`` is 1: the block's input. ``kept`` is that of all blocks,
``peak`` the whole step's expected peak on a GPU, weights and optimizer included, without the CUDA context.

--programs torch: the PyTorch operators, which keep their insides in fp32; triton: what runs on a GPU.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from dataclasses import replace

from gpu_memory import SIZES
from measuring import print_table, write_json

from rwkvpeft.adapters.build import build_adapter
from rwkvpeft.checkpoints.load import operator_of
from rwkvpeft.cli.guard import guarded
from rwkvpeft.config.groups import (
    DataConfig,
    MethodConfig,
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    RuntimeConfig,
    ScheduleConfig,
    TrainConfig,
)
from rwkvpeft.memory import Programs, bytes_kept, expect, training_outline
from rwkvpeft.models.recompute import LEVELS
from rwkvpeft.models.shape import ModelShape, new_shape
from rwkvpeft.registry import BLOCK_OPS, find

METHODS = ("none", "lora", "miss", "state")
FLOORS = {"selective": 12, "1": 1}
_FEW = 3


def settings(options: argparse.Namespace, method: str, grad_cp: str) -> TrainConfig:
    own = {"r": options.rank} if method in ("lora", "miss") else {}
    own |= {"lora_dropout": 0} if method == "lora" else {}
    return TrainConfig(
        ModelConfig(),
        DataConfig(ctx_len=options.ctx_len),
        ScheduleConfig(micro_bsz=options.micro_bsz),
        OptimizerConfig(),
        MethodConfig(peft=method, peft_config=own, quant=options.quant if method != "none" else "none"),
        RuntimeConfig(precision="bf16", grad_cp=grad_cp, accelerator="gpu"),
        OutputConfig(),
    )


def programs(name: str, shape: ModelShape) -> Programs:
    if name == "torch":
        return Programs()
    kernel = importlib.import_module(f"rwkvpeft.ops.{operator_of(shape)}.triton_kernel")
    return Programs(kernel.BACKEND.run, find(BLOCK_OPS, "triton", flag="--programs"))


def measure(options: argparse.Namespace, size: str, method: str, name: str, grad_cp: str) -> dict[str, object]:
    layers, width, vocab_size = SIZES[size]
    shape = new_shape(options.version, n_layer=layers, n_embd=width, vocab_size=vocab_size)
    config = settings(options, method, grad_cp)
    used = programs(name, shape)

    def adapter(part: ModelShape):
        method_settings = config.method
        parts = [] if method == "state" else method_settings.train_parts
        return build_adapter(method_settings.peft, method_settings.peft_config, parts)

    def kept(few: int) -> int:
        part = replace(shape, n_layer=few)
        model = training_outline(part, config, adapter(part), programs=used)
        return bytes_kept(model, options.micro_bsz, options.ctx_len)

    first, each = kept(_FEW), kept(_FEW + 1) - kept(_FEW)
    tokens = options.micro_bsz * options.ctx_len
    return {
        "size": size,
        "method": method,
        "programs": name,
        "--grad_cp": grad_cp,
        "D": each / (2 * width * tokens),
        "floor": FLOORS.get(grad_cp),
        "kept, GB": (first + each * (layers - _FEW)) / 1e9,
        "peak, GB": expect(shape, config, adapter, programs=used).total / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["1.5B"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=list(LEVELS))
    parser.add_argument("--programs", nargs="+", choices=("torch", "triton"), default=["torch", "triton"])
    parser.add_argument("--version", default="x070")
    parser.add_argument("--quant", default="none")
    parser.add_argument("--ctx_len", type=int, default=1024)
    parser.add_argument("--micro_bsz", type=int, default=1)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--json", default="", metavar="FILE")
    options = parser.parse_args()
    rows = [
        measure(options, size, method, name, grad_cp)
        for size in options.sizes
        for method in options.methods
        for name in options.programs
        for grad_cp in options.levels
    ]
    print_table(rows)
    write_json(options.json, {"settings": vars(options), "rows": rows})


if __name__ == "__main__":
    sys.exit(guarded(main))
