"""What a block keeps for its backward pass, and what is computed once more there.

The results are the same, bit for bit. Letters: R rows (all tokens of a batch).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Level = Literal["none", "selective", "block"]
"""``none``: autograd keeps what it needs, nothing is computed again; ``selective``: large matrix products and the WKV
recurrence are kept, all else is computed again; ``block``: the block's input is kept, all is computed again."""

LEVELS: dict[str, Level] = {"0": "none", "selective": "selective", "1": "block"}
"""By the value of ``--grad_cp``; the fastest first, and the one that keeps least last."""

# above the ranks of gates and decays, below the width of any model
_DEAR = 512
_aten = torch.ops.aten
# place of the two factors among an operator's arguments
_PRODUCTS: dict[Any, tuple[int, int]] = {
    _aten.mm.default: (0, 1),
    _aten.bmm.default: (0, 1),
    _aten.addmm.default: (1, 2),
    _aten.baddbmm.default: (1, 2),
    _aten._scaled_mm.default: (0, 1),
}


def run_block(block: nn.Module, level: Level, *inputs: Any) -> Any:
    """Run a block so that its backward pass keeps what ``level`` says."""
    if level == "none":
        return block(*inputs)
    # to put back the generators' state costs as much as some kernels, and cannot be captured in a CUDA graph
    again: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": draws_random_numbers(block)}
    if level == "block":
        return checkpoint(block, *inputs, **again)
    return checkpoint(block, *inputs, context_fn=_contexts, **again)


def draws_random_numbers(block: nn.Module) -> bool:
    """Whether some module in it has dropout or noise, or is of another package, which may do anything."""
    for module in block.modules():
        if not type(module).__module__.startswith(("rwkvpeft.", "torch.nn.")):
            return True
        if getattr(module, "dropout", 0.0) or getattr(module, "neftune_alpha", 0.0):
            return True
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p:
            return True
    return False


def keeps(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """The policy of ``selective`` for one call of an operator.

    A product (R, K) x (K, N) costs 2 K operations for each number of its result: a large K is worth the memory, and so
    is a result that is no larger than what it is made of. The second product of a low-rank pair is neither.
    """
    factors = _PRODUCTS.get(operator)
    if factors is not None:
        inner, out = args[factors[1]].shape[-2:]
        dear = inner >= _DEAR or out <= inner
    else:
        dear = operator.namespace == "rwkvpeft" and _is_recurrence(operator._opname)
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE


def _is_recurrence(name: str) -> bool:
    return "wkv" in name and name.endswith("_forward")


def _contexts() -> Any:
    return create_selective_checkpoint_contexts(keeps)
