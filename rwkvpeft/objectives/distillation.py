"""Learn from a teacher: what it says of each next token, beside the data's own token.

The teacher's words are stored (``data/teacher_labels.py``), or a frozen model says them of each batch before the
student reads it. The formulas are in ``ops/divergence.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from rwkvpeft.config.groups import TrainConfig
from rwkvpeft.data.batches import DistillationBatch, TokenBatch
from rwkvpeft.errors import UserError
from rwkvpeft.models.shape import ModelShape
from rwkvpeft.models.state import RecurrentState
from rwkvpeft.objectives.base import Loss, Objective, Provided
from rwkvpeft.objectives.head import plain_weight
from rwkvpeft.objectives.language_modelling import document_lengths
from rwkvpeft.objectives.long_context import in_chunks
from rwkvpeft.objectives.teaching import Teacher
from rwkvpeft.ops.distillation import head_distillation, linear_distillation
from rwkvpeft.ops.divergence import DivergenceKind, Mix, Told


@dataclass(frozen=True)
class Distillation:
    """alpha T^2 * divergence from the teacher + (1 - alpha) * cross entropy, both means over the weighted tokens.

    L2Wrap belongs to the cross entropy, so that alpha 0 is language modelling, and alpha 1 moves nothing once student
    and teacher agree. Logged: the two means, the divergence without T^2.

    Args:
        chunk_rows: rows of logits that exist at once, each of them several times over in fp32.
        compact: leave out rows without weight, for which the processor waits for the device.
        tells_lengths: tell the model how long each row's document is, which NEFTune's noise depends on.
    """

    metric_names: ClassVar[tuple[str, ...]] = ("divergence", "cross_entropy")

    mix: Mix
    chunk_rows: int = 256
    compact: bool = True
    tells_lengths: bool = False

    @classmethod
    def build(cls, config: TrainConfig, provided: Provided) -> Objective:
        """As the settings want it, in chunks of rows if they say so, with the teacher's words from a live teacher if
        there is one."""
        distillation = config.distillation
        part = cls(
            Mix(
                cast(DivergenceKind, distillation.distill_loss),
                distillation.distill_alpha,
                distillation.distill_temperature,
                config.method.label_smoothing,
                config.optimizer.logit_penalty,
            ),
            provided.chunk_rows or cls.chunk_rows,
            compact=provided.compact,
            tells_lengths=config.method.neftune_alpha > 0,
        )
        inner = in_chunks(part, config)
        if provided.teacher is None:
            return inner
        chunk = config.long_context.chunk_ctx if config.long_context.infctx else None
        teacher = Teacher(
            provided.teacher, distillation.distill_top_k, distillation.distill_temperature, chunk,
            part.chunk_rows,
        )
        return Taught(inner, teacher)

    def __call__(self, model: Any, batch: DistillationBatch, normaliser: Tensor | None = None) -> Loss:
        """Compare what the model says of ``batch.input_ids`` with the teacher and with ``batch.labels``."""
        if normaliser is None:
            tokens = batch.weights.sum()
            normaliser = tokens.where(tokens > 0, 1.0)
        return self.part(model, batch, normaliser)[0]

    def part(
        self,
        model: Any,
        batch: DistillationBatch,
        normaliser: Tensor,
        state: RecurrentState | None = None,
        share: float = 1.0,
    ) -> tuple[Loss, RecurrentState]:
        """See ``TokenObjective``."""
        told_lengths = {"lengths": document_lengths(_tokens_of(batch), share)} if self.tells_lengths else {}
        hidden, after = model.hidden(batch.input_ids, state, sequences=batch.sequences, **told_lengths)
        told = Told(batch.teacher_ids, batch.teacher_logprobs, batch.teacher_tail)
        settings: dict[str, Any] = {
            # the pull is a mean over all positions, of which there are fewer here
            "mix": _pulling_less(self.mix, share),
            "normaliser": normaliser,
            "chunk_rows": self.chunk_rows,
            "compact": self.compact,
        }
        head, copies = model.head, None
        if getattr(model, "head_q", None) is not None:
            copies = model.copies(hidden, batch.input_ids, state, batch.sequences)
        weight = plain_weight(head, hidden.dtype) if copies is None else None
        if weight is not None:
            found = linear_distillation(hidden, weight, batch.labels, batch.weights, told, **settings)
        else:
            beside = None if copies is None else copies.add
            found = head_distillation(hidden, head, batch.labels, batch.weights, told, beside=beside, **settings)
        metrics = {"divergence": found.divergence, "cross_entropy": found.cross_entropy}
        return Loss(found.total, batch.weights.sum(), metrics), after


@dataclass(frozen=True)
class Taught:
    """An objective over batches of tokens that a live teacher labels first, each once: whatever is worked through in
    chunks afterwards, forward or backward, the teacher does not run again."""

    metric_names: ClassVar[tuple[str, ...]] = Distillation.metric_names

    inner: Objective
    teacher: Teacher

    def __call__(self, model: nn.Module, batch: TokenBatch, normaliser: Tensor | None = None) -> Loss:
        """See ``Objective``."""
        return self.inner(model, self.teacher.label(batch), normaliser)


def require_same_vocabulary(student: ModelShape, teacher_vocabulary: int, teacher: str) -> None:
    """Raises: UserError if the two models do not have equally many tokens."""
    if student.vocab_size != teacher_vocabulary:
        raise UserError(
            f"the teacher {teacher} has another vocabulary than the model that learns",
            found=f"{teacher_vocabulary} tokens",
            expected=f"{student.vocab_size}",
            fix="a teacher that was trained with the same tokenizer",
        )


def _tokens_of(batch: DistillationBatch) -> TokenBatch:
    return TokenBatch(*batch[:4], batch.sequences)


def _pulling_less(mix: Mix, share: float) -> Mix:
    return Mix(mix.kind, mix.alpha, mix.temperature, mix.smoothing, mix.pull * share)
