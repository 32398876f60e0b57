"""Layer profiles: each layer, and the embedding and the head, with its own method, rank and learning rates.

A row (``config/layer_profile.py``) decides about a tensor by the start of its name: the row of its layer whose part
fits best, else the row for every layer. As in RWKV-LM-RLHF (main/train.py, main/src/model.py), ``blocks.0.ln0`` goes
with the embedding where that is trained and with layer 0 otherwise, and ``ln_out`` with the head; in a layer with an
adapter its norms and time parameters are trained too, here those of ``--train_parts``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from rwkvpeft.adapters.base import Adapter, Rates
from rwkvpeft.adapters.combined import CombinedAdapter
from rwkvpeft.adapters.state import BESIDE_OTHERS, StateAdapter
from rwkvpeft.adapters.targets import DEFAULT_TARGETS
from rwkvpeft.adapters.trained_parts import UNREAD, TrainedParts
from rwkvpeft.config.findings import Findings
from rwkvpeft.config.layer_profile import (
    EVERY_LAYER,
    LINEAR_MODES,
    LayerRow,
    layer_ranges,
    rows_from_plain,
    to_plain,
)
from rwkvpeft.errors import UserError
from rwkvpeft.models.names import is_large_linear
from rwkvpeft.registry import ADAPTERS, find

_IN_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_STATE = re.compile(r"blocks\.(\d+)\.(att|ffn|ffnPre)\.(time|shift)_state")
_LORA = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
# bone and disha have no dropout: upstream's files fill the cell for them too, and upstream never reads it
_SETTINGS = {"lora": _LORA, "dora": _LORA, "miss": {"rank": "r", "dropout": "miss_dropout"}}
_RANK_ALONE = {"rank": "r"}


class LayerPlan:
    """Which row decides about a tensor.

    Args:
        rows: no two of them for the same part of the same layer.
    """

    def __init__(self, rows: Iterable[LayerRow]) -> None:
        self.rows = list(rows)
        self._by_layer: dict[str, list[LayerRow]] = {}
        for row in self.rows:
            self._by_layer.setdefault(row.layer, []).append(row)

    def row_of(self, name: str) -> LayerRow | None:
        """The row for a tensor or a module by its path in the model; None if no row names it: it stays frozen."""
        found = _IN_BLOCK.fullmatch(name)
        emb = self._whole("emb")
        if found is None:
            return emb if name.startswith("emb.") else self._whole("head")
        layer, rest = found.groups()
        if layer == "0" and rest.startswith("ln0.") and emb is not None and emb.mode == "full":
            return emb
        fitting = [row for row in self._of_layer(layer) if not row.part or f"{rest}.".startswith(f"{row.part}.")]
        return max(fitting, key=lambda row: len(row.part), default=None)

    def state_row(self, layer: int | str) -> LayerRow | None:
        """The row that has a layer's initial memory trained, if there is one."""
        whole = (row for row in self._of_layer(str(layer)) if not row.part)
        return next((row for row in whole if row.trains_state), None)

    def adapter_row(self, path: str) -> LayerRow | None:
        """The row that puts an adapter on the linear at ``path``, if there is one."""
        name = f"{path}.weight"
        if not is_large_linear(name) and path != "head":
            return None
        row = self.row_of(name)
        return row if row is not None and row.mode in LINEAR_MODES and not _is_rejected(row, name) else None

    def trains(self, name: str, parts: Callable[[str], bool]) -> bool:
        """Whether the base's own parameter ``name`` is trained; ``parts`` tells what is beside an adapter."""
        row = self.row_of(name)
        if row is None or _is_rejected(row, name) or UNREAD.match(name) or _STATE.fullmatch(name):
            return False
        return row.mode == "full" or (row.mode in LINEAR_MODES and parts(name))

    def _whole(self, layer: str) -> LayerRow | None:
        return next(iter(self._by_layer.get(layer, ())), None)

    def _of_layer(self, layer: str) -> Sequence[LayerRow]:
        return self._by_layer.get(layer, self._by_layer.get(EVERY_LAYER, []))

    def check_layers(self, n_layer: int) -> None:
        """Compare the rows with the number of layers of a model.

        Raises: UserError naming layers that the model lacks, and those without a row.
        """
        named = {int(layer) for layer in self._by_layer if layer.isdigit()}
        findings = Findings()
        if beyond := sorted(layer for layer in named if layer >= n_layer):
            findings.add(f"the layer profile is made for {beyond[-1] + 1} layers, and the model has {n_layer}",
                         found=f"rows for layers {layer_ranges(beyond)}", expected=f"layers 0-{n_layer - 1}")
        missing = sorted(set(range(n_layer)) - named)
        if missing and EVERY_LAYER not in self._by_layer:
            findings.add(f"the layer profile lacks layers of this model, which has {n_layer}",
                         found=f"no row for {layer_ranges(missing)}", fix="a row for each, or one with layer default")
        findings.raise_any()

    def check_names(self, names: Collection[str]) -> None:
        """Compare parts and rejected words with the names of a model's parameters.

        Raises: UserError naming those that fit none: a word that rejects nothing is a slip.
        """
        findings = Findings()
        rests = {f"{found[2]}." for name in names if (found := _IN_BLOCK.fullmatch(name))}
        parts = dict.fromkeys(row.part for row in self.rows if row.part)
        strange = [part for part in parts if not any(rest.startswith(f"{part}.") for rest in rests)]
        findings.check(not strange, "the layer profile names parts that this model does not have", found=strange)
        words = dict.fromkeys(word for row in self.rows for word in row.reject)
        strange = [word for word in words if not any(word in name for name in names)]
        findings.check(not strange, "the layer profile rejects what this model does not have", found=strange,
                       fix="leave it out")
        findings.raise_any()


