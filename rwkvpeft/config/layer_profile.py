"""Layer profiles: a CSV or YAML file that gives each layer its method, rank and learning rates.

The columns are RWKV-LM-RLHF's (main/layerprofile), in any case, or this toolkit's shorter names for them. Columns of
our own: ``part``, so that a layer may have several rows, and ``state``, whether its initial memory is trained too.
Cells that a row's mode has no use for are passed over: upstream's files fill every cell of every row.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from rwkvpeft.config.findings import Findings, nearest
from rwkvpeft.config.yaml_text import parse_yaml
from rwkvpeft.errors import UserError
from rwkvpeft.reading import LARGEST_SETTINGS_BYTES, read_text
from rwkvpeft.registry import ADAPTERS

LINEAR_MODES = tuple(name for name in ADAPTERS if name != "state")
"""The modes that train an adapter on the layer's linears."""
MODES = ("full", "freeze", "state", *LINEAR_MODES)
EVERY_LAYER = "*"
"""The layer of a row for all numbered layers that have no row of their own."""

_LARGEST_RANK = 1 << 16
_SCALED = ("lora", "dora")
_COLUMNS = {
    "layer": "layer",
    "part": "part",
    "mode": "mode",
    "method": "mode",
    "rank": "rank",
    "r": "rank",
    "alpha": "alpha",
    "dropout": "dropout",
    "weight_lr_init": "lr_init",
    "lr_init": "lr_init",
    "weight_lr_final": "lr_final",
    "lr_final": "lr_final",
    "weight_decay": "weight_decay",
    "state": "state",
    "state_lr_init": "state_lr_init",
    "state_lr_final": "state_lr_final",
    "rejectparts": "reject",
    "reject": "reject",
}
_TRUTHS = {"": False, "0": False, "false": False, "no": False, "1": True, "true": True, "yes": True}
_PART = re.compile(r"(att|ffn|ffnPre)(\.\w+)?|ln[012]")


@dataclass(frozen=True)
class LayerRow:
    """What happens to one layer, or to one part of it. None: the method's or the run's own value.

    ``layer`` is emb, a number, head or ``EVERY_LAYER``; ``part`` the start of its tensors' names within the layer, as
    att or att.key, empty for all that no other row names. Base parameters and linears whose names contain a word of
    ``reject`` are not trained.
    """

    layer: str
    mode: str
    part: str = ""
    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    lr_init: float | None = None
    lr_final: float | None = None
    weight_decay: float | None = None
    state: bool = False
    state_lr_init: float | None = None
    state_lr_final: float | None = None
    reject: tuple[str, ...] = ()

    @property
    def trains_state(self) -> bool:
        """Whether the layer's initial memory is trained."""
        return self.state or self.mode == "state"

    def plain(self) -> dict[str, Any]:
        """The row as plain values, those left out that are not set."""
        unset = {item.name: item.default for item in fields(self)}
        values = {name: value for name, value in asdict(self).items() if value != unset[name]}
        return {**values, "reject": list(self.reject)} if self.reject else values


class Record(NamedTuple):
    """One row as it was written, its cells by column; ``place`` is where it stands, for messages."""

    place: str
    cells: Mapping[str, Any]


def read_layer_profile(path: Path | str) -> list[LayerRow]:
    """Read a profile; a file named .yaml, .yml or .json is a list of rows, any other is CSV with a header.

    Returns: one row for each layer and part; ranges of layers are written out.
    Raises: UserError with every mistake of the file and its line.
    """
    path = Path(path)
    text = read_text(path, LARGEST_SETTINGS_BYTES, f"--layer_profile {path} cannot be read", "utf-8-sig")
    findings = Findings()
    is_yaml = path.suffix.lower() in (".yaml", ".yml", ".json")
    records = _yaml_records(text, path) if is_yaml else _csv_records(text, path, findings)
    return _rows(records, str(path), findings)


def rows_from_plain(records: object) -> list[LayerRow]:
    """The rows of a recipe, written by ``to_plain``.

    Raises: UserError with every mistake.
    """
    source = "rows of the layer profile"
    if not isinstance(records, list) or not all(isinstance(record, Mapping) for record in records):
        raise UserError(f"{source} cannot be used", found=type(records).__name__, expected="a list of rows")
    numbered = [Record(f"row {number}", record) for number, record in enumerate(records, start=1)]
    return _rows(numbered, source, Findings())


