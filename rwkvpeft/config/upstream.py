"""Flags of RWKV-PEFT, RWKV-LM and RWKV-LM-RLHF that have no field of their own.

Some are other names or combinations of fields and are translated. The others are accepted at upstream's default,
where they say nothing, and refused with the reason at any other value. The same holds for values of our own flags
that upstream knows and this toolkit does not have yet.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rwkvpeft.config.findings import Findings
from rwkvpeft.config.upstream_flag import UpstreamFlag, means, nothing
from rwkvpeft.config.upstream_methods import translate_methods
from rwkvpeft.config.upstream_objectives import FLAGS as OBJECTIVES
from rwkvpeft.config.upstream_objectives import translate_objectives
from rwkvpeft.config.values import parse_json

_NO_TRICK = "an experiment of early RWKV versions that v5, v6 and v7 models do not have"

FLAGS: dict[str, UpstreamFlag] = {
    "rwkv_version": means("--my_testing"),
    "my_qa_mask": means("1: --loss_mask qa", "0"),
    "dataset_get": means("--dataload"),
    "train_type": means("state, states: --peft state, or METHOD+state beside --peft METHOD; infctx: --infctx", "none"),
    "state_tune": means("--peft state", kind="switch"),
    "lora": means("--peft lora", kind="switch"),
    "lora_config": means("settings of --peft lora and dora; lora_load: --adapter", kind="json"),
    "pissa_config": means(
        "settings of --peft pissa; pissa_load: --adapter, pissa_init: --adapter_init", kind="json"
    ),
    "miss_config": means("settings of --peft miss; load: --adapter, mode bat: --peft bat", kind="json"),
    "disha_config": means("the same, for --peft disha", kind="json"),
    "bone_config": means("the same, for --peft bone, with bone_ before each key", kind="json"),
    "PISSA": means("--peft pissa, with --lora_r as its r", kind="switch"),
    "svd_niter": means("svd_niter in --peft_config"),
    "lora_r": means("r in --peft_config"),
    "lora_alpha": means("lora_alpha in --peft_config"),
    "lora_dropout": means("lora_dropout in --peft_config"),
    "lora_load": means("--adapter"),
    "lora_parts": means("--train_parts; att and ffn must be among them"),
    "local_rank": means("what DeepSpeed's launcher passes; the environment says it too", "0"),
    "emb": means("adds emb to --train_parts", kind="switch"),
    "lisa_config": nothing('{"lisa_r":2, "lisa_k":100}', "LISA is not available", "--peft lora", "json"),
    "LISA": nothing("false", "LISA is not available", "--peft lora", "switch"),
    "my_random_steps": nothing(0, "it is read nowhere upstream", "--random_seed"),
    "avg_loss": nothing(0, "the loss is always the mean over the trained tokens of a step"),
    "l2warp_sparse": nothing(0, "the logit penalty always acts on every position", "--logit_penalty"),
    "head_chunk": nothing(0, "the loss is always computed in chunks"),
    "kernel": nothing("", "--op says which program computes the recurrence", "--op auto"),
    "compile": nothing("false", "compiling the model is not available", kind="switch"),
    "cuda_cleanup": nothing(0, "it is read nowhere upstream"),
    "enable_progress_bar": nothing("true", "progress is always shown", kind="switch"),
    "tiny_att_dim": nothing(0, _NO_TRICK),
    "tiny_att_layer": nothing(-999, _NO_TRICK),
    "my_ffn_shift": nothing(1, _NO_TRICK),
    "my_att_shift": nothing(1, _NO_TRICK),
    "my_pos_emb": nothing(0, _NO_TRICK),
    "my_pile_version": nothing(1, "several data sets are given as --data_file a:3,b:1"),
    "my_pile_shift": nothing(-1, "windows always begin at multiples of --ctx_len"),
    "my_pile_edecay": nothing(0, "the rate falls from the end of the warm-up on"),
    **OBJECTIVES,
}

LATER_VALUES: dict[str, dict[str, str]] = {
    "optim": {"adam_mini": "not available: its package knows the parameter names of transformers alone"},
}
"""Values of our own flags that upstream takes and that are not here yet, with what to say of them."""


def refuse(name: str, value: Any, findings: Findings) -> None:
    """Note a mistake if an untranslated upstream flag has another value than upstream's default."""
    known = FLAGS[name]
    if not _is_default(known, value):
        shown = json.dumps(value) if isinstance(value, dict) else value
        findings.add(f"--{name} has no effect here: {known.reason}", found=shown, fix=known.fix)


def translate(given: Mapping[str, Any], method: str | None, findings: Findings) -> dict[str, Any]:
    """Turn the upstream flags among ``given`` into fields; fields given under their own name win.

    Args:
        given: values by flag name, our fields and translated upstream flags, of one source.
        method: what ``chosen_method`` found in all sources.
        findings: where mistakes are noted.
    Returns: values by field name; ``peft`` only where a setting changes the method.
    """
    fields = {name: value for name, value in given.items() if name not in FLAGS and name != "peft"}
    upstream = {name: value for name, value in given.items() if name in FLAGS}
    values: dict[str, Any] = {}
    for name, field in (("rwkv_version", "my_testing"), ("dataset_get", "dataload")):
        if upstream.get(name):
            values[field] = upstream[name]
    if upstream.get("train_type") == "infctx":
        values["infctx"] = True
    if str(upstream.get("my_qa_mask", "0")) != "0":
        values["loss_mask"] = "qa"
    values |= translate_objectives(upstream, fields, findings)
    return {**values, **fields, **translate_methods(upstream, fields, method or "none", findings)}


def _is_default(known: UpstreamFlag, value: Any) -> bool:
    if known.kind == "json":
        given = value if isinstance(value, dict) else parse_json("value", str(value))
        return bool(given == json.loads(known.default))
    text = " ".join(str(word) for word in value) if isinstance(value, list) else str(value)
    try:
        return float(text) == float(known.default)
    except ValueError:
        return text.strip().lower() == known.default.lower()
