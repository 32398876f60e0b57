"""The settings of objectives beside language modelling: preferences, distillation, rewards.

Names of RWKV-LM-RLHF's flags for the same things are in ``config/upstream_objectives.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rwkvpeft.config.flags import flag
from rwkvpeft.registry import OBJECTIVES

PREFERENCES = ("dpo", "ipo", "orpo", "simpo", "kto", "wpo", "cpo")
"""Objectives that learn from answers of which one is preferred."""

WITH_REFERENCE = ("dpo", "ipo", "kto", "wpo")
"""Those of them that compare with what the model said before training."""

Reads = Literal["tokens", "pairs", "prompts"]


@dataclass(frozen=True)
class ObjectiveConfig:
    """What a batch is turned into a loss by; with preferences, which answer is better."""

    objective: str = flag(
        "language_modelling",
        help="language_modelling: predict the next token (pre-training, instruction tuning); dpo, ipo, wpo, kto, orpo, "
        "simpo, cpo: answers of which one is preferred, data with prompt, chosen and rejected; distill: learn from "
        "--teacher; grpo: answers of its own, judged by --reward",
        choices=OBJECTIVES,
        metavar="NAME",
    )
    beta: float | None = flag(
        None,
        help="preferences: how much the difference of two answers counts; by objective: simpo 2, otherwise 0.1; of "
        "orpo it is the weight of the odds ratio",
    )
    sft_share: float | None = flag(
        None,
        help="preferences: weight of the chosen answers' cross entropy, added to the loss; by objective: orpo and cpo "
        "1, otherwise 0",
    )
    flip_share: float = flag(
        0.0, help="preferences: share of the pairs taken to be the wrong way round (label smoothing of dpo and cpo)"
    )
    length_norm: bool | None = flag(
        None,
        help="preferences: go by the mean of an answer's tokens instead of their sum; by objective: orpo and simpo "
        "true, otherwise false",
    )
    simpo_gamma: float = flag(1.0, help="simpo: the margin by which the chosen answer is to win")
    dpo_loss: str = flag(
        "sigmoid", help="dpo, cpo and simpo: sigmoid: the papers'; hinge: nothing to learn beyond a margin of 1",
        choices=("sigmoid", "hinge"),
    )
    kto_desirable: float = flag(1.0, help="kto: weight of the answers that are wanted")
    kto_undesirable: float = flag(1.0, help="kto: weight of the answers that are not")
    reference: str = flag(
        "auto",
        help="what dpo, ipo, wpo and kto compare with. base: the same weights with the adapter switched off; start: "
        "the model as training found it, its answers' log-probabilities worked out once and kept in proj_dir; auto: "
        "base for a new adapter, otherwise start",
        choices=("auto", "base", "start"),
    )

    @property
    def reads(self) -> Reads:
        """What a row of the data is."""
        if self.objective in PREFERENCES:
            return "pairs"
        return "prompts" if self.objective == "grpo" else "tokens"


@dataclass(frozen=True)
class DistillationConfig:
    """Learning from what another model says of the same tokens."""

    teacher: str = flag(
        "", help="distill: an RWKV .pth of any version and size with the same tokens, or a folder that python -m "
        "rwkvpeft.teacher wrote", metavar="FILE|FOLDER",
    )
    distill_alpha: float = flag(
        0.5, help="distill: weight of the teacher; the rest goes to the data's own tokens, with --label_smoothing"
    )
    distill_temperature: float = flag(2.0, help="distill: both models' logits are divided by this")
    distill_top_k: int = flag(
        64, help="distill: the teacher's likeliest tokens that are told apart; 0: all; of a folder all it holds"
    )
    distill_loss: str = flag(
        "tail",
        help="distill: divergence from the teacher. tail: its likeliest tokens, all others as one; renorm: those "
        "alone, in both models; student: those alone in the teacher; reverse: of the student from the teacher, "
        "with the tail",
        choices=("tail", "renorm", "student", "reverse"),
    )


@dataclass(frozen=True)
class RewardConfig:
    """Learning from rewards of the model's own answers."""

    reward: list[str] = flag(
        [], help="grpo: Python functions as package.module:function, or FILE.py:function, each with =WEIGHT if not 1",
        metavar="FUNCTION",
    )
    group_size: int = flag(8, help="grpo: answers to each prompt, which are compared with each other", unit="answers")
    answer_tokens: int = flag(256, help="grpo: length of an answer at most", unit="tokens")
    answer_temperature: float = flag(1.0, help="grpo: temperature the answers are drawn with")
    answer_top_p: float = flag(1.0, help="grpo: probability of the tokens they are drawn from")
    answer_stop: list[str] = flag([], help="grpo: texts that end an answer beside the end of a turn", metavar="TEXT")
    advantage: str = flag(
        "group",
        help="grpo: group: reward less the mean of its group, over its deviation; centred: without the division "
        "(Dr. GRPO); rloo: less the mean of the others; reinforce++: over mean and deviation of all answers of a "
        "device's batch",
        choices=("group", "centred", "rloo", "reinforce++"),
    )
    answer_mean: str = flag(
        "grpo",
        help="grpo: how tokens count. grpo: mean of each answer, then of answers; dapo: mean over all tokens of a "
        "group; dr_grpo: their sum over --answer_tokens",
        choices=("grpo", "dapo", "dr_grpo"),
    )
    overlong: str = flag(
        "keep", help="grpo: answers that found no end. keep: as the others; mask: not learned from (DAPO)",
        choices=("keep", "mask"),
    )
    clip_low: float = flag(0.2, help="grpo: how far the probability ratio may fall below 1")
    clip_high: float = flag(0.2, help="grpo: how far it may rise above 1; DAPO 0.28")
    kl_beta: float = flag(0.0, help="grpo: weight of the divergence from the model with the adapter switched off")
    policy_steps: int = flag(1, help="grpo: optimizer steps taken with the same answers", unit="steps")