def _is_rejected(row: LayerRow, name: str) -> bool:
    return any(word in name for word in row.reject)


class ProfileParts(TrainedParts):
    """The base parameters a profile trains: whole layers in full, and ``--train_parts`` beside adapters.

    Raises: UserError for parts that have rows of their own.
    """

    def __init__(self, plan: LayerPlan, parts: Iterable[str]) -> None:
        super().__init__(parts)
        if tables := [name for name in self.names if name in ("emb", "head")]:
            raise UserError(f"--train_parts {tables[0]} has no effect beside a layer profile",
                            fix=f"a row in the profile: layer {tables[0]}, mode full")
        self._plan = plan

    def includes(self, name: str) -> bool:
        """Whether the base parameter ``name`` is trained."""
        return self._plan.trains(name, super().includes)

    def check(self, chosen: Collection[str]) -> None:
        """Nothing: a profile of full and frozen layers leaves nothing to ``--train_parts``."""


class LayerStates(StateAdapter):
    """A trained start in those layers whose row asks for it."""

    def __init__(self, plan: LayerPlan) -> None:
        super().__init__()
        self._plan = plan

    def layers(self, n_layer: int) -> list[int]:
        """The layers whose start is trained."""
        return [layer for layer in range(n_layer) if self._plan.state_row(layer) is not None]