def to_plain(rows: Sequence[LayerRow]) -> list[dict[str, Any]]:
    """Rows as plain values for a recipe; equal neighbours become one row with a range of layers."""
    plain: list[dict[str, Any]] = []
    first, before = "", None
    for row in rows:
        follows = before is not None and replace(row, layer=before.layer) == before and before.layer.isdigit()
        if before is not None and follows and row.layer == str(int(before.layer) + 1):
            plain[-1]["layer"] = f"{first}-{row.layer}"
        else:
            plain.append(row.plain())
            first = row.layer
        before = row
    return plain


def with_states(rows: Sequence[LayerRow]) -> list[LayerRow]:
    """The same rows with every layer's initial memory trained, as upstream's ``--state 1``."""
    numbered = {row.layer for row in rows if row.layer not in ("emb", "head")}
    whole = {row.layer for row in rows if not row.part}
    trained = [replace(row, state=True) if row.layer in numbered and not row.part else row for row in rows]
    return [*trained, *(LayerRow(layer, "state") for layer in sorted(numbered - whole))]


def _csv_records(text: str, path: Path, findings: Findings) -> list[Record]:
    reader = csv.reader(io.StringIO(text), skipinitialspace=True)
    header: list[str] | None = None
    records = []
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells) or cells[0].lstrip().startswith("#"):
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                continue
            place = f"{path}:{reader.line_num}"
            if any(cell.strip() for cell in cells[len(header) :]):
                findings.add(f"{place} has more cells than there are columns", found=len(cells), expected=len(header),
                             fix='put a list in quotes: "att.key,att.value"')
            records.append(Record(place, dict(zip(header, cells, strict=False))))
    except csv.Error as reason:
        raise UserError(f"{path}:{reader.line_num}: {reason}", expected="a CSV file with a header") from reason
    return records


def _yaml_records(text: str, path: Path) -> list[Record]:
    try:
        values, lines = parse_yaml(text, str(path))
    except UserError as reason:
        raise UserError(reason.what, found=reason.found, fix='write "*" in quotes, or default',
                        expected="a list of rows, as - {layer: 0-11, mode: lora, rank: 16}") from reason
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise UserError(f"{path} is not a list of rows", found=type(values).__name__,
                        expected="- {layer: 0-11, mode: lora, rank: 16}")
    return [
        Record(f"{path}:{line}", {str(key): cell for key, cell in value.items()})
        for line, value in zip(lines, values, strict=True)
    ]


def _rows(records: Iterable[Record], source: str, findings: Findings) -> list[LayerRow]:
    rows: list[LayerRow] = []
    places: dict[tuple[str, str], str] = {}
    unknown: set[str] = set()
    for record in records:
        cells = _Cells(record, source, unknown, findings)
        row = cells.row()
        for layer in cells.layers():
            place = places.setdefault((layer, row.part), record.place)
            if place != record.place:
                of = f"part {row.part} of layer {layer}" if row.part else f"layer {layer}"
                findings.add(f"{record.place} names {of} again", found=f"it stands at {place} already")
            rows.append(replace(row, layer=layer))
    numbers = {int(row.layer) for row in rows if row.layer.isdigit()}
    gaps = sorted(set(range(max(numbers, default=0))) - numbers)
    if gaps and not any(row.layer == EVERY_LAYER for row in rows):
        findings.add(f"{source} lacks layers", found=f"no row for {layer_ranges(gaps)}",
                     fix="a row for each, or one with layer default")
    if not rows:
        findings.check(bool(findings.errors), f"{source} holds no row", expected="a header and a row for each layer")
    findings.raise_any()
    return rows


