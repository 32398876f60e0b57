"""Published tensor names, version by version. Nothing else explains them.

Checkpoints in the wild depend on these names, so parameters keep them. Letters: L layer, V vocabulary, C width,
A width of the time mixing (C in official models), F width of the channel mixing, H heads, N head size, R a rank.
``{L}`` stands for the layer. Sources: RWKV-LM; Eagle and Finch paper (arXiv 2404.05892) for v5 and v6; RWKV-7 paper
(arXiv 2503.14456) for v7.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_LARGE_LINEAR = re.compile(r"blocks\.\d+\.(att|ffn|ffnPre)\.(receptance|key|value|output|gate)\.weight")

COPY_MASK = "copy_mask"
"""What RWKV-LM's files of a model with headQK hold beside its parameters: a triangle of ones, which nothing needs."""
_IN_BLOCK = re.compile(r"(blocks\.\d+)\.(\w+)\.(.+)")


def is_large_linear(name: str) -> bool:
    """Whether a tensor of that name is one of the blocks' matrices, which hold most of a model's weights."""
    return _LARGE_LINEAR.fullmatch(name) is not None


def is_state(name: str) -> bool:
    """Whether a tensor of that name is what a layer starts from; the recurrence takes it in fp32 in any run."""
    return name.endswith((".time_state", ".shift_state"))


def part_of(name: str) -> str:
    """The part of a model that a trained tensor belongs to, for statistics of each part.

    ``emb``, ``head``, ``ln_out``; of block L: ``blocks.L.norms`` and, for its time and its channel mixing,
    ``blocks.L.att``, the matrices, ``blocks.L.att.time``, what mixes tokens and steers the memory,
    ``blocks.L.att.norms``, ``blocks.L.att.state`` and ``blocks.L.att.adapter``, whatever an adapter has added.
    """
    found = _IN_BLOCK.fullmatch(name)
    if found is None:
        top, _, rest = name.partition(".")
        return top if rest in ("weight", "bias") else f"{top}.adapter"
    block, module, rest = found.groups()
    if module.startswith("ln"):
        return f"{block}.norms"
    here = f"{block}.{module}"
    if is_large_linear(name):
        return here
    if is_state(name):
        return f"{here}.state"
    if rest.startswith("ln_x."):
        return f"{here}.norms"
    return f"{here}.adapter" if "." in rest else f"{here}.time"


class TensorName(NamedTuple):
    """One published tensor: its name, its shape in letters, what it is."""

    name: str
    shape: str
    meaning: str


EVERY_VERSION = (
    TensorName("emb.weight", "V, C", "token embedding"),
    TensorName("blocks.0.ln0.weight/bias", "C", "layer norm of the embedding, block 0 only"),
    TensorName("blocks.{L}.ln1.weight/bias", "C", "layer norm before the time mixing"),
    TensorName("blocks.{L}.ln2.weight/bias", "C", "layer norm before the channel mixing"),
    TensorName("blocks.{L}.att.receptance.weight", "A, C", "what is asked of the memory, r"),
    TensorName("blocks.{L}.att.key.weight", "A, C", "where in the memory a value is kept, k"),
    TensorName("blocks.{L}.att.value.weight", "A, C", "what is kept, v"),
    TensorName("blocks.{L}.att.output.weight", "C, A", "from what was read back to the residual stream"),
    TensorName("blocks.{L}.att.ln_x.weight/bias", "A", "group norm of what was read, one group per head"),
    TensorName("blocks.{L}.att.time_state", "H, N, N", "tuned initial memory; rows value, columns key; optional"),
    TensorName("blocks.{L}.att/ffn.shift_state", "C", "tuned token before the first; this toolkit's own; optional"),
    TensorName("blocks.{L}.ffn.key.weight", "F, C", "channel mixing, up"),
    TensorName("blocks.{L}.ffn.value.weight", "C, F", "channel mixing, down"),
    TensorName("blocks.0.ffnPre.*", "", "as ffn: a channel mixing in place of block 0's att; v5, v6, optional"),
    TensorName("ln_out.weight/bias", "C", "layer norm before the head"),
    TensorName("head.weight", "V, C", "logits"),
    TensorName("head_q/head_k.weight", "R, C", "headQK: logits of tokens that were read before, optional"),
    TensorName("copy_mask", "T, T", "headQK: a triangle of ones, which is not read"),
)

V5 = (
    TensorName("blocks.{L}.att.time_mix_k/v/r/g", "1, 1, C", "share of the token itself, against its predecessor"),
    TensorName("blocks.{L}.att.time_decay", "H, N", "decay logit: decay = exp(-exp(.))"),
    TensorName("blocks.{L}.att.time_faaaa", "H, N", "bonus of the current token, u"),
    TensorName("blocks.{L}.att.gate.weight", "A, C", "gate of the output, through SiLU"),
    TensorName("blocks.{L}.ffn.time_mix_k/r", "1, 1, C", "share of the token itself in the channel mixing"),
    TensorName("blocks.{L}.ffn.receptance.weight", "C, C", "gate of the channel mixing, through a sigmoid"),
)

V6 = (
    TensorName("blocks.{L}.att.time_maa_x", "1, 1, C", "share of the predecessor in the token that computes shares"),
    TensorName("blocks.{L}.att.time_maa_w/k/v/r/g", "1, 1, C", "share of the predecessor, its fixed part"),
    TensorName("blocks.{L}.att.time_maa_w1", "C, 5R", "shares, data-dependent part: down, tanh, then w2"),
    TensorName("blocks.{L}.att.time_maa_w2", "5, R, C", "shares, data-dependent part: up; order w k v r g"),
    TensorName("blocks.{L}.att.time_decay", "1, 1, A", "decay logit, fixed part: decay = exp(-exp(.))"),
    TensorName("blocks.{L}.att.time_decay_w1/w2", "C, R / R, A", "decay logit, data-dependent part, tanh between"),
    TensorName("blocks.{L}.att.time_faaaa", "H, N", "bonus of the current token, u"),
    TensorName("blocks.{L}.att.gate.weight", "A, C", "gate of the output, through SiLU"),
    TensorName("blocks.{L}.ffn.time_maa_k/r", "1, 1, C", "share of the predecessor in the channel mixing"),
    TensorName("blocks.{L}.ffn.receptance.weight", "C, C", "gate of the channel mixing, through a sigmoid"),
)

V7 = (
    TensorName("blocks.{L}.att.x_r/w/k/v/a/g", "1, 1, C", "share of the predecessor, for each of the six uses"),
    TensorName("blocks.{L}.att.w0, w1, w2", "1, 1, A / C, R / R, A", "decay logit w0 + tanh(x w1) w2"),
    TensorName("blocks.{L}.att.a0, a1, a2", "1, 1, A / C, R / R, A", "in-context learning rate, through a sigmoid"),
    TensorName("blocks.{L}.att.v0, v1, v2", "1, 1, A / C, R / R, A", "share of layer 0's value; unused in block 0"),
    TensorName("blocks.{L}.att.g1, g2", "C, R / R, A", "gate sigmoid(x g1) g2"),
    TensorName("blocks.{L}.att.k_k", "1, 1, A", "from key to removal key, normalised per head afterwards"),
    TensorName("blocks.{L}.att.k_a", "1, 1, A", "how much the learning rate scales the key"),
    TensorName("blocks.{L}.att.r_k", "H, N", "bonus of the current token"),
    TensorName("blocks.{L}.ffn.x_k", "1, 1, C", "share of the predecessor in the channel mixing"),
)