class ProfileAdapter(CombinedAdapter):
    """One adapter for each method and rank in the rows, initial memories, and base parameters trained in full.

    Args:
        rows: of a layer profile.
        train_parts: base parameters trained in the layers that have an adapter: time, ln.
    """

    def __init__(self, rows: Sequence[LayerRow], train_parts: Iterable[str] = ()) -> None:
        self.plan = LayerPlan(rows)
        self._states = LayerStates(self.plan)
        self._adapters: dict[tuple[Any, ...], Adapter] = {}
        for row in rows:
            if row.mode in LINEAR_MODES and _key(row) not in self._adapters:
                self._adapters[_key(row)] = _make(row)
        members = [*self._adapters.values(), self._states]
        super().__init__("profile", members, {"rows": to_plain(rows)})
        self.parts = ProfileParts(self.plan, train_parts)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], train_parts: Iterable[str] = ()) -> ProfileAdapter:
        """Build it again from what a recipe holds.

        Raises: UserError if the rows are not those of a layer profile.
        """
        return cls(rows_from_plain(settings.get("rows")), train_parts)

    def insert(self, model: nn.Module) -> None:
        """Wrap the linears that an adapter's row chooses, and add the states.

        Raises: UserError if the rows do not fit the model.
        """
        shape: Any = model.shape
        self.plan.check_layers(shape.n_layer)
        linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
        # a quantised linear has no parameter to find its weight's name by
        weights = {f"{path}.weight" for path in linears}
        self.plan.check_names(weights | {name for name, _ in model.named_parameters()})
        for member in self._adapters.values():
            paths = [path for path in linears if self._owner(path) is member]
            if paths:
                member.config = replace(member.config, target_modules=paths)
                member.insert(model)
        self._states.insert(model)

    def _owner(self, path: str) -> Adapter | None:
        """The adapter on the linear at ``path``."""
        row = self.plan.adapter_row(path)
        return None if row is None else self._adapters[_key(row)]

    def rates(self, name: str) -> Rates | None:
        """What the tensor's row says; a state learns at 1 to 0.01 where its row says nothing."""
        if state := _STATE.fullmatch(name):
            own = self.plan.state_row(state[1])
            return None if own is None else Rates(
                BESIDE_OTHERS["lr_init"] if own.state_lr_init is None else own.state_lr_init,
                BESIDE_OTHERS["lr_final"] if own.state_lr_final is None else own.state_lr_final,
                0.0,
            )
        row = self.plan.row_of(name)
        return None if row is None else Rates(row.lr_init, row.lr_final, row.weight_decay)

    # each tensor of a file goes to the one adapter its linear has: names are not enough to tell, as every LoRA of a
    # profile has its tensors named alike

    def rename(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each adapter renames its own."""
        renamed: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            owner = self._owner(name.rpartition(".")[0])
            renamed |= {name: tensor} if owner is None else owner.rename({name: tensor})
        return renamed

    def take_constants(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each adapter takes its own."""
        rest: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            owner = self._owner(name.rpartition(".")[0])
            rest |= {name: tensor} if owner is None else owner.take_constants({name: tensor})
        return rest

    def prepare(self, path: str, weight: Tensor) -> Tensor:
        """What the adapter of that linear wants."""
        owner = self._owner(path)
        return weight if owner is None else owner.prepare(path, weight)

    def sources(self, name: str) -> tuple[str, ...]:
        """See ``Adapter.sources``."""
        owner = self._owner(name.removesuffix(".weight"))
        return () if owner is None else owner.sources(name)

    def changes(self, name: str, shape: tuple[int, ...], tensors: Mapping[str, Tensor]) -> bool:
        """See ``Adapter.changes``."""
        owner = self._owner(name.removesuffix(".weight"))
        return owner is not None and owner.changes(name, shape, tensors)

    def merge(self, name: str, base: Tensor, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """See ``Adapter.merge``."""
        owner = self._owner(name.removesuffix(".weight"))
        return None if owner is None else owner.merge(name, base, tensors)


def _key(row: LayerRow) -> tuple[Any, ...]:
    return (row.mode, *sorted(_settings(row).items()))


def _settings(row: LayerRow) -> dict[str, Any]:
    names = _SETTINGS.get(row.mode, _RANK_ALONE)
    return {name: getattr(row, own) for own, name in names.items() if getattr(row, own) is not None}


def _make(row: LayerRow) -> Adapter:
    # all that a row may choose; which of them it does is known when the model is
    settings = {**_settings(row), "target_modules": [*DEFAULT_TARGETS, "head"]}
    adapter: Adapter = find(ADAPTERS, row.mode, flag="mode").from_settings(settings)
    return adapter
