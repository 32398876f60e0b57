"""What a checkpoint tells about its model: version and every size, read from tensor names and shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from rwkvpeft.errors import UserError


@dataclass(frozen=True)
class ModelShape:
    """Version and sizes of a model. A rank of 0 means that the version has no such low-rank pair.

    ``pre_ffn`` 1 means that block 0 has a second channel mixing in place of the time mixing; ``head_qk`` is the width
    of RWKV-LM's headQK, 0 for none.
    """

    version: str
    n_layer: int
    n_embd: int
    vocab_size: int
    dim_att: int
    dim_ffn: int
    head_size: int
    decay_rank: int = 0
    learning_rate_rank: int = 0
    value_rank: int = 0
    gate_rank: int = 0
    mix_rank: int = 0
    pre_ffn: int = 0
    head_qk: int = 0

    @property
    def n_head(self) -> int:
        """Heads of the time mixing."""
        return self.dim_att // self.head_size

    @property
    def time_mixing_layers(self) -> list[int]:
        """The layers that have a time mixing, and with it a memory."""
        return list(range(self.pre_ffn, self.n_layer))

    def check_recurrent(self, what: str) -> None:
        """Whether a state holds all that is known of earlier tokens.

        Args:
            what: is to be done with a state.
        Raises: UserError for headQK, which looks back at the tokens themselves.
        """
        if self.head_qk:
            raise UserError(
                f"{what} is not possible with headQK, which looks back at every token of a row",
                found=f"a model with --head_qk {self.head_qk}",
                fix="rows read as a whole, as in training and in python -m rwkvpeft.evaluate",
            )


# names within the first time mixing
_SIGNATURES = (
    ("x070", ("x_r", "r_k", "w1")),
    ("x060", ("time_maa_x", "time_decay_w1")),
    ("x052", ("time_mix_g", "time_faaaa")),
)
_PRE_FFN = "blocks.0.ffnPre.key.weight"

_FOREIGN = (
    ("blocks.0.att.time_mix_k", "RWKV v4, v5.0 or v5.1, which this toolkit does not train"),
    ("model.layers.0.attn.r_proj.weight", "the layout of flash-linear-attention and Hugging Face"),
    ("model.embeddings.weight", "the layout of flash-linear-attention and Hugging Face"),
    ("rwkv.embeddings.weight", "the layout of Hugging Face transformers"),
    ("model.embed_tokens.weight", "a transformer in the layout of Hugging Face"),
)


def normalise_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Strip what trainers put before every name (``_forward_module.``, ``model.``, ``_orig_mod.`` and so on)."""
    prefixes = [name[: -len("emb.weight")] for name in tensors if name.endswith("emb.weight")]
    for prefix in prefixes:
        if prefix and f"{prefix}blocks.0.ln1.weight" in tensors:
            return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return dict(tensors)


def _first_mixing(tensors: Mapping[str, Tensor]) -> str:
    """What the names in the first time mixing begin with."""
    return "blocks.1.att." if _PRE_FFN in tensors else "blocks.0.att."


def _version(tensors: Mapping[str, Tensor], source: str) -> str:
    for version, signature in _SIGNATURES:
        if all(f"{_first_mixing(tensors)}{name}" in tensors for name in signature):
            if _PRE_FFN in tensors:
                check_pre_ffn(version, len(_layers(tensors)), source)
            return version
    for name, meaning in _FOREIGN:
        if name in tensors:
            raise UserError(
                f"{source} is not a checkpoint of RWKV v5.2, v6 or v7",
                found=f"{name}: {meaning}",
                fix="use the official .pth of the model",
            )
    if any(".lora_A" in name or name.endswith(".time_state") for name in tensors):
        raise UserError(f"{source} is an adapter or a tuned state, not a model", fix="give the base model's .pth here")
    raise UserError(
        f"{source} is not an RWKV checkpoint",
        found=f"{len(tensors)} tensors: " + ", ".join(list(tensors)[:3]),
        expected="tensors named emb.weight, blocks.0.att..., head.weight",
    )


def _layers(tensors: Mapping[str, Tensor]) -> set[int]:
    return {int(found[1]) for name in tensors if (found := re.match(r"blocks\.(\d{1,9})\.", name))}


def check_pre_ffn(version: str, n_layer: int, source: str) -> None:
    """Whether a model can have a channel mixing in place of block 0's time mixing.

    Raises: UserError if there would be no time mixing at all, or for v7, whose blocks take part of block 0's value.
    """
    if version == "x070":
        raise UserError(
            f"{source}: v7 has no second channel mixing in block 0, where its other blocks find a value",
            found="--pre_ffn 1",
            expected="v5 or v6",
            fix="--pre_ffn 0",
        )
    if n_layer < 2:
        raise UserError(f"{source}: --pre_ffn 1 needs a second block, which has a time mixing", found=n_layer)


