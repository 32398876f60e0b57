"""From settings to the parts of a run: base model, data, adapter, operator."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from rwkvpeft.adapters.base import Adapter
from rwkvpeft.adapters.build import build_adapter
from rwkvpeft.adapters.profile import ProfileAdapter
from rwkvpeft.checkpoints.adapter import Recipe, check_base, load_adapter
from rwkvpeft.checkpoints.files import MappedTensors, load_tensors, save_tensors
from rwkvpeft.checkpoints.load import Prepare, build_model, fill_model, operator_of
from rwkvpeft.checkpoints.quantised import (
    Quantisation,
    Quantiser,
    find_packed,
    model_fingerprint,
    model_outline,
    quantisation_in_run,
    quantisation_of,
)
from rwkvpeft.config.findings import Findings
from rwkvpeft.config.groups import MethodConfig, ModelConfig, RuntimeConfig, TrainConfig
from rwkvpeft.config.layer_profile import read_layer_profile, with_states
from rwkvpeft.config.resolve import Machine
from rwkvpeft.errors import UserError
from rwkvpeft.memory import (
    Expected,
    LevelChoice,
    NoOutline,
    Programs,
    check_memory,
    choose_level,
    expect_levels,
    free_memory,
)
from rwkvpeft.models.backbone import Rwkv
from rwkvpeft.models.recompute import LEVELS
from rwkvpeft.models.shape import ModelShape, read_shape
from rwkvpeft.ops.bench import Bench
from rwkvpeft.ops.block.choose import BlockChoice, choose_block_ops
from rwkvpeft.ops.block.contract import BlockOps
from rwkvpeft.ops.block.plain import PLAIN
from rwkvpeft.ops.choose import Choice, choose_backend
from rwkvpeft.ops.contract import Backend, Needs
from rwkvpeft.ops.cross_entropy import RowChoice
from rwkvpeft.ops.cross_entropy_choose import RowsChoice, choose_rows
from rwkvpeft.registry import BACKENDS, BLOCK_OPS, find
from rwkvpeft.training.devices import COMPUTE_DTYPES, find_device, local_device

# settings that change what an adapter's tensors compute and that the tensors do not tell
_SCALES = ("lora_alpha", "use_rslora")

# names of the block's operators, and of the loss's program, by --fused_kernel
_FUSED: dict[bool | None, RowChoice] = {None: "auto", True: "triton", False: "torch"}


@dataclass(frozen=True)
class Base:
    """A base checkpoint, mapped but not loaded."""

    path: str
    shape: ModelShape
    tensors: Mapping[str, torch.Tensor]
    outline: dict[str, torch.Tensor]
    """Shapes and dtypes of the model's tensors."""
    packed: Quantisation
    """How the file itself stores the large linears."""


def find_machine(accelerator: str) -> Machine:
    """What the run will compute on.

    Raises: UserError if a GPU is asked for and PyTorch sees none.
    """
    device_type = find_device(RuntimeConfig(accelerator=accelerator))
    if device_type == "cuda":
        return Machine(device_type, has_bf16=torch.cuda.is_bf16_supported())
    return Machine(device_type, has_bf16=device_type == "cpu")


def open_base(config: ModelConfig) -> Base:
    """Map the base checkpoint and compare it with the sizes that were typed.

    Raises: UserError if the file is not a model of ours, or naming each typed value beside the file's.
    """
    tensors = MappedTensors(config.load_model)
    packed = find_packed(tensors, config.load_model)
    outline = model_outline(tensors, packed)
    shape = read_shape(outline, config.load_model)
    told = {
        "my_testing": shape.version,
        "n_layer": shape.n_layer,
        "n_embd": shape.n_embd,
        "vocab_size": shape.vocab_size,
        "dim_att": shape.dim_att,
        "dim_ffn": shape.dim_ffn,
        "head_size_a": shape.head_size,
        "pre_ffn": shape.pre_ffn,
        "head_qk": shape.head_qk,
    }
    findings = Findings()
    for name, value in told.items():
        typed = getattr(config, name)
        findings.check(
            typed is None or typed == value,
            f"--{name} {typed} does not fit {config.load_model}, which has {value}",
            fix=f"leave --{name} out: the file tells it",
        )
    findings.raise_any()
    return Base(config.load_model, shape, tensors, outline, quantisation_of(packed))


