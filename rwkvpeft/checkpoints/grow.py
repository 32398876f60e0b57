"""A larger model that begins where a smaller one stands.

Channel i of the smaller model stays channel i, head h stays head h, token t stays token t, and so on: each of its
tensors goes into the corner of the larger one, and the rest are initial weights. Those have zeros wherever a block
adds to the residual stream, so that a model with more blocks, more token ids, or a wider time or channel mixing
computes at first what the smaller one computes. A wider residual stream (``n_embd``) changes what the norms see, and
the model has to find its way back.

RWKV-LM takes whole tensors alone (``--load_partial 1``), or stretches vectors (stage 1 with ``--load_model``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from torch import Tensor

from rwkvpeft.errors import UserError
from rwkvpeft.models.names import COPY_MASK
from rwkvpeft.models.shape import ModelShape, new_shape

_FIXED = ("version", "head_size", "pre_ffn")
_RANKS = ("decay_rank", "learning_rate_rank", "value_rank", "gate_rank", "mix_rank")


@dataclass(frozen=True)
class Growth:
    """Names of the larger model's tensors by where their values come from, and numbers of values."""

    whole: list[str]
    partly: list[str]
    anew: list[str]
    taken: int
    values: int

    def lines(self, source: str) -> list[str]:
        """For people."""
        return [
            f"taken from {source}: {self.taken:,} of {self.values:,} values",
            f"  whole: {len(self.whole)} tensors",
            f"  partly: {len(self.partly)} tensors{_examples(self.partly)}",
            f"  drawn anew: {len(self.anew)} tensors{_examples(self.anew)}",
        ]


def _examples(names: list[str]) -> str:
    return f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""


def grown_shape(small: ModelShape, sizes: Mapping[str, int | str], source: str) -> ModelShape:
    """The shape of the larger model.

    Args:
        sizes: wanted values by names of ``ModelShape``; what is not named is the smaller model's, except that a wider
            residual stream widens the rest as a new model has it.
        source: how messages name the smaller model's file.
    Raises: UserError if the larger model is smaller in anything, or of another version or head size.
    """
    for name in _FIXED:
        if sizes.get(name, getattr(small, name)) != getattr(small, name):
            raise UserError(f"{source} cannot grow into a model of another {name.replace('_', ' ')}",
                            found=f"{getattr(small, name)} in the file, {sizes[name]} wanted")
    if all(getattr(small, name) == size for name, size in sizes.items()):
        raise UserError(f"--load_partial 1: {source} has all the sizes asked for and need not grow",
                        fix="leave --load_partial out, or give larger sizes")
    wanted = {item.name: sizes.get(item.name, getattr(small, item.name)) for item in fields(small)}
    if wanted["n_embd"] != small.n_embd:
        drawn = new_shape(
            small.version, n_layer=1, n_embd=int(wanted["n_embd"]), vocab_size=1, head_size=small.head_size,
            dim_att=int(sizes.get("dim_att", 0)), dim_ffn=int(sizes.get("dim_ffn", 0)),
        )
        wider = {name: max(getattr(drawn, name), getattr(small, name)) for name in _RANKS}
        for name in ("dim_att", "dim_ffn"):
            wider[name] = sizes.get(name, max(getattr(drawn, name), getattr(small, name)))
        wanted |= wider
    grown = replace(small, **wanted)
    smaller = [item.name for item in fields(small) if isinstance(wanted[item.name], int)
               and wanted[item.name] < getattr(small, item.name)]
    if smaller:
        raise UserError(
            f"--load_partial 1 makes models larger, and {source} is larger than the sizes asked for",
            found=", ".join(f"--{name} {wanted[name]}" for name in smaller),
            expected=", ".join(f"{getattr(small, name)} or more" for name in smaller),
        )
    return grown


def grow(small: Mapping[str, Tensor], drawn: Mapping[str, Tensor], source: str) -> tuple[dict[str, Tensor], Growth]:
    """Put the tensors of a smaller model into initial weights of a larger one.

    Args:
        small: tensors by official names.
        drawn: initial weights; the result has their dtype.
        source: how messages name the smaller model's file.
    Returns: new tensors, and what came from where.
    Raises: UserError if a tensor has no place in the larger model, or nothing fits.
    """
    left = [name for name in small if name not in drawn and name != COPY_MASK]
    if left:
        raise UserError(f"{source} has tensors that the larger model has no place for",
                        found=", ".join(left[:4]) + (f", and {len(left) - 4} more" if len(left) > 4 else ""))
    grown: dict[str, Tensor] = {}
    whole: list[str] = []
    partly: list[str] = []
    anew: list[str] = []
    taken = 0
    for name, initial in drawn.items():
        if name not in small:
            grown[name] = initial
            anew.append(name)
            continue
        grown[name], is_whole = _placed(small[name], initial, f"{source}: {name}")
        (whole if is_whole else partly).append(name)
        taken += small[name].numel()
    if not taken:
        raise UserError(f"nothing in {source} fits the larger model", expected="a checkpoint with tensors of its names")
    return grown, Growth(whole, partly, anew, taken, sum(tensor.numel() for tensor in drawn.values()))


def _placed(source: Tensor, initial: Tensor, what: str) -> tuple[Tensor, bool]:
    """``initial`` with ``source`` in its corner, and whether nothing else is left of it."""
    if source.numel() == initial.numel():
        return source.to(initial.dtype).reshape(initial.shape).clone(), True
    if source.dim() != initial.dim() or any(a > b for a, b in zip(source.shape, initial.shape, strict=True)):
        raise UserError(f"{what} does not fit the larger model", found=tuple(source.shape),
                        expected=f"at most {tuple(initial.shape)}")
    placed = initial.clone()
    placed[tuple(slice(size) for size in source.shape)] = source.to(initial.dtype)
    return placed, False