def read_shape(tensors: Mapping[str, Tensor], source: str = "the file") -> ModelShape:
    """Read version and sizes from tensors with official names.

    Args:
        source: how messages name the file.
    Raises: UserError if it is not a v5.2, v6 or v7 checkpoint, or if a tensor that tells a size is missing.
    """
    version = _version(tensors, source)
    layers = _layers(tensors)
    if layers != set(range(len(layers))):
        missing = next(number for number in range(len(layers)) if number not in layers)
        raise UserError(
            f"{source} lacks whole blocks",
            found=f"no tensors of block {missing}",
            fix="download it again: the file is incomplete",
        )

    def size(name: str, axis: int) -> int:
        if name not in tensors:
            raise UserError(f"{source} lacks the tensor {name}", fix="download it again: the file is incomplete")
        shape = tensors[name].shape
        if axis >= len(shape) or not shape[axis]:
            raise UserError(f"{source}: the tensor {name} tells no size", found=tuple(shape))
        return shape[axis]

    att = _first_mixing(tensors)
    heads = {"x052": "time_decay", "x060": "time_faaaa", "x070": "r_k"}[version]
    heads_tell_none = f"{att}{heads}" in tensors and tensors[f"{att}{heads}"].dim() != 2
    ranks: dict[str, int] = {}
    if version == "x060":
        ranks = {"decay_rank": size(f"{att}time_decay_w1", 1), "mix_rank": size(f"{att}time_maa_w2", 1)}
    if version == "x070":
        # block 0 takes no value from an earlier layer: old files lack its v1
        value_block = 1 if "blocks.1.att.v1" in tensors else 0
        value_rank = size(f"blocks.{value_block}.att.v1", 1) if f"blocks.{value_block}.att.v1" in tensors else 32
        ranks = {
            "decay_rank": size("blocks.0.att.w1", 1),
            "learning_rate_rank": size("blocks.0.att.a1", 1),
            "value_rank": value_rank,
            "gate_rank": size("blocks.0.att.g1", 1),
        }
    return ModelShape(
        version=version,
        n_layer=len(layers),
        n_embd=size("emb.weight", 1),
        vocab_size=size("head.weight", 0),
        dim_att=size(f"{att}receptance.weight", 0),
        dim_ffn=size("blocks.0.ffn.key.weight", 0),
        head_size=64 if heads_tell_none else size(f"{att}{heads}", 1),
        pre_ffn=int(_PRE_FFN in tensors),
        head_qk=size("head_q.weight", 0) if "head_q.weight" in tensors else 0,
        **ranks,
    )


def new_shape(
    version: str,
    *,
    n_layer: int,
    n_embd: int,
    vocab_size: int,
    head_size: int = 64,
    dim_att: int = 0,
    dim_ffn: int = 0,
    pre_ffn: int = 0,
    head_qk: int = 0,
) -> ModelShape:
    """The sizes RWKV-LM gives a new model.

    Args:
        dim_att: 0 means ``n_embd``.
        dim_ffn: 0 means 4 x n_embd for v7, otherwise 3.5 x n_embd rounded down to a multiple of 32.
        pre_ffn, head_qk: see ``ModelShape``.
    Raises: UserError where ``pre_ffn`` cannot be.
    Source: RWKV-LM, RWKV-v5/train.py (sizes) and RWKV-v7/train_temp/src/model.py (ranks).
    """

    def rank(factor: float) -> int:
        return max(32, round(factor * n_embd**0.5 / 32) * 32)

    if pre_ffn:
        check_pre_ffn(version, n_layer, "the model")
    ranks = {
        "x052": {},
        "x060": {"decay_rank": 64, "mix_rank": 32},
        "x070": {
            "decay_rank": rank(2.5),
            "learning_rate_rank": rank(2.5),
            "value_rank": rank(1.7),
            "gate_rank": rank(5.0),
        },
    }[version]
    return ModelShape(
        version=version,
        n_layer=n_layer,
        n_embd=n_embd,
        vocab_size=vocab_size,
        dim_att=dim_att or n_embd,
        dim_ffn=dim_ffn or (n_embd * 4 if version == "x070" else int(n_embd * 3.5) // 32 * 32),
        head_size=head_size,
        pre_ffn=int(bool(pre_ffn)),
        head_qk=head_qk,
        **ranks,
    )
