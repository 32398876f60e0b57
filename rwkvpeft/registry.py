"""Tables of contents: every named choice and the file that holds it.

A table maps a name a user types to ``"module:attribute"``. Nothing is imported until a name is looked up, so
``--help`` costs nothing. To add a part, write its file and add its line here; the contract tests run over these tables.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from rwkvpeft.errors import UserError

MODELS: dict[str, str] = {
    "x052": "rwkvpeft.models.rwkv5:Rwkv5",
    "x060": "rwkvpeft.models.rwkv6:Rwkv6",
    "x070": "rwkvpeft.models.rwkv7:Rwkv7",
}

BACKENDS: dict[str, dict[str, str]] = {
    # in the order of their likely speed; on a GPU it is measured
    "wkv5": {
        "triton": "rwkvpeft.ops.wkv5.triton_kernel:BACKEND",
        "cuda": "rwkvpeft.ops.wkv5.cuda_kernel:BACKEND",
        "fla": "rwkvpeft.ops.wkv5.fla_kernel:BACKEND",
        "torch": "rwkvpeft.ops.wkv5.chunked:BACKEND",
        "reference": "rwkvpeft.ops.wkv5.reference:BACKEND",
    },
    "wkv6": {
        "triton": "rwkvpeft.ops.wkv6.triton_kernel:BACKEND",
        "cuda": "rwkvpeft.ops.wkv6.cuda_kernel:BACKEND",
        "fla": "rwkvpeft.ops.wkv6.fla_kernel:BACKEND",
        "torch": "rwkvpeft.ops.wkv6.chunked:BACKEND",
        "reference": "rwkvpeft.ops.wkv6.reference:BACKEND",
    },
    "wkv7": {
        "triton": "rwkvpeft.ops.wkv7.triton_kernel:BACKEND",
        "cuda": "rwkvpeft.ops.wkv7.cuda_kernel:BACKEND",
        "fla": "rwkvpeft.ops.wkv7.fla_kernel:BACKEND",
        "torch": "rwkvpeft.ops.wkv7.chunked:BACKEND",
        "reference": "rwkvpeft.ops.wkv7.reference:BACKEND",
    },
}

BLOCK_OPS: dict[str, str] = {
    "triton": "rwkvpeft.ops.block.triton_ops:TRITON",
    "torch": "rwkvpeft.ops.block.plain:PLAIN",
}
"""What computes a block beside its matrix products and its WKV operator, the fastest first."""

ADAPTERS: dict[str, str] = {
    "lora": "rwkvpeft.adapters.lora:LoraAdapter",
    "dora": "rwkvpeft.adapters.lora:DoraAdapter",
    "pissa": "rwkvpeft.adapters.pissa:PissaAdapter",
    "miss": "rwkvpeft.adapters.miss:MissAdapter",
    "bone": "rwkvpeft.adapters.miss:MissAdapter",
    "disha": "rwkvpeft.adapters.miss:MissAdapter",
    "bat": "rwkvpeft.adapters.miss:BatAdapter",
    "state": "rwkvpeft.adapters.state:StateAdapter",
}

ADAPTER_SETTINGS: dict[str, str] = {
    "lora": "rwkvpeft.adapters.settings:LoraConfig",
    "dora": "rwkvpeft.adapters.settings:LoraConfig",
    "pissa": "rwkvpeft.adapters.settings:PissaConfig",
    "miss": "rwkvpeft.adapters.settings:MissConfig",
    "bone": "rwkvpeft.adapters.settings:MissConfig",
    "disha": "rwkvpeft.adapters.settings:MissConfig",
    "bat": "rwkvpeft.adapters.settings:BatConfig",
    "state": "rwkvpeft.adapters.settings:StateConfig",
}
"""Each adapter's settings, which ``--help`` shows without importing what the adapter itself needs."""

STRATEGIES: dict[str, str] = {
    "auto": "rwkvpeft.training.strategies.whole:Whole",
    "ddp": "rwkvpeft.training.strategies.whole:Whole",
    "fsdp": "rwkvpeft.training.strategies.fsdp:Fsdp",
    "deepspeed_stage_1": "rwkvpeft.training.strategies.deepspeed:DeepSpeed",
    "deepspeed_stage_1_offload": "rwkvpeft.training.strategies.deepspeed:DeepSpeed",
    "deepspeed_stage_2": "rwkvpeft.training.strategies.deepspeed:DeepSpeed",
    "deepspeed_stage_2_offload": "rwkvpeft.training.strategies.deepspeed:DeepSpeed",
    "deepspeed_stage_3": "rwkvpeft.training.strategies.deepspeed:DeepSpeed",
    "deepspeed_stage_3_offload": "rwkvpeft.training.strategies.deepspeed:DeepSpeed",
}
"""How the processes of a run share its numbers."""

