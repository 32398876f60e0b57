"""Which tensors of a checkpoint are quantised while it is loaded, and files whose tensors are already.

In such a file a packed weight stands as ``<name>.<format>.<short name>``, as ``blocks.0.att.key.weight.nf4.codes``,
with its shape as ``<name>.<format>.shape``; all other tensors stand as in any checkpoint. ``quantised.fingerprint``
tells which model it was made of.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rwkvpeft.atomic import write_whole
from rwkvpeft.checkpoints.files import MappedTensors, fingerprint, is_zip, load_tensors, outline_of
from rwkvpeft.checkpoints.stream import Spec, write_tensors
from rwkvpeft.config.groups import MethodConfig
from rwkvpeft.errors import UserError
from rwkvpeft.models.names import is_large_linear
from rwkvpeft.models.shape import read_shape
from rwkvpeft.quantization.format import Format, build_format
from rwkvpeft.quantization.linear import QuantizedLinear

HEAD = "head.weight"
FINGERPRINT = "quantised.fingerprint"
_LONGEST_FINGERPRINT = 64
_PACKED = re.compile(r"(?P<weight>.+\.weight)\.(?P<format>int8|nf4|fp4|fp8)\.(?P<part>\w+)")


def _never(name: str) -> bool:
    return False


class Quantiser:
    """Quantises the large linears of a model, one at a time.

    Args:
        quant: a name of ``registry.FORMATS``.
        double: whether the scales are quantised too; nf4 and fp4 only.
        head: whether the head is quantised beside the blocks' linears.
        device: where weights are quantised.
        keep: tells the names of weights that are trained themselves and stay as they are.
    Raises: UserError if the format is unknown or cannot do ``double``.
    """

    def __init__(
        self,
        quant: str = "nf4",
        double: bool = False,
        head: bool = False,
        device: torch.device | str = "cpu",
        keep: Callable[[str], bool] = _never,
    ) -> None:
        self.quant = quant
        self.double = double
        self.head = head
        self.device = torch.device(device)
        self.keep = keep
        self.format: Format = build_format(quant, double=double)

    def takes(self, name: str) -> bool:
        """Whether the checkpoint's tensor ``name`` is quantised."""
        return (is_large_linear(name) or (self.head and name == HEAD)) and not self.keep(name)

    def module(self, name: str, weight: Tensor) -> QuantizedLinear:
        """The linear in whose place the checkpoint's tensor ``name``, (out, in), is; on ``device``.

        Raises: UserError if it holds NaN or infinity.
        """
        return QuantizedLinear.from_weight(weight.to(self.device), self.format, name=name)

    def round_trip(self, name: str, weight: Tensor) -> Tensor:
        """What the tensor ``name``, (out, in), becomes by being quantised and dequantised: fp32, on its own device."""
        packed = self.format.quantize(weight.to(self.device), name=name)
        out_features, in_features = weight.shape
        return self.format.dequantize(packed, (out_features, in_features), torch.float32).to(weight.device)


class PackedWeight(NamedTuple):
    """Where a quantised file has the parts of one weight."""

    format: Format
    shape: tuple[int, int]
    prefix: str

    def read(self, tensors: Mapping[str, Tensor]) -> QuantizedLinear:
        """The linear, with tensors of its own."""
        packed = {part: tensors[self.prefix + part].clone() for part in self.format.layout(self.shape)}
        return QuantizedLinear(self.shape[1], self.shape[0], self.format, packed)


def find_packed(tensors: Mapping[str, Tensor], source: str) -> dict[str, PackedWeight]:
    """The packed weights of a file by the weight's name; none for an ordinary checkpoint.

    Args:
        source: how messages name the file.
    Raises: UserError if parts of a weight are missing or of another size.
    """
    parts: dict[tuple[str, str], set[str]] = {}
    for name in tensors:
        if found := _PACKED.fullmatch(name):
            parts.setdefault((found["weight"], found["format"]), set()).add(found["part"])
    if not parts:
        return {}
    outline = outline_of(tensors)
    packed = {}
    for (weight, kind), names in parts.items():
        prefix = f"{weight}.{kind}."
        format = build_format(kind, double="scale_codes" in names)
        told = outline.get(prefix + "shape")
        usable = told is not None and told.dtype == torch.int64 and tuple(told.shape) == (2,)
        shape = tuple(tensors[prefix + "shape"].tolist()) if usable else ()
        layout = format.layout(shape) if len(shape) == 2 and min(shape) > 0 else {}
        found_layout = {part: (tuple(outline[prefix + part].shape), outline[prefix + part].dtype) for part in names}
        found_layout.pop("shape", None)
        if not layout or found_layout != layout:
            raise UserError(f"{source} does not hold all of {weight}", found=sorted(names), expected=[*layout, "shape"],
                            fix="quantise the model again with this version: python -m rwkvpeft.quantize")
        packed[weight] = PackedWeight(format, shape, prefix)
    return packed