class Chosen(NamedTuple):
    """The programs of a run: of the WKV recurrence, of what else a block computes beside its products, of the loss."""

    wkv: Choice
    block: BlockChoice
    rows: RowsChoice

    @property
    def rest(self) -> str:
        """All but the recurrence, for the start report."""
        return f"{self.block.report}; loss: {self.rows.report}"


def choose_programs(shape: ModelShape, config: TrainConfig) -> tuple[Chosen, list[str]]:
    """What computes the run, and remarks, one line each. On a GPU programs are tried, and the recurrence is timed.

    Raises: UserError if ``--op`` or ``--fused_kernel`` ask for one that cannot run this job.
    """
    runtime, operator = config.runtime, operator_of(shape)
    device = local_device(runtime)
    needs = Needs(
        device_type=device.type,
        dtype=COMPUTE_DTYPES[runtime.precision or "fp32"],
        head_size=shape.head_size,
        training=True,
        batch=config.schedule.micro_bsz,
        tokens=config.tokens_at_once,
        heads=shape.n_head,
        packed=config.packs,
    )
    bench = Bench.of(device) if device.type == "cuda" else None
    remarks: list[str] = []
    choice: Choice | None = None
    if runtime.fla and runtime.op == "auto":
        try:
            choice = choose_backend(operator, "fla", needs, bench)
        except UserError as reason:
            remarks.append(f"--fla: {reason.what} ({reason.found}); what --op auto takes is used instead")
    choice = choice or choose_backend(operator, runtime.op, needs, bench)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        block = choose_block_ops(_FUSED[runtime.fused_kernel], needs)
        rows = choose_rows(_FUSED[runtime.fused_kernel], needs, device)
    listing = [*choice.listing, *block.listing, *rows.listing] if runtime.debug else []
    return Chosen(choice, block, rows), [*remarks, *listing]


def likely_programs(shape: ModelShape, config: TrainConfig, device_type: str) -> Programs:
    """What such a device will most likely compute with, as far as that can be told on another machine."""
    runtime, operator = config.runtime, operator_of(shape)
    if device_type != "cuda" or importlib.util.find_spec("triton") is None:
        return Programs()
    needs = Needs(device_type, COMPUTE_DTYPES[runtime.precision or "fp32"], shape.head_size, training=True)
    kernel: Backend = find(BACKENDS[operator], "triton", flag="--op")
    block: BlockOps = find(BLOCK_OPS, "triton", flag="--fused_kernel")
    takes_kernel = runtime.op in ("auto", "triton", "fla") and not kernel.supports.objections(needs)
    takes_block = runtime.fused_kernel is not False and not block.supports.objections(needs)
    return Programs(kernel.run if takes_kernel else None, block if takes_block else PLAIN)


def make_adapter(method: MethodConfig, shape: ModelShape) -> Adapter | None:
    """The adapter the settings ask for; None for full training.

    Raises: UserError for settings the method does not take, and for a layer profile made for another model.
    """
    if method.layer_profile:
        rows = read_layer_profile(method.layer_profile)
        profile = ProfileAdapter(with_states(rows) if method.peft == "state" else rows, method.train_parts)
        profile.plan.check_layers(shape.n_layer)
        return profile
    # a tuned state is used with the base as it is, so nothing of the base may change beside it
    parts = [] if method.peft == "state" else method.train_parts
    return build_adapter(method.peft, method.peft_config, parts)


