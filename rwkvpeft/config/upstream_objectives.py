"""RWKV-LM-RLHF's ways to ask for an objective and its settings, as ``--objective`` and the fields of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rwkvpeft.config.findings import Findings
from rwkvpeft.config.upstream_flag import UpstreamFlag, means, nothing

_SWITCHES = {"dpo": "dpo", "orpo": "orpo", "simpo": "simpo", "wpo": "wpo", "distillation": "distill", "grpo": "grpo"}

_FIELDS: dict[str, dict[str, str]] = {
    "dpo": {"dpo_beta": "beta", "dpo_alpha": "sft_share"},
    "orpo": {"orpo_alpha": "beta"},
    "simpo": {"simpo_beta": "beta", "simpo_alpha": "sft_share"},
    "wpo": {"wpo_beta": "beta", "wpo_alpha": "sft_share"},
    "distill": {
        "temperature": "distill_temperature",
        "alpha": "distill_alpha",
        "smoothing": "label_smoothing",
        "top_k": "distill_top_k",
    },
    "grpo": {
        "grpo_gen_count": "group_size",
        "grpo_gen_length": "answer_tokens",
        "grpo_gen_temperature": "answer_temperature",
        "grpo_gen_topp": "answer_top_p",
        "grpo_kl_beta": "kl_beta",
    },
}
"""By objective: its flags there, and their fields here."""

_WHOLE = ("top_k", "grpo_gen_count", "grpo_gen_length")

FLAGS: dict[str, UpstreamFlag] = {
    **{flag: means(f"1: --objective {objective}", "0") for flag, objective in _SWITCHES.items()},
    **{
        flag: means(f"--{field} of --objective {objective}", kind="whole" if flag in _WHOLE else "number")
        for objective, fields in _FIELDS.items()
        for flag, field in fields.items()
    },
    "rlhf_max_corpus_len": means("--ctx_len of preferences", kind="whole"),
    "rlhf_train_file": nothing(
        "trainset.save", "it names a pickled file, which may run any program when it is read",
        "--data_file with the jsonl or csv file it was made of",
    ),
    "train_data_file": nothing(
        "", "it names an HDF5 file of a teacher's words", "--data_file with the text, and --teacher FOLDER as "
        "python -m rwkvpeft.teacher writes it",
    ),
    "orpo_mode": nothing(0, "--orpo_mode 1 is an experiment of that toolkit; orpo is the paper's"),
    "grpo_debug": nothing(1, "answers and their rewards are always in rollouts.jsonl"),
}


def translate_objectives(upstream: Mapping[str, Any], fields: Mapping[str, Any], findings: Findings) -> dict[str, Any]:
    """The fields that these flags among ``upstream`` set; ``fields`` were given under our own names and win."""
    asked = [objective for flag, objective in _SWITCHES.items() if str(upstream.get(flag, "0")) not in ("0", "")]
    if "objective" in fields:
        asked = [*asked, *([fields["objective"]] if fields["objective"] not in asked else [])]
    findings.check(len(asked) < 2, "two objectives are asked for at once", found=asked, fix="give --objective alone")
    values: dict[str, Any] = {} if not asked else {"objective": asked[0]}
    for objective, names in _FIELDS.items():
        for flag, field in names.items():
            if flag not in upstream or upstream[flag] is None:
                continue
            findings.check(
                objective in asked, f"--{flag} has no effect without --objective {objective}", found=upstream[flag],
                fix=f"--objective {objective} --{field} {upstream[flag]}",
            )
            values[field] = upstream[flag]
    if upstream.get("rlhf_max_corpus_len") is not None:
        values["ctx_len"] = upstream["rlhf_max_corpus_len"]
    return {name: value for name, value in values.items() if name not in fields}
