"""Muon for matrices, Adam for everything else."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from rwkvpeft.config.groups import OptimizerConfig
from rwkvpeft.errors import UserError
from rwkvpeft.training.optimizers.adam import build_adam
from rwkvpeft.training.optimizers.contract import Combined, OptimizerKind

# lookup tables, and vectors that v5, v6 and v7 files hold as (heads, head size)
_TABLES = ("emb.", "head.")
_PER_HEAD = (".att.r_k", ".att.time_decay", ".att.time_faaaa")


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon trains the parameter: it maps one space to another, and is neither embedding nor head."""
    flat = parameter.dim() != 2 or min(parameter.shape) == 1
    return not flat and not name.startswith(_TABLES) and not name.endswith(_PER_HEAD)


def check_muon(device_type: str) -> None:
    """Raises: UserError if this PyTorch has no Muon, on any device."""
    if not hasattr(torch.optim, "Muon"):
        raise UserError(
            "--optim muon: this PyTorch has no Muon",
            found=f"torch {torch.__version__}",
            expected="torch 2.9 or newer",
            fix="pip install -U torch, or --optim adamw",
        )


def build_muon(groups: list[dict[str, Any]], config: OptimizerConfig, *, scaled_gradients: bool) -> Optimizer:
    """Muon for the matrices, with steps of the size of Adam's so that both share ``--lr_init``; Adam for the rest.

    ``beta1``, ``beta2`` and ``adam_eps`` are Adam's; Muon's momentum is 0.95.

    Raises: UserError if nothing that is trained is a matrix.
    Source: Jordan et al., Muon (2024), kellerjordan.github.io/posts/muon; step size of Liu et al. (arXiv 2502.16982).
    """
    matrices, others = _split(groups)
    if not matrices:
        raise UserError("--optim muon: nothing of what is trained here is a matrix", fix="--optim adamw")
    muon = torch.optim.Muon(matrices, lr=0.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    if not others:
        return Combined([muon])
    return Combined([muon, build_adam(others, config, scaled_gradients=scaled_gradients)])


def _split(groups: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Each group twice, with its matrices and with its other parameters; empty ones are left out."""
    matrices: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for group in groups:
        named = list(zip(group["names"], group["params"], strict=True))
        for wanted, chosen in ((True, matrices), (False, others)):
            members = [(name, parameter) for name, parameter in named if is_matrix(name, parameter) == wanted]
            if members:
                names, parameters = zip(*members, strict=True)
                chosen.append({**group, "names": list(names), "params": list(parameters)})
    return matrices, others


MUON = OptimizerKind(build_muon, moment_bytes=4, check=check_muon)