def make_quantiser(base: Base, config: TrainConfig, adapter: Adapter | None) -> Quantiser | None:
    """What quantises the frozen linears; None if they stay as in an ordinary file.

    Raises: UserError if the format or its package is not there, or a quantised base is to be trained itself.
    """
    stored = quantisation_in_run(config.method, base.packed)
    if stored.quant == "none":
        return None
    if adapter is None:
        raise UserError(f"{base.path} is a quantised model, whose weights cannot be trained themselves",
                        found="--peft none", fix="--peft lora, or the full-precision checkpoint")
    # a GPU quantises faster, and the weights end up there anyway
    device = local_device(config.runtime)
    return Quantiser(*stored, device=device if device.type == "cuda" else "cpu", keep=adapter.trains)


def check_merge(base: Base, method: MethodConfig, adapter: Adapter | None) -> None:
    """Raises: UserError if merged models are to be written and the base lacks the weights to merge into."""
    if method.merge and adapter is not None and base.packed.quant != "none":
        raise UserError(f"--merge 1 needs the full-precision model, and {base.path} is quantised",
                        found=base.packed.quant, fix="--merge 0, and merge.py with the original afterwards")


def check_whole_rows(base: Base, config: TrainConfig) -> None:
    """Raises: UserError if a model with headQK, which no state serves, is to go on from one."""
    if config.long_context.infctx:
        base.shape.check_recurrent("--infctx")
    if config.evaluation.sample_prompts:
        base.shape.check_recurrent("answering --sample_prompts")
    if config.objective.reads != "tokens":
        # answers go on from the state of their prompt
        base.shape.check_recurrent(f"--objective {config.objective.objective}")


def check_fits(base: Base, config: TrainConfig) -> None:
    """Raises: UserError if a run with these settings cannot fit into memory."""
    check_memory(base.shape, config, partial(make_adapter, config.method), base.packed)


def choose_recompute(
    base: Base, config: TrainConfig, chosen: Chosen, documents: Sequence[int] = ()
) -> LevelChoice:
    """What of the activations is computed twice; for ``--grad_cp auto`` by the memory that is free now.

    Args:
        documents: tokens of each document of the most crowded row, if rows are packed.
    Raises: UserError if the settings do not suit the sizes.
    """
    device = local_device(config.runtime)
    if config.runtime.grad_cp != "auto":
        return choose_level({}, config, free=None, device_type=device.type)
    levels = _expect_levels(base, config, Programs(chosen.wkv.run, chosen.block.ops), documents)
    return choose_level(levels, config, free=free_memory(device), device_type=device.type)


def _expect_levels(
    base: Base, config: TrainConfig, programs: Programs, documents: Sequence[int]
) -> dict[str, Expected]:
    adapter = partial(make_adapter, config.method)

    def stand_in() -> Programs:
        return likely_programs(base.shape, config, local_device(config.runtime).type)._replace(block=programs.block)

    # a package's program may fail in any way without data: then our kernel stands for it; the plain one needs more
    for computing in (lambda: programs, stand_in):
        try:
            return expect_levels(base.shape, config, adapter, base.packed, computing(), documents)
        except Exception:  # noqa: BLE001
            continue
    try:
        return expect_levels(base.shape, config, adapter, base.packed, documents=documents)
    except NoOutline:
        return {}


def with_longest_row(config: TrainConfig, longest: int) -> TrainConfig:
    """The settings of a run all of whose rows are as long as its longest one."""
    data = replace(config.data, dataload="pad", length_buckets=False, ctx_len=longest)
    return replace(config, data=data)


def read_start(base: Base, method: MethodConfig, adapter: Adapter | None) -> dict[str, torch.Tensor] | None:
    """The trained tensors of ``--adapter``, compared with the base they belong to; None if none is given.

    What else the file holds (PiSSA's start values) is handed to ``adapter``.
    Raises: UserError if the file is broken, of another method, or was trained on another base.
    """
    if not method.adapter or adapter is None:
        return None
    tensors, recipe = load_adapter(method.adapter)
    if recipe is not None:
        check_base(recipe, base.path)
        if recipe.method != adapter.name:
            raise UserError(
                f"--adapter {method.adapter} was trained with another method",
                found=recipe.method,
                expected=adapter.name,
                fix=f"--peft {recipe.method}",
            )
        _check_scale(method.adapter, recipe, adapter)
    if method.adapter_init:
        tensors = {**load_tensors(method.adapter_init), **tensors}
    return adapter.take_constants(adapter.rename(tensors))


