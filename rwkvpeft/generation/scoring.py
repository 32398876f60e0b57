"""How likely a model finds given texts: log-probabilities of continuations.

Letters: B rows, T tokens, C channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rwkvpeft.data.tokenizer import END_OF_DOCUMENT, Tokenizer
from rwkvpeft.models.backbone import Rwkv, TimeMixing
from rwkvpeft.models.state import RecurrentState

_LOGIT_ROWS = 256


class Pair(NamedTuple):
    """Tokens to read, at least one, and the tokens behind them to score."""

    context: Sequence[int]
    continuation: Sequence[int]


class Score(NamedTuple):
    """Sum of the continuation's log-probabilities in nats, and whether each of its tokens was the likeliest."""

    logprob: float
    is_greedy: bool


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str, prefix: bool = True) -> Pair:
    """Cut the tokens of a text where its context ends.

    The text is tokenised as one, as a model reads it. A token that lies across the border counts as continuation, and
    so do spaces and line ends at the end of the context: World tokens begin with their space.

    Args:
        prefix: put token 0, which ends a document, before the text. It stands before an empty context in any case,
            for something has to be read.
    Raises: UserError if the text cannot be encoded.
    """
    tokens = tokenizer.encode(context + continuation)
    ends = np.cumsum([len(tokenizer.token_bytes(token)) for token in tokens])
    border = int(np.searchsorted(ends, len(tokenizer.to_bytes(context.rstrip())), side="right"))
    begins = [END_OF_DOCUMENT] if prefix or not border else []
    return Pair([*begins, *tokens[:border]], tokens[border:])


def has_tuned_state(model: Rwkv) -> bool:
    """Whether documents start in a tuned state, which was tuned for a text without token 0 before it."""
    return any(mixing.time_state is not None for mixing in model.modules() if isinstance(mixing, TimeMixing))


class Scorer:
    """Scores continuations, several at once.

    Rows are padded behind their end, which no earlier token sees. Rows of equal tokens are read once, so that answers
    of one token to one question cost one row. The state is handed on over long rows, so there is no longest text.

    Args:
        tokens_at_once: B times T of what is computed at once.
    """

    def __init__(self, model: Rwkv, *, tokens_at_once: int = 8192) -> None:
        model.shape.check_recurrent("scoring continuations")
        self._model = model
        self._tokens_at_once = tokens_at_once

    @torch.no_grad()
    def score(self, pairs: Sequence[Pair], progress: Callable[[int], object] = lambda rows: None) -> list[Score]:
        """The score of each pair, in their order; that of an empty continuation is 0 and greedy.

        Args:
            progress: is told after each batch how many pairs were done in it.
        """
        by_input: dict[tuple[int, ...], list[int]] = {}
        for index, (context, continuation) in enumerate(pairs):
            by_input.setdefault((*context, *continuation[:-1]), []).append(index)
        scores = [Score(0.0, True)] * len(pairs)
        for batch in self._batches(sorted(by_input, key=len, reverse=True)):
            self._run([(row, [(index, pairs[index]) for index in by_input[row]]) for row in batch], scores)
            progress(sum(len(by_input[row]) for row in batch))
        return scores

    def _batches(self, rows: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
        """Rows, the longest first, in batches of at most ``tokens_at_once`` padded tokens; at least one each."""
        batches: list[list[tuple[int, ...]]] = []
        for row in rows:
            if batches and len(batches[-1][0]) * (len(batches[-1]) + 1) <= self._tokens_at_once:
                batches[-1].append(row)
            else:
                batches.append([row])
        return batches

    def _run(
        self, rows: list[tuple[tuple[int, ...], list[tuple[int, Pair]]]], scores: list[Score]
    ) -> None:
        device = self._model.emb.weight.device
        longest = len(rows[0][0])
        tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
        wanted = []
        for number, (row, pairs) in enumerate(rows):
            tokens[number, : len(row)] = torch.tensor(row, dtype=torch.int64)
            for index, (context, continuation) in pairs:
                wanted += [
                    (index, number, place, target) for place, target in enumerate(continuation, start=len(context) - 1)
                ]
        # (n, 4): pair, row, place of the token read, token that follows it
        table = torch.tensor(wanted, dtype=torch.int64).reshape(-1, 4)
        state: RecurrentState | None = None
        chunk = max(self._tokens_at_once // len(rows), 1)
        for start in range(0, longest, chunk):
            hidden, state = self._model.hidden(tokens[:, start : start + chunk].to(device), state)
            here = table[(table[:, 2] >= start) & (table[:, 2] < start + chunk)]
            for part in here.split(_LOGIT_ROWS):
                chosen = hidden[part[:, 1].to(device), (part[:, 2] - start).to(device)]
                for index, logprob, is_best in zip(part[:, 0].tolist(), *self._score(chosen, part[:, 3]), strict=True):
                    before = scores[index]
                    scores[index] = Score(before.logprob + logprob, before.is_greedy and is_best)

    def _score(self, hidden: Tensor, targets: Tensor) -> tuple[list[float], list[bool]]:
        """Log-probabilities of the targets (n,) behind ``hidden`` (n, C), and whether each is the likeliest."""
        logits = self._model.head(hidden).float()
        there = targets.to(logits.device)
        logprobs = logits.gather(1, there[:, None])[:, 0] - logits.logsumexp(1)
        return logprobs.tolist(), (logits.argmax(1) == there).tolist()
