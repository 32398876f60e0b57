"""A whole training step on random weights of a real shape: forward, loss, backward, clipping, optimizer.

Shared by ``training_step.py`` and ``loss_curve.py``. The real model, adapter, objective and optimizer take part;
Lightning does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from gpu_memory import SIZES, RandomWeights
from torch import Tensor

from rwkvpeft.adapters.build import build_adapter
from rwkvpeft.checkpoints.load import build_model, fill_model, operator_of
from rwkvpeft.config.groups import OptimizerConfig, RuntimeConfig
from rwkvpeft.data.batches import TokenBatch
from rwkvpeft.models.backbone import Rwkv
from rwkvpeft.models.recompute import LEVELS
from rwkvpeft.models.shape import new_shape
from rwkvpeft.objectives.language_modelling import LanguageModelling
from rwkvpeft.ops.block.choose import choose_block_ops
from rwkvpeft.ops.block.contract import BlockOps
from rwkvpeft.ops.choose import choose_backend
from rwkvpeft.ops.contract import Needs, Wkv
from rwkvpeft.ops.cross_entropy import RowChoice
from rwkvpeft.ops.cross_entropy_choose import choose_rows
from rwkvpeft.ops.cross_entropy_torch import RowProgram
from rwkvpeft.registry import BLOCK_OPS, find
from rwkvpeft.training.devices import COMPUTE_DTYPES, place_model
from rwkvpeft.training.graphed_step import CudaGraphs, GraphedStep, why_not
from rwkvpeft.training.optimizers.contract import find_optimizer
from rwkvpeft.training.parameter_groups import parameter_groups

_SETTINGS = {"state": {}, "none": {}}


@dataclass(frozen=True)
class Settings:
    """What a step is made of; names as in ``train.py``."""

    size: str
    peft: str = "lora"
    micro_bsz: int = 1
    ctx_len: int = 1024
    grad_cp: str = "0"
    op: str = "auto"
    fused_kernel: str = "auto"
    rank: int = 64
    version: str = "x070"
    precision: str = "bf16"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    lr: float = 1e-5
    cuda_graph: bool = False


class WholeStep:
    """A model under training.

    Args:
        wkv: takes the place of the operator ``op`` would choose.
        reached: is told what is there: ``weights``, then ``optimizer``.
    Raises: ValueError if the step cannot be replayed and should be; then or at a later step.
    """

    def __init__(
        self, settings: Settings, wkv: Wkv | None = None, reached: Callable[[str], None] = lambda _: None
    ) -> None:
        torch.manual_seed(0)
        self.settings = settings
        self.operator = settings.op
        self.rows: RowChoice | RowProgram = "auto"
        self.model = self._build(wkv)
        reached("weights")
        groups = parameter_groups(self.model.named_parameters(), layerwise_lr=True, weight_decay=0.0)
        self.optimizer = find_optimizer("adam").build(groups, OptimizerConfig(), scaled_gradients=False)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr
        self.trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        reached("optimizer")
        self.objective = LanguageModelling(1e-4, compact=not settings.cuda_graph, rows=self.rows)
        self.graphed: GraphedStep | None = None
        if settings.cuda_graph:
            runtime = RuntimeConfig(precision=settings.precision)
            if reason := why_not(runtime, self.model, settings.device.type):
                raise ValueError(reason)
            self.graphed = GraphedStep(self._forward_and_backward, self.trained, CudaGraphs(), _refuse)

    def _build(self, wkv: Wkv | None) -> Rwkv:
        settings = self.settings
        n_layer, n_embd, vocab_size = SIZES[settings.size]
        shape = new_shape(settings.version, n_layer=n_layer, n_embd=n_embd, vocab_size=vocab_size)
        dtype = COMPUTE_DTYPES[settings.precision]
        needs = Needs(settings.device.type, dtype, shape.head_size, True, settings.micro_bsz, settings.ctx_len,
                      shape.n_head)
        if wkv is None:
            choice = choose_backend(operator_of(shape), settings.op, needs)
            wkv, self.operator = choice.run, choice.report
        self.rows = choose_rows("torch" if settings.fused_kernel == "false" else "auto", needs, settings.device).program
        model = build_model(shape, wkv, block_ops=block_ops(settings, needs))
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        fill_model(model, RandomWeights(shapes, str(settings.device)), device=settings.device, dtype=dtype,
                   source="random weights")
        parts = [] if settings.peft in ("state", "none") else ["time", "ln"]
        adapter = build_adapter(settings.peft, _SETTINGS.get(settings.peft, {"r": settings.rank}), parts)
        if adapter is None:
            model.requires_grad_(True)
        else:
            adapter.attach(model)
        place_model(model, settings.precision, settings.device)
        model.recompute = LEVELS[settings.grad_cp]
        return model.train()

    def batch(self) -> TokenBatch:
        """Random tokens."""
        settings = self.settings
        rows = (settings.micro_bsz, settings.ctx_len + 1)
        return batch_of(torch.randint(1, self.model.shape.vocab_size, rows, device=settings.device))

    def run(self, batch: TokenBatch) -> Tensor:
        """One step; returns its loss, which nobody has waited for."""
        loss = (self.graphed or self._forward_and_backward)(*batch)
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        # replays add to gradients where they are
        self.optimizer.zero_grad(set_to_none=self.graphed is None)
        return loss

    def _forward_and_backward(self, *batch: Tensor) -> Tensor:
        given = TokenBatch(*batch)
        loss = self.objective(self.model, given, given.step_weight).total
        loss.backward()
        return loss.detach()

    def flops(self) -> float:
        """Operations of the base's matrix products in one step, those that are computed twice counted twice.

        An adapter's own products and the recurrence are left out: a floor, whatever the method.
        """
        blocks = sum(
            parameter.numel()
            for name, parameter in self.model.named_parameters()
            if name.startswith("blocks.") and parameter.dim() == 2 and "lora_" not in name and min(parameter.shape) > 1
        )
        head = self.model.shape.vocab_size * self.model.shape.n_embd
        whole = self.settings.peft == "none"
        passes = (6 if whole else 4) + (2 if self.settings.grad_cp == "1" else 0)
        tokens = self.settings.micro_bsz * self.settings.ctx_len
        return tokens * (passes * blocks + (6 if whole else 4) * head)


def _refuse(line: str) -> None:
    """A figure of a step that was not replayed must not stand for one that was."""
    raise ValueError(line)


def block_ops(settings: Settings, needs: Needs) -> BlockOps:
    """What ``--fused_kernel`` says; auto: the fused kernels on a GPU where they prove right."""
    name = {"auto": "auto", "true": "triton", "false": "torch"}[settings.fused_kernel]
    if name == "triton" and needs.device_type == "cpu":
        # interpreted, which no run would choose
        program: BlockOps = find(BLOCK_OPS, name, flag="--fused_kernel")
        return program
    return choose_block_ops(name, needs).ops


def batch_of(tokens: Tensor) -> TokenBatch:
    """Rows (B, T + 1) as inputs and labels, every token trained."""
    weights = torch.ones(tokens.shape[0], tokens.shape[1] - 1, device=tokens.device)
    return TokenBatch(tokens[:, :-1], tokens[:, 1:], weights, weights.sum())


def is_finite(loss: Tensor) -> bool:
    """Whether figures of a run with this loss mean anything."""
    return math.isfinite(loss.item())
