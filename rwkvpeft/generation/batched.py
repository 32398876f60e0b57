"""Answers to many prompts at once, in memory that does not grow with their number or their length.

Some slots are answered side by side, each of them a row of one recurrent state. Where an answer ends, the next prompt
takes its slot at once: no slot waits for the longest answer of a batch. Letters: B slots, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch

from rwkvpeft.errors import ContractError
from rwkvpeft.generation.prompt_states import ReadPrompts, joined, read_prompts
from rwkvpeft.generation.sampling import RowSampler, SamplingConfig
from rwkvpeft.models.backbone import Rwkv

Ends = Callable[[int], bool]
"""Is told every token drawn for one answer, and says whether the answer is over with it."""

_AHEAD = 8
"""Of so many slots one has its next prompt read before it is free: a prompt alone takes as long as several."""


class Request(NamedTuple):
    """``tokens`` of the prompt, at least one (token 0, which ends a document, stands for an empty text); ``seed`` of
    this answer's random numbers alone, whatever else is answered beside it."""

    tokens: Sequence[int]
    seed: int


class Answer(NamedTuple):
    """One answer.

    Args:
        tokens: what was drawn, with the token that ends an answer if it was drawn, and whole the token with which a
            stop text was complete.
        logprobs: of each of these under the model at the sampling temperature (1 for temperature 0), before penalties
            and before anything is cut off; computed in fp32.
        ended: it came to an end by itself, not because it was as long as allowed.
    """

    tokens: list[int]
    logprobs: list[float]
    ended: bool


class Count(NamedTuple):
    """What was done so far: answers that are complete, tokens drawn, and tokens of prompts read."""

    answers: int
    tokens: int
    prompt_tokens: int


