"""MiSS, earlier named Bone and DiSHA; and Bat, the form of Bone that multiplies the weight.

Source: Kang and Yin, MiSS (arXiv 2409.15371). MiSS adds one small shard D to all column blocks of the weight:
``W'[o, i] = W[o, i] + D[i mod r, o]``; the last block may be cut short. Names in files: ``...key.miss`` (r, out);
RWKV-PEFT writes ``.disha``, earlier ``.bone``. With ``mini_r`` the shard is (r, mini_r) and repeated over the outputs.

Bat cuts the weight into r x r blocks and changes each by the block D[b] of its column:
``W'[a, b] = W[a, b] + W[a, b] D[b] + D[b]``. In files (in / r, r, r). (Hugging Face peft's "bat" takes the block of the
row instead; the two are not interchangeable.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkvpeft.adapters.base import Adapter
from rwkvpeft.adapters.frozen_products import fold, is_frozen, with_shard
from rwkvpeft.adapters.linear import AdaptedLinear, LinearAdapter
from rwkvpeft.adapters.settings import BatConfig, MissConfig
from rwkvpeft.adapters.targets import device_of
from rwkvpeft.errors import UserError

_STRIP_ROWS = 512
_FOREIGN = {"disha": "miss", "bone": "miss"}


class MissLinear(AdaptedLinear):
    """``base(x) + shards(x) D``, where ``shards(x)`` (..., r) sums the input channels that are r apart.

    Args:
        base: the frozen linear.
        rank: r, rows of D.
        columns: columns of D, a divisor of the outputs; D is repeated over them.
        dropout: of the update's input.
    """

    def __init__(self, base: nn.Linear, rank: int, columns: int, dropout: float = 0.0) -> None:
        super().__init__(base)
        self.dropout = dropout
        self.miss = nn.Parameter(torch.zeros(rank, columns, device=device_of(base), dtype=torch.float32))

    def adapted(self, x: Tensor) -> Tensor:
        """Base and update. With dropout or a trained base this is left to autograd, which keeps more."""
        rank, columns = self.miss.shape
        if is_frozen(self.base) and not (self.training and self.dropout):
            return with_shard(self.base, x, self.miss)
        x_in = F.dropout(x, self.dropout, self.training)
        shards = fold(x_in.reshape(-1, self.in_features), rank).view(*x.shape[:-1], rank)
        update = shards @ self.miss.to(x.dtype)
        if columns != self.out_features:
            update = torch.cat([update] * (self.out_features // columns), dim=-1)
        return cast(Tensor, self.base(x) + update)


class MissAdapter(LinearAdapter):
    """MiSS on the large linears of the blocks."""

    name: ClassVar[str] = "miss"
    Config = MissConfig
    aliases: ClassVar[Mapping[str, str]] = {"bone_r": "r", "dropout": "miss_dropout"}
    parts_of_linear: ClassVar[tuple[str, ...]] = ("miss",)
    foreign_parts: ClassVar[Mapping[str, str]] = _FOREIGN
    config: MissConfig

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], train_parts: Iterable[str] = ()) -> Adapter:
        """See ``Adapter.from_settings``; Hugging Face peft's ``init_weights`` is understood where it can be."""
        own = dict(settings)
        start = own.pop("init_weights", True)
        if start == "bat":
            raise UserError(
                "init_weights bat is Hugging Face's form of Bat, whose blocks go by output rows",
                fix="--peft bat (RWKV-PEFT's form, blocks by input columns)",
            )
        if start not in (True, "mini"):
            raise UserError("MiSS starts from zero, so that the first step begins at the base model",
                            found=f"init_weights {start}", fix="leave init_weights out")
        return super().from_settings(own, train_parts)

    def make_layer(self, path: str, base: nn.Linear) -> AdaptedLinear:
        """See ``LinearAdapter.make_layer``."""
        config = self.config
        columns = config.mini_r or base.out_features
        if base.out_features % columns:
            raise UserError(f"MiSS's mini_r does not divide the outputs of {path}", found=columns,
                            expected=f"a divisor of {base.out_features}")
        return MissLinear(base, config.r, columns, float(config.miss_dropout))

    @classmethod
    def recognises(cls, tensors: Mapping[str, Tensor]) -> bool:
        """The shards have two axes."""
        shards = _shards(tensors)
        return bool(shards) and all(tensor.dim() == 2 for tensor in shards)

    def expected_shapes(self, out: int, in_: int, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """See ``LinearAdapter.expected_shapes``. Fewer columns than outputs are MiSS's mini form."""
        shape = tensors["miss"].shape
        mini = len(shape) == 2 and 0 < shape[1] < out and out % shape[1] == 0
        return {"miss": (shape[0], shape[1] if mini else out)}

    def merged_weight(self, path: str, base: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """``W[o, i] + D[i mod r, o mod columns]``."""
        shard = tensors["miss"]
        rank, columns = shard.shape
        out, in_ = base.shape
        for start in range(0, in_, rank):
            width = min(rank, in_ - start)
            for row in range(0, out, columns):
                base[row : row + columns, start : start + width] += shard[:width].T
        return base


class BatLinear(AdaptedLinear):
    """``base(x + z) + tiled(sum of z's blocks)`` with ``z_b = D[b] x_b``: the product with W', never forming it.

    Args:
        base: the frozen linear.
        rank: r, the size of the blocks; it divides both sizes.
    """

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__(base)
        blocks = self.in_features // rank
        self.miss = nn.Parameter(torch.zeros(blocks, rank, rank, device=device_of(base), dtype=torch.float32))

    def adapted(self, x: Tensor) -> Tensor:
        """The output of the changed weight."""
        rank = self.miss.shape[-1]
        turned = torch.einsum("...bj,bij->...bi", x.unflatten(-1, (-1, rank)), self.miss.to(x.dtype))
        added = torch.cat([turned.sum(-2)] * (self.out_features // rank), dim=-1)
        return cast(Tensor, self.base(x + turned.flatten(-2)) + added)


class BatAdapter(LinearAdapter):
    """Bat on the large linears of the blocks."""

    name: ClassVar[str] = "bat"
    Config = BatConfig
    aliases: ClassVar[Mapping[str, str]] = {"bone_r": "r"}
    parts_of_linear: ClassVar[tuple[str, ...]] = ("miss",)
    foreign_parts: ClassVar[Mapping[str, str]] = _FOREIGN
    config: BatConfig

    def make_layer(self, path: str, base: nn.Linear) -> AdaptedLinear:
        """See ``LinearAdapter.make_layer``."""
        rank = self.config.r
        if base.in_features % rank or base.out_features % rank:
            raise UserError(f"Bat's r does not divide both sizes of {path}", found=rank,
                            expected=f"a divisor of {base.out_features} and {base.in_features}")
        return BatLinear(base, rank)

    @classmethod
    def recognises(cls, tensors: Mapping[str, Tensor]) -> bool:
        """The shards have three axes."""
        shards = _shards(tensors)
        return bool(shards) and all(tensor.dim() == 3 for tensor in shards)

    def rank_of(self, tensor: Tensor) -> int:
        """The blocks are square."""
        return tensor.shape[-1]

    def expected_shapes(self, out: int, in_: int, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """See ``LinearAdapter.expected_shapes``."""
        rank = tensors["miss"].shape[-1]
        return {"miss": (in_ // rank, rank, rank)} if not (in_ % rank or out % rank) else {}

    def merged_weight(self, path: str, base: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """``W + W D[b] + D[b]``, a strip of rows at a time to save memory."""
        blocks = tensors["miss"].unsqueeze(1)
        rank = blocks.shape[-1]
        for strip in base.split(max(_STRIP_ROWS // rank, 1) * rank):
            # (column block, row block, row, column)
            cut = strip.unflatten(0, (-1, rank)).unflatten(-1, (-1, rank)).permute(2, 0, 1, 3)
            change = torch.matmul(cut, blocks).add_(blocks)
            strip.add_(change.permute(1, 2, 0, 3).reshape(strip.shape))
        return base


def _shards(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    return [tensor for name, tensor in tensors.items() if name.endswith((".miss", ".disha", ".bone"))]