def model_outline(tensors: Mapping[str, Tensor], packed: Mapping[str, PackedWeight]) -> dict[str, Tensor]:
    """Shapes and dtypes of the model a file holds, packed weights under their own names, as tensors without data."""
    plain = {
        name: tensor for name, tensor in outline_of(tensors).items()
        if not _PACKED.fullmatch(name) and name != FINGERPRINT
    }
    return plain | {name: torch.empty(weight.shape, device="meta") for name, weight in packed.items()}


class Quantisation(NamedTuple):
    """How a model's large linears are stored, in the words of ``--quant``, ``--quant_double`` and ``--quant_head``."""

    quant: str = "none"
    double: bool = False
    head: bool = False


def quantisation_of(packed: Mapping[str, PackedWeight]) -> Quantisation:
    """How the weights of a quantised file are stored; ``none`` for an ordinary checkpoint."""
    for weight in packed.values():
        return Quantisation(weight.format.name, weight.format.is_double, HEAD in packed)
    return Quantisation()


def quantisation_in_run(method: MethodConfig, packed: Quantisation) -> Quantisation:
    """How a run stores the large linears: as its flags say, or as a quantised base (``packed``) has them already."""
    asked = Quantisation(method.quant, method.quant_double, method.quant_head)
    return packed if asked.quant == "none" else asked._replace(head=asked.head or packed.head)


def model_fingerprint(path: Path | str) -> str:
    """``files.fingerprint`` of a checkpoint; for a quantised one, that of the model it was made of.

    Adapters trained on either can thus be used with both, and merged into the original.
    """
    try:
        told = load_tensors(path).get(FINGERPRINT) if is_zip(path) else None
    except UserError:
        # whatever is wrong with it as a checkpoint is for those to say who load it
        told = None
    if told is None or told.dtype != torch.uint8 or told.dim() != 1 or len(told) > _LONGEST_FINGERPRINT:
        return fingerprint(path)
    return bytes(told.tolist()).hex()


class QuantiseReport(NamedTuple):
    """How many weights were packed, and the sizes of both files in bytes."""

    packed: int
    source_bytes: int
    output_bytes: int


def quantise_file(source: Path | str, output: Path | str, quantiser: Quantiser) -> QuantiseReport:
    """Write a checkpoint with its large linears packed, tensor by tensor; all others as they are.

    ``load_model`` of the output gives the model that ``load_model`` of the source with ``quantiser`` gives. Memory is
    bounded by the largest tensor.
    Raises: UserError if the source is no model or quantised already, would be overwritten, holds NaN or infinity, or
        if the output cannot be written; nothing is left behind then.
    """
    source, output = Path(source), Path(output)
    if output.exists() and output.samefile(source):
        raise UserError("--output would overwrite the model", found=output, fix="choose another name for --output")
    tensors = MappedTensors(source)
    refuse_quantised(tensors, source, "quantising")
    read_shape(tensors.outline, str(source))
    specs, parts = _packed_specs(tensors.outline, quantiser)
    identity = torch.tensor(list(bytes.fromhex(fingerprint(source))), dtype=torch.uint8)
    specs[FINGERPRINT] = Spec(tuple(identity.shape), identity.dtype)
    current: dict[str, dict[str, Tensor]] = {}

    def produce(name: str) -> Tensor:
        if name == FINGERPRINT:
            return identity
        if name not in parts:
            return tensors[name]
        weight, part = parts[name]
        if part == "shape":
            return torch.tensor(tensors.outline[weight].shape)
        if weight not in current:
            # the parts of one weight come one after another: no more than one weight is held
            current.clear()
            current[weight] = quantiser.module(weight, tensors[weight]).packed()
        return current[weight][part]

    write_whole(output, lambda partial: write_tensors(partial, specs, produce))
    packed = {weight for weight, _ in parts.values()}
    return QuantiseReport(len(packed), source.stat().st_size, output.stat().st_size)


def _packed_specs(
    outline: Mapping[str, Tensor], quantiser: Quantiser
) -> tuple[dict[str, Spec], dict[str, tuple[str, str]]]:
    """What the file will hold, and for each part of a packed weight the weight's name and the part's."""
    specs: dict[str, Spec] = {}
    parts: dict[str, tuple[str, str]] = {}
    for name, tensor in outline.items():
        if not quantiser.takes(name):
            specs[name] = Spec(tuple(tensor.shape), tensor.dtype)
            continue
        out_features, in_features = tensor.shape
        layout = quantiser.format.layout((out_features, in_features))
        for part, (sizes, dtype) in {"shape": ((2,), torch.int64), **layout}.items():
            place = f"{name}.{quantiser.format.name}.{part}"
            specs[place] = Spec(sizes, dtype)
            parts[place] = (name, part)
    return specs, parts


def refuse_quantised(names: Iterable[str], path: Path | str, use: str) -> None:
    """Raises: UserError if the tensors of the file ``path`` are packed; ``use`` says what needs the original."""
    if any(_PACKED.fullmatch(name) for name in names):
        raise UserError(
            f"{path} is a quantised model, and {use} needs the original",
            fix="give the full-precision checkpoint it was made of",
        )