@torch.no_grad()
def decode(
    model: Rwkv,
    requests: Iterable[Request],
    sampling: SamplingConfig,
    *,
    max_tokens: int,
    batch_size: int,
    end_token: int | None,
    stop: Callable[[int], Ends] | None = None,
    report: Callable[[Count], object] = lambda count: None,
    prefill_tokens: int = 2048,
) -> Iterator[tuple[int, Answer]]:
    """Answer requests, each independent of the others.

    Requests are taken as slots become free, an eighth of the slots ahead. The same prompt asked several times in a row
    is read once: its state is repeated. A tuned start state and adapters act as they do in the model's own forward.

    Args:
        model: in evaluation mode; no gradient is computed, and its weights can be trained afterwards.
        sampling: how tokens are drawn; its seed is not read, for every request has its own.
        max_tokens: longest answer.
        batch_size: slots. Memory is that of so many states and logits, little more than twice, and of one prefill.
        end_token: ends an answer; None if there is no such token.
        stop: given the number of a request, makes what watches its answer for another end, see ``Ends``.
        report: is called after each token of all slots.
        prefill_tokens: tokens of prompts read at once.
    Yields: the number of a request, counted from 0, and its answer, in the order in which answers end.
    Raises: UserError for headQK and for logits that are not finite, ContractError if the model is in training mode.
    """
    if model.training:
        raise ContractError("decoding needs a model in evaluation mode")
    if max_tokens < 1 or batch_size < 1:
        raise ContractError(f"max_tokens {max_tokens} and batch_size {batch_size} must be at least 1")
    model.shape.check_recurrent("answering prompts")
    waiting = _Waiting(model, requests, ahead=max(batch_size // _AHEAD, 1), tokens_at_once=prefill_tokens)
    count = Count(0, 0, 0)
    first = waiting.take(batch_size)
    if first is None:
        return
    slots = _Slots(model, first, sampling, stop)
    while slots.writing:
        ended = slots.step(max_tokens, end_token)
        count = Count(count.answers + len(ended), count.tokens + slots.width, waiting.tokens)
        report(count)
        for row in ended:
            yield slots.writing[row].number, slots.writing[row].answer()
        slots.go_on(ended, waiting.take(len(ended)) if ended else None)


class _Writing:
    """An answer being written."""

    def __init__(self, number: int, ends: Ends | None) -> None:
        self.number = number
        self.ended = False
        self._ends = ends
        self._tokens: list[int] = []
        self._logprobs: list[float] = []

    def push(self, token: int, logprob: float, max_tokens: int, end_token: int | None) -> bool:
        """Take one more token; whether the answer is complete."""
        self._tokens.append(token)
        self._logprobs.append(logprob)
        self.ended = token == end_token or (self._ends is not None and self._ends(token))
        return self.ended or len(self._tokens) == max_tokens

    @property
    def last(self) -> int:
        """The last token."""
        return self._tokens[-1]

    def answer(self) -> Answer:
        """The answer as it is."""
        return Answer(self._tokens, self._logprobs, self.ended)


class _Begun(NamedTuple):
    """Requests with their numbers, and what the model knows behind their prompts, a row each."""

    requests: list[tuple[int, Request]]
    prompts: ReadPrompts

    def part(self, start: int, stop: int) -> _Begun:
        """Some of the requests."""
        requests = self.requests[start:stop]
        return _Begun(requests, self.prompts.select(range(start, start + len(requests))))


class _Waiting:
    """Reads the prompts of requests, some at a time, which takes less time than one by one.

    Args:
        ahead: prompts that are read at least, if there are so many.
    """

    def __init__(self, model: Rwkv, requests: Iterable[Request], *, ahead: int, tokens_at_once: int) -> None:
        self.tokens = 0
        self._model, self._ahead, self._tokens_at_once = model, ahead, tokens_at_once
        self._requests = enumerate(requests)
        self._ready: _Begun | None = None
        self._place = 0
        # kept for those who ask the same again
        self._last: tuple[tuple[int, ...], ReadPrompts] | None = None

    def take(self, count: int) -> _Begun | None:
        """The next requests: so many, or all that there are; None if there is none."""
        missing = count - (0 if self._ready is None else len(self._ready.requests) - self._place)
        if missing > 0:
            self._read(max(missing, self._ahead))
        if self._ready is None or self._place == len(self._ready.requests):
            return None
        taken = self._ready.part(self._place, self._place + count)
        self._place += len(taken.requests)
        return taken

    def _read(self, count: int) -> None:
        requests = list(islice(self._requests, count))
        if not requests:
            return
        begun = [_Begun(requests, self._prompts([tuple(request.tokens) for _, request in requests]))]
        if self._ready is not None and self._place < len(self._ready.requests):
            begun.insert(0, self._ready.part(self._place, len(self._ready.requests)))
        self._ready = _Begun([one for part in begun for one in part.requests], joined([part.prompts for part in begun]))
        self._place = 0

    def _prompts(self, asked: Sequence[tuple[int, ...]]) -> ReadPrompts:
        """A row for each prompt; none is read twice."""
        known, parts = [], []
        if self._last is not None and self._last[0] in asked:
            known, parts = [self._last[0]], [self._last[1]]
        fresh = [prompt for prompt in dict.fromkeys(asked) if prompt not in known]
        if fresh:
            self.tokens += sum(map(len, fresh))
            parts.append(read_prompts(self._model, fresh, tokens_at_once=self._tokens_at_once))
        places = {prompt: place for place, prompt in enumerate([*known, *fresh])}
        rows = joined(parts).select([places[prompt] for prompt in asked])
        self._last = asked[-1], rows.select([len(asked) - 1])
        return rows


class _Slots:
    """The slots, and the answers that are written in them."""

    def __init__(
        self, model: Rwkv, begun: _Begun, sampling: SamplingConfig, stop: Callable[[int], Ends] | None
    ) -> None:
        self._model, self._stop = model, stop
        self._now = begun.prompts
        self._sampler = RowSampler(sampling, [request.seed for _, request in begun.requests])
        self.writing = [self._begin(number) for number, _ in begun.requests]

    @property
    def width(self) -> int:
        """Slots in use."""
        return len(self.writing)

    def step(self, max_tokens: int, end_token: int | None) -> list[int]:
        """Draw a token in each slot; the slots whose answers are complete."""
        drawn = self._sampler.draw(self._now.logits)
        pairs = zip(self.writing, drawn.tokens.tolist(), drawn.logprobs.tolist(), strict=True)
        return [
            row for row, (writing, token, logprob) in enumerate(pairs)
            if writing.push(token, logprob, max_tokens, end_token)
        ]

    def go_on(self, ended: Sequence[int], begun: _Begun | None) -> None:
        """Read the drawn tokens, give slots that ended to new requests, and up those for which there is none."""
        new = [] if begun is None else begun.requests
        given_up = set(ended[len(new) :])
        kept = [row for row in range(self.width) if row not in given_up]
        if given_up:
            self.writing = [self.writing[row] for row in kept]
            self._sampler.select(kept)
            self._now = self._now.select(kept)
        if len(new) < self.width:
            self._read_drawn()
        if begun is not None:
            filled = [kept.index(row) for row in ended[: len(new)]]
            self._now.put(filled, begun.prompts)
            for row, (number, request) in zip(filled, new, strict=True):
                self.writing[row] = self._begin(number)
                self._sampler.restart(row, request.seed)

    def _read_drawn(self) -> None:
        device = self._model.emb.weight.device
        # a slot that is about to be given away reads one token for nothing: cheaper than to cut the state around it
        tokens = torch.tensor([[writing.last] for writing in self.writing], dtype=torch.int64, device=device)
        hidden, state = self._model.hidden(tokens, self._now.state)
        self._now = ReadPrompts(state, self._model.head(hidden[:, 0]))

    def _begin(self, number: int) -> _Writing:
        return _Writing(number, None if self._stop is None else self._stop(number))