FORMATS: dict[str, str] = {
    "int8": "rwkvpeft.quantization.int8:Int8",
    "nf4": "rwkvpeft.quantization.four_bit:Nf4",
    "fp4": "rwkvpeft.quantization.four_bit:Fp4",
    "4bit": "rwkvpeft.quantization.four_bit:Fp4",
    "fp8": "rwkvpeft.quantization.fp8:Fp8",
}

OBJECTIVES: dict[str, str] = {
    "language_modelling": "rwkvpeft.objectives.language_modelling:LanguageModelling",
    "dpo": "rwkvpeft.objectives.preference.dpo:Dpo",
    "ipo": "rwkvpeft.objectives.preference.ipo:Ipo",
    "orpo": "rwkvpeft.objectives.preference.orpo:Orpo",
    "simpo": "rwkvpeft.objectives.preference.simpo:Simpo",
    "kto": "rwkvpeft.objectives.preference.kto:Kto",
    "wpo": "rwkvpeft.objectives.preference.wpo:Wpo",
    "cpo": "rwkvpeft.objectives.preference.cpo:Cpo",
    "distill": "rwkvpeft.objectives.distillation:Distillation",
    "grpo": "rwkvpeft.objectives.grpo:Grpo",
}
"""What a batch is turned into a loss by: classes with ``build(config, provided)``."""


SOURCES: dict[str, str] = {
    "binidx": "rwkvpeft.data.binidx:open_binidx",
    "jsonl": "rwkvpeft.data.records:open_jsonl",
    "sft": "rwkvpeft.data.huggingface:open_sft",
    "utf-8": "rwkvpeft.data.text:open_text",
    "utf-16le": "rwkvpeft.data.text:open_text",
    "dummy": "rwkvpeft.data.text:open_text",
    "numpy": "rwkvpeft.data.arrays:open_numpy",
    "uint16": "rwkvpeft.data.arrays:open_uint16",
}

OPTIMIZERS: dict[str, str] = {
    "none": "rwkvpeft.training.optimizers.adam:ADAM",
    "adam": "rwkvpeft.training.optimizers.adam:ADAM",
    "adamw": "rwkvpeft.training.optimizers.adam:ADAM",
    "adam8bit": "rwkvpeft.training.optimizers.eight_bit:ADAM_8BIT",
    "adamw8bit": "rwkvpeft.training.optimizers.eight_bit:ADAMW_8BIT",
    "paged_adam": "rwkvpeft.training.optimizers.eight_bit:PAGED_ADAM",
    "paged_adamw": "rwkvpeft.training.optimizers.eight_bit:PAGED_ADAMW",
    "paged_adam8bit": "rwkvpeft.training.optimizers.eight_bit:PAGED_ADAM_8BIT",
    "paged_adamw8bit": "rwkvpeft.training.optimizers.eight_bit:PAGED_ADAMW_8BIT",
    "lion": "rwkvpeft.training.optimizers.eight_bit:LION",
    "lion8bit": "rwkvpeft.training.optimizers.eight_bit:LION_8BIT",
    "adafactor": "rwkvpeft.training.optimizers.adafactor:ADAFACTOR",
    "muon": "rwkvpeft.training.optimizers.muon:MUON",
    "schedule_free": "rwkvpeft.training.optimizers.schedule_free:SCHEDULE_FREE",
}

SCHEDULES: dict[str, str] = {
    "cos": "rwkvpeft.training.schedules:cosine",
    "cos_decay": "rwkvpeft.training.schedules:cosine",
    "wsd": "rwkvpeft.training.schedules:warmup_stable_decay",
    "exp": "rwkvpeft.training.schedules:exponential",
    "linear": "rwkvpeft.training.schedules:linear",
}


def find(table: Mapping[str, str], name: str, *, flag: str) -> Any:
    """Import and return what ``table`` lists under ``name``.

    Args:
        flag: the flag the name came from, for the message.
    Raises:
        UserError: the table has no such name; known names and the nearest one are given.
    """
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1)
        fix = f"{flag} {near[0]}" if near else None
        raise UserError(f"{flag} does not know {name!r}", found=name, expected=sorted(table), fix=fix)
    module, _, attribute = table[name].partition(":")
    return getattr(import_module(module), attribute)