def _check_scale(path: str, recipe: Recipe, adapter: Adapter) -> None:
    settings = adapter.settings()
    for name in _SCALES:
        if name in recipe.config and recipe.config[name] != settings.get(name):
            raise UserError(f"--adapter {path} was trained with another {name}", found=settings.get(name),
                            expected=recipe.config[name], fix=f"{name} in --peft_config as it was")


def build_for_training(
    base: Base, config: TrainConfig, chosen: Chosen, adapter: Adapter | None, start: dict[str, torch.Tensor] | None
) -> Rwkv:
    """Load the model, its linears quantised if so asked, and make trainable what the method trains.

    ``start`` holds the adapter's first values, if they are not new ones. ``--grad_cp`` has been decided.
    Raises: UserError if the checkpoint or the adapter file does not fit.
    """
    divisor = config.model.head_size_divisor
    model = build_model(base.shape, chosen.wkv.run, head_size_divisor=divisor, block_ops=chosen.block.ops)
    # an adapter's first values belong to the seed: a run killed before its first save starts with them again
    torch.manual_seed(config.runtime.random_seed)
    # the finer of the two: what is trained starts from the file's own values, and what an adapter takes out of a
    # weight leaves a rest that the file's dtype may not hold
    compute = COMPUTE_DTYPES[config.runtime.precision or "fp32"]
    fill_model(
        model,
        base.tensors,
        device="cpu",
        dtype=torch.promote_types(base.outline["emb.weight"].dtype, compute),
        source=base.path,
        quantiser=make_quantiser(base, config, adapter),
        prepare=_prepare_on(local_device(config.runtime), adapter) if adapter else None,
    )
    model.recompute = LEVELS[config.runtime.grad_cp]
    model.regularise(dropout=config.method.dropout, neftune_alpha=config.method.neftune_alpha)
    if adapter is None:
        model.requires_grad_(True)
    else:
        adapter.attach(model)
        if start is not None:
            adapter.load(model, start)
    return model


def write_constants(config: TrainConfig, adapter: Adapter | None, model: Rwkv) -> None:
    """Write what the adapter starts from and cannot be merged without, as ``init_pissa.pth``, into ``proj_dir``.

    Every adapter file holds these tensors too; this file is for other programs.
    """
    constants = adapter.constants(model) if adapter else {}
    if adapter is not None and constants:
        save_tensors(Path(config.output.proj_dir) / f"init_{adapter.name.partition('+')[0]}.pth", constants)


def _prepare_on(device: torch.device, adapter: Adapter) -> Prepare:
    """``adapter.prepare`` on the run's GPU, if it has one: PiSSA's decompositions take minutes on a CPU."""
    if device.type != "cuda":
        return adapter.prepare

    def prepare(path: str, weight: torch.Tensor) -> torch.Tensor:
        there = weight.to(device)
        prepared = adapter.prepare(path, there)
        # whoever reads a file tells by identity whether a weight was left as it is
        return weight if prepared is there else prepared

    return prepare


def make_recipe(base: Base, config: TrainConfig, adapter: Adapter | None) -> Recipe:
    """What merging or going on needs to know of this run."""
    stored = quantisation_in_run(config.method, base.packed)
    return Recipe(
        method=adapter.name if adapter else "none",
        config=adapter.settings() if adapter else {},
        train_parts=list(adapter.parts.names) if adapter else [],
        base_model=base.path.replace("\\", "/").rpartition("/")[2],
        # weights that are still to be drawn have none
        base_fingerprint=model_fingerprint(base.path) if base.tensors else "",
        quant=stored.quant,
        quant_double=stored.double,
        quant_head=stored.head,
        version=base.shape.version,
        shape=asdict(base.shape),
        tokenizer=config.data.tokenizer,
        ctx_len=config.data.ctx_len,
        head_size_divisor=config.model.head_size_divisor,
    )
