"""Several answers to each prompt, read as one packed row that goes on from the prompts' states.

A recurrent model remembers a prompt in a state of fixed size: the prompt is read once, its state is repeated, and each
answer goes on from a copy. The prompt's gradient is then the sum of what its answers send back, as if it had been read
once for each. Letters: P prompts, A answers to each, S tokens of all prompts, T of all answers, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from rwkvpeft.models.state import RecurrentState
from rwkvpeft.ops.sequences import Sequences


def read_answers(
    model: Any, shared_ids: Tensor, shared: Sequences, input_ids: Tensor, answers: Sequences
) -> Tensor:
    """Hidden states of answers, (1, T, C) after the final norm, differentiable through the prompts.

    Args:
        shared_ids: (1, S) int64, what the answers to each prompt have in common.
        shared: the P prompts in it; one may be empty.
        input_ids: (1, T) int64, the answers, those to one prompt behind another.
        answers: the P * A answers in it.
    """
    state: RecurrentState | None = None
    if shared.tokens:
        _, state = model.hidden(shared_ids, sequences=shared)
        state = repeated(state, len(answers.lengths) // len(shared.lengths))
    hidden: Tensor = model.hidden(input_ids, state, sequences=answers)[0]
    return hidden


def repeated(state: RecurrentState, times: int) -> RecurrentState:
    """Each row of a state several times, its copies one behind another."""
    # a view whose gradient is a plain sum: an index would be summed up by atomics on a GPU, in another order each time
    return state.map(lambda tensor: tensor[:, None].expand(-1, times, *tensor.shape[1:]).flatten(0, 1))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside the block nothing drops out."""
    trains = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in trains:
            module.training = True