def layer_ranges(numbers: Sequence[int]) -> str:
    """Sorted layer numbers in short: 0-3, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


class _Cells:
    """Reads the cells of one row and notes what is wrong with them.

    Args:
        unknown: columns that have been complained of already.
    """

    def __init__(self, record: Record, source: str, unknown: set[str], findings: Findings) -> None:
        self._place = record.place
        self._findings = findings
        self._texts: dict[str, str] = {}
        for key, value in record.cells.items():
            name = _COLUMNS.get(key.strip().lower())
            if name is None:
                if key not in unknown:
                    findings.add(f"{source} has an unknown column", found=repr(key), expected=list(_COLUMNS),
                                 fix=nearest(key.lower(), _COLUMNS))
                unknown.add(key)
            elif name in self._texts:
                self._wrong(f"{name} is given twice", found=key)
            else:
                self._texts[name] = _as_text(value)

    def row(self) -> LayerRow:
        """The row, for layer "" at first."""
        layer, mode, part = self._text("layer").lower(), self._text("mode").lower(), self._text("part").lower()
        self._check_mode(mode, layer, part)
        rank = self._number("rank", least=0)
        misread = rank is None and bool(self._text("rank"))
        if rank is not None and rank > _LARGEST_RANK:
            self._wrong("the rank is too large", found=self._text("rank"), expected=f"at most {_LARGEST_RANK}")
        if mode in LINEAR_MODES and not misread and (not rank or rank != int(rank)):
            self._wrong(f"mode {mode} needs a rank", found=self._text("rank") or "none",
                        expected="a whole number from 1")
        alpha, dropout = self._number("alpha", least=0), self._number("dropout", least=0)
        if mode in _SCALED and alpha == 0:
            self._wrong("alpha must be above 0", found=self._text("alpha"))
        if dropout is not None and dropout >= 1:
            self._wrong("dropout is out of range", found=self._text("dropout"), expected="0 up to below 1")
        state = _TRUTHS.get(self._text("state").lower())
        if state is None:
            self._wrong("state is neither yes nor no", found=self._text("state"), expected=["yes", "no"])
        if (state or mode == "state") and (part or layer in ("emb", "head")):
            self._wrong("the initial memory belongs to a whole layer", found=f"layer {layer} {part}".strip(),
                        fix="set it in the layer's row without a part")
        rates = {name: self._number(name, least=0) for name in
                 ("lr_init", "lr_final", "weight_decay", "state_lr_init", "state_lr_final")}
        reject = tuple(word.strip() for word in self._text("reject").split(",") if word.strip())
        return LayerRow("", mode, part, None if rank is None else int(rank), alpha, dropout, state=bool(state),
                        reject=reject, **rates)

    def layers(self) -> list[str]:
        """The layers the row is for; none if its cell cannot be read."""
        text = self._text("layer").lower()
        if text in ("emb", "head"):
            return [text]
        if text in (EVERY_LAYER, "default"):
            return [EVERY_LAYER]
        found = re.fullmatch(r"(\d{1,4})(?:\s*-\s*(\d{1,4}))?", text)
        if found and int(found[1]) <= int(found[2] or found[1]):
            return [str(number) for number in range(int(found[1]), int(found[2] or found[1]) + 1)]
        self._wrong("the layer is none", found=text or "an empty cell",
                    expected=["emb", "a number", "0-11", "default or *", "head"])
        return []

    def _check_mode(self, mode: str, layer: str, part: str) -> None:
        if mode not in MODES:
            near = nearest(mode, MODES)
            self._wrong("the mode is unknown", found=mode or "an empty cell", expected=MODES, fix=near)
        elif layer == "emb" and mode not in ("full", "freeze"):
            self._wrong("the embedding is trained in full or not at all", found=mode, expected=["full", "freeze"])
        if part and layer in ("emb", "head"):
            self._wrong(f"{layer} has no parts", found=part)
        elif part and not _PART.fullmatch(part):
            self._wrong("the part is unknown", found=part, expected=["att", "ffn", "att.key", "ffn.value", "ln1"])

    def _text(self, name: str) -> str:
        return self._texts.get(name, "")

    def _number(self, name: str, *, least: float) -> float | None:
        text = self._text(name)
        if not text:
            return None
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < least:
            self._wrong(f"{name} is not a number from {least:g}", found=text)
            return None
        return value

    def _wrong(self, what: str, *, found: object = None, expected: object = None, fix: object = None) -> None:
        self._findings.add(f"{self._place}: {what}", found=found, expected=expected, fix=fix)


def _as_text(value: object) -> str:
    if value is None:
        return ""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value).strip()
