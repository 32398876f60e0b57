"""The peak to expect of a run on one device, by what takes it.

Tensors alone: ``OVERHEAD_BYTES`` come on top, and the allocator's slack, a few percent. Programs that PyTorch cannot
look into are counted by what they take and give.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from rwkvpeft.checkpoints.quantised import Quantisation
from rwkvpeft.config.groups import TrainConfig
from rwkvpeft.memory.chunks import bytes_of_states
from rwkvpeft.memory.dry_run import Moment, run_step
from rwkvpeft.memory.outline import (
    FEW,
    PLAIN_PROGRAMS,
    UNPACKED,
    MakeAdapter,
    Programs,
    continued,
    counts_of,
    layers_are_alike,
    training_outline,
    without_values,
)
from rwkvpeft.models.backbone import Rwkv
from rwkvpeft.models.shape import ModelShape
from rwkvpeft.objectives.build import build_objective
from rwkvpeft.registry import OPTIMIZERS, find

_CPU_LOGIT_ROWS = 256
_CHUNKS_RUN = 3


class Expected(NamedTuple):
    """Bytes on one device at the worst moment of a step.

    ``frozen``: weights and packed weights that are not trained; ``trained``: trained numbers in fp32; ``optimizer``:
    its moments; ``gradients``: those that exist at that moment; ``activations``: what the forward pass keeps for the
    backward pass, logits, dequantised weights and all other temporaries at that moment.
    """

    frozen: int
    trained: int
    optimizer: int
    gradients: int
    activations: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


def expect(
    shape: ModelShape,
    config: TrainConfig,
    make_adapter: MakeAdapter,
    packed: Quantisation = UNPACKED,
    programs: Programs = PLAIN_PROGRAMS,
) -> Expected:
    """What a run with these settings will need. Rows are taken to be ``ctx_len`` long.

    Deep models are run with a few blocks, and what one block adds is added for the others: they are alike unless
    settings tell one from another.

    Args:
        packed: how the base's own file stores its large linears.
        programs: what the run computes with.
    Raises: UserError if the settings do not suit the sizes; NoOutline.
    """
    counts = counts_of(shape, config, make_adapter, packed)

    def step(layers: int) -> dict[str, Moment]:
        part = replace(shape, n_layer=layers)
        return _step(training_outline(part, config, make_adapter(part), packed, programs), config)

    if not layers_are_alike(config) or shape.n_layer <= FEW + 1:
        moments = step(shape.n_layer)
    else:
        few, more = step(FEW), step(FEW + 1)
        moments = {phase: Moment(*continued(few[phase], more[phase], shape.n_layer - FEW)) for phase in more}
    # when the optimizer takes its step, all gradients are there and nothing else
    moments["step"] = Moment(4 * counts.trained, 4 * counts.trained)
    worst = max(moments.values())
    return Expected(
        frozen=counts.frozen_bytes,
        trained=4 * counts.trained,
        optimizer=counts.trained * moment_bytes(config.optimizer.optim),
        gradients=worst.gradients,
        activations=worst.bytes - worst.gradients,
    )


def moment_bytes(optim: str) -> int:
    """What an optimizer keeps for each trained number.

    Paged moments are taken to stay on the device. Muon's are those of matrices; for the rest it keeps twice as much.
    """
    kept: int = find(OPTIMIZERS, optim.removeprefix("paged_"), flag="--optim").moment_bytes
    return kept


def _step(model: Rwkv, config: TrainConfig) -> dict[str, Moment]:
    on_cpu = config.runtime.accelerator == "cpu"
    chunk_rows = _CPU_LOGIT_ROWS if on_cpu else None
    objective = build_objective(config, compact=True, rows="auto", chunk_rows=chunk_rows)
    schedule = config.schedule
    accumulates = schedule.accumulate_grad_batches > 1
    # one chunk is like the other: the further ones of a row only add the states before them
    tokens = min(config.data.ctx_len or 1, _CHUNKS_RUN * config.tokens_at_once)
    with without_values(config):
        moments = run_step(model, objective, schedule.micro_bsz, tokens, accumulates=accumulates)
    more = bytes_of_states(model.shape, config, beyond=_CHUNKS_RUN)
    return {phase: Moment(moment.bytes + more, moment.gradients) for phase, moment in moments.items()}
