"""Where a training run begins: a given checkpoint, initial weights, or the newest checkpoint of RWKV-LM's stages."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch

from rwkvpeft.checkpoints.adapter import Recipe, load_recipe, save_recipe
from rwkvpeft.checkpoints.files import MappedTensors, load_tensors, save_tensors
from rwkvpeft.checkpoints.grow import grow, grown_shape
from rwkvpeft.checkpoints.quantised import Quantisation, model_fingerprint, refuse_quantised
from rwkvpeft.cli.assemble import Base, open_base
from rwkvpeft.config.check_pretraining import draws_weights
from rwkvpeft.config.groups import ModelConfig, TrainConfig
from rwkvpeft.data.text import data_tokenizer, keep_vocabulary
from rwkvpeft.errors import UserError
from rwkvpeft.models.shape import ModelShape, new_shape, read_shape
from rwkvpeft.registry import MODELS, find
from rwkvpeft.training.devices import COMPUTE_DTYPES
from rwkvpeft.training.resume import ResumePoint, find_point

INITIAL = "rwkv-init.pth"
_BEFORE_THE_FIRST = -1
_SIZES = ("n_layer", "n_embd", "vocab_size", "dim_att", "dim_ffn", "pre_ffn", "head_qk")
_STAGE_WARMUP = 10
# of RWKV-LM's v5 and v6 trainer in stage 3
_LONG_WARMUP = 30


class NewModel(NamedTuple):
    """A model that is still to be drawn, and where it will stand. ``small`` is the file it grows from, or empty."""

    path: Path
    shape: ModelShape
    dtype: torch.dtype
    seed: int
    small: str

    def write(self, config: TrainConfig, report: Callable[[str], None]) -> Base:
        """Draw the weights and write them with a recipe beside them, which tells that they are this toolkit's.

        Returns: the base they are from now on.
        Raises: UserError if a file cannot be written.
        """
        report(f"drawing initial weights, seed {self.seed}; large models take minutes")
        weights = draw_weights(self.shape, self.dtype, self.seed)
        if self.small:
            weights, growth = grow(MappedTensors(self.small), weights, self.small)
            for line in growth.lines(self.small):
                report(line)
        keep_vocabulary(config.data)
        save_tensors(self.path, weights)
        del weights
        recipe = Recipe(
            method="none", base_model=self.path.name, base_fingerprint=model_fingerprint(self.path),
            version=self.shape.version, shape=asdict(self.shape), tokenizer=config.data.tokenizer,
            ctx_len=config.data.ctx_len, head_size_divisor=config.model.head_size_divisor,
        )
        save_recipe(self.path, recipe)
        report(f"wrote {self.path}")
        return open_base(replace(config.model, load_model=str(self.path), load_partial=0))


class Beginning(NamedTuple):
    """What a run begins with.

    ``config`` has the file and the warm-up that were found; ``base`` has no tensors while ``new`` says what is to be
    drawn; ``origin`` is for the start report; ``begun`` counts the mini-epochs that earlier stages have done.
    """

    config: TrainConfig
    base: Base
    origin: str
    new: NewModel | None = None
    begun: int = 0


def draw_weights(shape: ModelShape, dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    """Initial weights as RWKV-LM's trainer of the version draws them. The seed decides all of them.

    v7 is drawn as RWKV-v7/train_temp does; the RWKV-v5 folder has other low-rank widths for it, and is equal otherwise.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        weights: dict[str, torch.Tensor] = find(MODELS, shape.version, flag="--my_testing").initial_weights(shape)
    return {name: tensor.to(dtype) for name, tensor in weights.items()}


def find_beginning(config: TrainConfig, report: Callable[[str], None], *, first_process: bool) -> Beginning:
    """Decide what the run begins with. Writes nothing.

    Args:
        report: takes a line for the user.
        first_process: whether this process may draw weights; the others find them written.
    Raises: UserError if there is nothing to begin with, it does not fit the sizes that were typed, or a file that is
        not this toolkit's would be overwritten.
    """
    if config.schedule.train_stage >= 2:
        return _stage_beginning(config, report)
    if draws_weights(config):
        return _new_beginning(config, first_process)
    return Beginning(config, open_base(config.model), "")


def planned_shape(config: TrainConfig) -> tuple[ModelShape, Quantisation]:
    """Shape and storage of the model a run would begin with, as far as files and typed sizes tell them.

    Raises: UserError if neither does.
    """
    if config.model.load_model and not draws_weights(config):
        base = open_base(config.model)
        return base.shape, base.packed
    return _new_shape(config), Quantisation()


def _new_beginning(config: TrainConfig, first_process: bool) -> Beginning:
    path = Path(config.output.proj_dir) / INITIAL
    small = config.model.load_model if config.model.load_partial else ""
    written = replace(config.model, load_model=str(path), load_partial=0)
    goes_on = config.schedule.train_stage == 0 and find_point(config.output, _silent) is not None
    if path.is_file() and (goes_on or not first_process):
        there = replace(config, model=written)
        return Beginning(there, open_base(there.model), "from scratch")
    shape = _new_shape(config)
    if path.exists() and not _is_ours(path):
        raise UserError(
            f"{path} would be overwritten, and this toolkit did not write it",
            fix=f"--train_stage 3 (or --load_model {path}) to train it; otherwise remove it or take another --proj_dir",
        )
    if small:
        with torch.device("meta"):
            outline = find(MODELS, shape.version, flag="--my_testing").initial_weights(shape)
        # what does not fit is refused before anything is drawn
        grow(MappedTensors(small).outline, outline, small)
    dtype = COMPUTE_DTYPES[config.runtime.precision or "fp32"]
    new = NewModel(path, shape, dtype, config.runtime.random_seed, small)
    origin = f"from scratch, initial weights with seed {new.seed}" if not small else f"grown from {small}"
    base = Base(str(path), shape, {}, {}, Quantisation())
    return Beginning(replace(config, model=written), base, origin, new)


