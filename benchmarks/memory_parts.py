"""What a small run's memory goes to: the driver's figure after each thing that takes some.

    python benchmarks/memory_parts.py --device cuda                    LoRA on 0.1B, on an idle GPU
    python benchmarks/memory_parts.py --size tiny --ctx_len 33         does it run? The process's peak on a CPU

The context is what CUDA takes before any tensor; kernels that are loaded by a step add to it, which is the part of the
last rows that PyTorch has not reserved. Programs are tried before the weights are made.
"""

from __future__ import annotations

import argparse
import resource
import sys
from typing import Any

import torch
from gpu_memory import SIZES, driver_figure
from measuring import machine, print_table, write_json
from whole_step import Settings, WholeStep

from rwkvpeft.cli.guard import guarded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="0.1B")
    parser.add_argument("--ctx_len", type=int, default=1024)
    parser.add_argument("--grad_cp", default="1", choices=["0", "selective", "1"])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--json", default="", metavar="FILE")
    options = parser.parse_args()
    on_gpu = options.device.type == "cuda"
    record: dict[str, Any] = {"machine": "", "rows": []}

    def reached(part: str) -> None:
        if on_gpu:
            torch.cuda.synchronize(options.device)
        record["rows"].append({
            "after": part,
            "driver MB": driver_figure() / 1e6 if on_gpu else None,
            "reserved MB": torch.cuda.memory_reserved() / 1e6 if on_gpu else None,
            "allocated MB": torch.cuda.memory_allocated() / 1e6 if on_gpu else None,
            "process MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
        })
        write_json(options.json, record)

    if on_gpu:
        reached("nothing")
    torch.zeros(1, device=options.device)
    reached("context")
    # not before: to ask a GPU for its name may make the context
    record["machine"] = machine(options.device)
    settings = Settings(options.size, "lora", 1, options.ctx_len, options.grad_cp, device=options.device,
                        precision="bf16" if on_gpu else "fp32")
    step = WholeStep(settings, reached=reached)
    # the optimizer's own numbers are made by its first step
    step.run(step.batch())
    reached("one step")
    step.run(step.batch())
    reached("two steps")
    if on_gpu:
        torch.cuda.empty_cache()
        reached("giving back what is free")
    print_table(record["rows"])


if __name__ == "__main__":
    sys.exit(guarded(main))
