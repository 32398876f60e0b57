"""The settings of each native adapter. Imports nothing heavy, so that ``--peft METHOD --help`` answers at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from rwkvpeft.config.flags import flag
from rwkvpeft.errors import UserError

_TARGETS_HELP = (
    "linears to adapt by the end of their path, as key, att.key or blocks.0.att.key; head only if named; "
    "none given: receptance, key, value, output and gate of att and ffn"
)

LARGEST_RANK = 1 << 16
_LARGEST_NUMBER = 1e300


@dataclass(frozen=True)
class LoraConfig:
    """Settings of LoRA and DoRA. Raises UserError for a value out of range."""

    r: int = flag(8, help="rank of the update")
    lora_alpha: float = flag(32, help="the update is scaled by lora_alpha / r", alias="alpha")
    lora_dropout: float = flag(0.01, help="dropout of the update's input", alias="dropout")
    use_rslora: bool = flag(False, help="scale by lora_alpha / sqrt(r) instead, for large ranks")
    target_modules: list[str] | None = flag(None, help=_TARGETS_HELP)

    def __post_init__(self) -> None:
        _check_rank("LoRA", self.r)
        if not _is_number(self.lora_alpha) or self.lora_alpha <= 0:
            raise UserError("LoRA's lora_alpha cannot be used", found=self.lora_alpha, expected="a number above 0")
        _check_dropout("LoRA's lora_dropout", self.lora_dropout)
        _check_switch("LoRA's use_rslora", self.use_rslora)
        _read_targets(self, "LoRA")

    def scaling(self, rank: int) -> float:
        """What the product of two matrices of that rank is multiplied by (rsLoRA: arXiv 2312.03732)."""
        return self.lora_alpha / (math.sqrt(rank) if self.use_rslora else rank)


@dataclass(frozen=True)
class PissaConfig:
    """Settings of PiSSA. Raises UserError for a value out of range."""

    r: int = flag(8, help="how many principal components are trained", alias="pissa_r")
    svd_niter: int = flag(4, help="power iterations of the truncated SVD; more: closer to the exact one")
    target_modules: list[str] | None = flag(None, help=_TARGETS_HELP)

    def __post_init__(self) -> None:
        _check_rank("PiSSA", self.r)
        if isinstance(self.svd_niter, bool) or not isinstance(self.svd_niter, int) or self.svd_niter < 0:
            raise UserError("PiSSA's svd_niter cannot be used", found=self.svd_niter, expected="a whole number from 0")
        _read_targets(self, "PiSSA")


@dataclass(frozen=True)
class MissConfig:
    """Settings of MiSS, earlier named Bone and DiSHA. Raises UserError for a value out of range."""

    r: int = flag(64, help="rows of the shard; input channels that are r apart share one", alias="bone_r")
    mini_r: int = flag(0, help="columns of the shard, repeated over the outputs; 0: one for each output")
    miss_dropout: float = flag(0.0, help="dropout of the update's input", alias="dropout")
    target_modules: list[str] | None = flag(None, help=_TARGETS_HELP)

    def __post_init__(self) -> None:
        _check_rank("MiSS", self.r)
        if isinstance(self.mini_r, bool) or not isinstance(self.mini_r, int) or self.mini_r < 0:
            raise UserError("MiSS's mini_r cannot be used", found=self.mini_r, expected="a whole number from 0")
        _check_dropout("MiSS's miss_dropout", self.miss_dropout)
        _read_targets(self, "MiSS")


@dataclass(frozen=True)
class BatConfig:
    """Settings of Bat, the form of Bone that multiplies the weight. Raises UserError for a value out of range."""

    r: int = flag(64, help="size of the blocks; it must divide both sizes of every linear", alias="bone_r")
    target_modules: list[str] | None = flag(None, help=_TARGETS_HELP)

    def __post_init__(self) -> None:
        _check_rank("Bat", self.r)
        _read_targets(self, "Bat")


@dataclass(frozen=True)
class StateConfig:
    """Settings of state tuning. Raises UserError for a value out of range."""

    token_shift: bool = flag(
        False, help="also learn what the first token sees as its predecessor; only this toolkit reads such files"
    )
    lr_init: float | None = flag(
        None, help="learning rate of the states after warm-up; beside another method 1, otherwise --lr_init"
    )
    lr_final: float | None = flag(
        None, help="learning rate of the states at the end; beside another method 0.01, otherwise --lr_final"
    )

    def __post_init__(self) -> None:
        _check_switch("the state's token_shift", self.token_shift)
        for name in ("lr_init", "lr_final"):
            value = getattr(self, name)
            if value is not None and (not _is_number(value) or value < 0):
                raise UserError(f"the state's {name} cannot be used", found=value, expected="a number from 0")


def _is_number(value: Any) -> bool:
    # a whole number of any size may be compared with a float, and not be made one
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST_NUMBER


def _check_rank(method: str, r: Any) -> None:
    if isinstance(r, bool) or not isinstance(r, int) or not 1 <= r <= LARGEST_RANK:
        raise UserError(f"{method}'s r cannot be used", found=f"{r!r:.80}",
                        expected=f"a whole number from 1 to {LARGEST_RANK}")


def _check_dropout(what: str, value: Any) -> None:
    if not _is_number(value) or not 0 <= value < 1:
        raise UserError(f"{what} cannot be used", found=value, expected="0 up to below 1")


def _check_switch(what: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise UserError(f"{what} cannot be used", found=value, expected="true or false")


def _read_targets(config: Any, method: str) -> None:
    targets = config.target_modules
    if isinstance(targets, str):
        object.__setattr__(config, "target_modules", [part.strip() for part in targets.split(",")])
    elif targets is not None and not (
        isinstance(targets, list) and all(isinstance(target, str) for target in targets)
    ):
        raise UserError(f"{method}'s target_modules cannot be used", found=targets, expected="a list of names")