def _is_ours(path: Path) -> bool:
    """Whether the initial weights are those that this toolkit wrote there."""
    recipe = load_recipe(path)
    return recipe is not None and recipe.base_fingerprint == model_fingerprint(path)


def _silent(line: str) -> None:
    """Broken resume points are reported where the run is taken up."""


def _new_shape(config: TrainConfig) -> ModelShape:
    model = config.model
    if model.load_partial:
        tensors = MappedTensors(model.load_model)
        refuse_quantised(tensors, model.load_model, "growing")
        typed = {name: getattr(model, name) for name in _SIZES if getattr(model, name) is not None}
        for name, field in (("my_testing", "version"), ("head_size_a", "head_size")):
            if getattr(model, name) is not None:
                typed[field] = getattr(model, name)
        return grown_shape(read_shape(tensors.outline, model.load_model), typed, model.load_model)
    version, n_layer, n_embd = model.my_testing, model.n_layer, model.n_embd
    if not version or not n_layer or not n_embd:
        missing = [f"--{name}" for name in ("my_testing", "n_layer", "n_embd") if not getattr(model, name)]
        raise UserError(
            "the model's sizes are not known",
            found=f"neither --load_model nor {', '.join(missing)}",
            fix="--load_model FILE, or --my_testing x070 --n_layer 32 --n_embd 2560 --vocab_size 65536",
        )
    return new_shape(
        version,
        n_layer=n_layer,
        n_embd=n_embd,
        vocab_size=model.vocab_size or data_tokenizer(config.data).vocab_size,
        head_size=model.head_size_a or 64,
        dim_att=model.dim_att or 0,
        dim_ffn=model.dim_ffn or 0,
        pre_ffn=model.pre_ffn or 0,
        head_qk=model.head_qk or 0,
    )


def _stage_beginning(config: TrainConfig, report: Callable[[str], None]) -> Beginning:
    """The run that a resume point interrupted, or else the newest checkpoint that can be read."""
    folder, stage = Path(config.output.proj_dir), config.schedule.train_stage
    found = sorted(_numbered(folder), reverse=True)
    if not found:
        raise UserError(
            f"--train_stage {stage} finds no checkpoint to begin with",
            found=f"no {INITIAL} and no rwkv-N.pth in {folder}",
            fix="--train_stage 1 with the model's sizes first, or copy a model there as rwkv-init.pth",
        )
    point = find_point(config.output, _silent)
    if point is not None:
        begun = _begun_with(point, stage, found)
        if begun is not None:
            return _at(config, *begun)
        report(
            f"{point.path} belongs to another stage or to a first file that is not there any more: beginning with the "
            "newest checkpoint"
        )
        config = replace(config, output=replace(config.output, resume="none"))
    for number, path in found:
        try:
            load_tensors(path)
        except UserError as reason:
            report(f"warning: {path} is broken and passed over ({reason.found or reason.what})")
            continue
        return _at(config, number, path)
    raise UserError(f"no checkpoint in {folder} can be read", found=", ".join(path.name for _, path in found))


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """Whole models by the last mini-epoch they have been through; initial weights have been through none."""
    checkpoints = []
    for path in folder.glob("rwkv-*.pth"):
        number = re.fullmatch(r"rwkv-(\d+)\.pth", path.name)
        if number is not None:
            checkpoints.append((int(number[1]), path))
        elif path.name == INITIAL:
            checkpoints.append((_BEFORE_THE_FIRST, path))
    return checkpoints


def _begun_with(point: ResumePoint, stage: int, found: list[tuple[int, Path]]) -> tuple[int, Path] | None:
    """The checkpoint that the interrupted run of this stage began with; None if it is not there."""
    if point.essentials.get("train_stage") != stage:
        return None
    number = int(point.essentials["mini-epochs before"]) - 1
    for candidate, path in found:
        if candidate == number and model_fingerprint(path) == point.essentials["base model"]:
            return candidate, path
    return None


def _at(config: TrainConfig, number: int, path: Path) -> Beginning:
    schedule = config.schedule
    model: ModelConfig = replace(config.model, load_model=str(path))
    base = open_base(model)
    warmup = schedule.warmup_steps
    if number != _BEFORE_THE_FIRST and warmup is not None and warmup < 0:
        warmup = _LONG_WARMUP if schedule.train_stage == 3 and base.shape.version != "x070" else _STAGE_WARMUP
    begun = number + 1
    origin = f"stage {schedule.train_stage}, " + (f"mini-epoch {begun} on" if begun else "initial weights")
    config = replace(config, model=model, schedule=replace(schedule, warmup_steps=warmup))
    return Beginning(config, base, origin, begun=begun)
