"""The peak to expect of a run on each of its devices, by what takes it.

Tensors alone: ``OVERHEAD_BYTES`` come on top, and the allocator's slack, a few percent. Programs that PyTorch cannot
look into are counted by what they take and give.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

from rwkvpeft.checkpoints.quantised import Quantisation
from rwkvpeft.config.groups import TrainConfig
from rwkvpeft.memory.chunks import bytes_of_states
from rwkvpeft.memory.dry_run import Moment, Most, run_step
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
from rwkvpeft.memory.sharing import STEP, beside, gradients_at, held, saving
from rwkvpeft.memory.teacher import teacher_bytes, words_bytes
from rwkvpeft.models.backbone import Rwkv
from rwkvpeft.models.shape import ModelShape
from rwkvpeft.objectives.base import Provided
from rwkvpeft.objectives.build import stand_in_objective
from rwkvpeft.registry import OPTIMIZERS, find

_CPU_LOGIT_ROWS = 256
_CHUNKS_RUN = 3

Moments = dict[tuple[str, Most], Moment]


class Expected(NamedTuple):
    """Bytes on one device at the worst moment of a step.

    ``frozen``: weights and packed weights that are not trained, a teacher's too; ``trained``: trained numbers in fp32;
    ``optimizer``: its moments; ``gradients``: those that exist at that moment; ``activations``: what the forward pass
    keeps for the backward pass, a teacher's words, logits, dequantised weights and all other temporaries then;
    ``strategy``: what the strategy adds, its own copy of trained weights, buckets of gradients and weights gathered for
    a moment. ``saving``: on a CPU, what is put together to be written, if that is the worst moment.
    Not on the device: ``main_memory``, what each process of an offloading strategy keeps there; ``main_saving``, what
    the first process puts together there to write it.
    """

    frozen: int
    trained: int
    optimizer: int
    gradients: int
    activations: int
    strategy: int = 0
    saving: int = 0
    main_memory: int = 0
    main_saving: int = 0

    @property
    def total(self) -> int:
        """All that is on the device."""
        return sum(self) - self.main_memory - self.main_saving


def expect(
    shape: ModelShape,
    config: TrainConfig,
    make_adapter: MakeAdapter,
    packed: Quantisation = UNPACKED,
    programs: Programs = PLAIN_PROGRAMS,
    documents: Sequence[int] = (),
) -> Expected:
    """What a run with these settings will need. Rows are taken to be ``ctx_len`` long.

    Deep models are run with a few blocks, and what one block adds is added for the others: they are alike unless
    settings tell one from another.

    Args:
        packed: how the base's own file stores its large linears.
        programs: what the run computes with.
        documents: tokens of each document of a packed row, which all rows are taken to be like.
    Raises: UserError if the settings do not suit the sizes; NoOutline.
    """
    counts = counts_of(shape, config, make_adapter, packed)
    runtime = config.runtime

    def step(layers: int) -> Moments:
        part = replace(shape, n_layer=layers)
        model = training_outline(part, config, make_adapter(part), packed, programs)
        more = bytes_of_states(part, config, beyond=_CHUNKS_RUN)
        found = dry_step(model, config, documents=documents)
        return {key: Moment(moment.bytes + more, moment.gradients) for key, moment in found.items()}

    if not layers_are_alike(config) or shape.n_layer <= FEW + 1:
        moments = step(shape.n_layer)
    else:
        few, more = step(FEW), step(FEW + 1)
        moments = {key: Moment(*continued(few[key], more[key], shape.n_layer - FEW)) for key in more}
    # when the optimizer takes its step, all gradients are there and nothing else
    moments[STEP, "of all"] = Moment(4 * counts.trained, 4 * counts.trained)
    moments_each = moment_bytes(config.optimizer.optim)
    resting = held(counts, moments_each, runtime)
    saved, on_cpu = saving(counts, moments_each, config), runtime.accelerator == "cpu"
    # on a CPU nothing is gained by moving it to main memory
    kept = resting.copies + (resting.main_memory if on_cpu else 0)
    teacher, words = teacher_bytes(config), words_bytes(config, shape.vocab_size)

    def at(phase: str, moment: Moment) -> Expected:
        return Expected(
            frozen=resting.frozen + teacher,
            trained=resting.trained,
            optimizer=resting.optimizer,
            gradients=gradients_at(moment, phase, counts, runtime),
            activations=moment.beside + words,
            strategy=kept + beside(phase, counts, runtime),
            # a step may be taken while another is being written
            saving=saved if on_cpu and config.output.save_async else 0,
            main_memory=0 if on_cpu else resting.main_memory,
            main_saving=0 if on_cpu else saved,
        )

    needs = [at(phase, moment) for (phase, _), moment in moments.items()]
    if on_cpu:
        needs.append(Expected(resting.frozen + teacher, resting.trained, resting.optimizer, 0, 0, kept, saved))
    return max(needs, key=lambda need: need.total)


def moment_bytes(optim: str) -> int:
    """What an optimizer keeps for each trained number.

    Paged moments are taken to stay on the device. Muon's are those of matrices; for the rest it keeps twice as much.
    """
    kept: int = find(OPTIMIZERS, optim.removeprefix("paged_"), flag="--optim").moment_bytes
    return kept


def dry_step(
    model: Rwkv,
    config: TrainConfig,
    watching: AbstractContextManager[Any] | None = None,
    *,
    documents: Sequence[int] = (),
) -> Moments:
    """The worst moments of a micro-batch of an outline, rows cut to ``tokens_of_step``.

    Args:
        watching: entered around the step, to see its operators.
        documents: as of ``run_step``.
    Raises: NoOutline.
    """
    on_cpu = config.runtime.accelerator == "cpu"
    chunk_rows = _CPU_LOGIT_ROWS if on_cpu else None
    objective = stand_in_objective(config, Provided(chunk_rows=chunk_rows))
    schedule = config.schedule
    accumulates = schedule.accumulate_grad_batches > 1
    documents = documents or _row_of_sequences(config)
    with without_values(config), watching or nullcontext():
        return run_step(
            model,
            objective,
            schedule.micro_bsz,
            tokens_of_step(config),
            accumulates=accumulates,
            documents=documents,
        )


def _row_of_sequences(config: TrainConfig) -> Sequence[int]:
    """Tokens of each sequence of the longest row there may be, where a row is one of pairs or of answers; else none."""
    longest, rewards = config.data.ctx_len or 1, config.rewards
    if config.objective.reads == "pairs":
        # what two answers share is counted with both: one may be as long as the other
        return (longest, longest)
    if config.objective.reads == "prompts":
        return (longest, *(rewards.answer_tokens,) * rewards.group_size)
    return ()


def tokens_of_step(config: TrainConfig) -> int:
    """Tokens of a row that ``dry_step`` runs: one chunk is like the other, and the further ones of a row only add the
    states before them."""
    return min(config.data.ctx_len or 1, _CHUNKS_RUN * config.tokens_at_once)
