"""A model as lm_eval, EleutherAI's evaluation harness, asks it. Needs the package (extra ``eval``).

Source: lm_eval 0.4, ``lm_eval.api.model.LM``; token 0 before each text as in BlinkDL/ChatRWKV, ``run_lm_eval.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lm_eval.api.model import LM
from tqdm import tqdm

from rwkvpeft.data.conversation import segments
from rwkvpeft.data.tokenizer import END_OF_DOCUMENT
from rwkvpeft.errors import UserError
from rwkvpeft.generation.generate import TextGenerator
from rwkvpeft.generation.sampling import Sampler, SamplingConfig
from rwkvpeft.generation.scoring import Pair, Score, Scorer, encode_pair, has_tuned_state
from rwkvpeft.generation.tuned import TunedModel

_LONGEST_ANSWER = 256


class RwkvLm(LM):
    """What tasks call: likelihoods and greedy answers.

    Args:
        tuned: the model and its tokenizer.
        tokens_at_once: as of ``Scorer``.
    Raises: UserError if the tokenizer does not belong to the model.
    """

    def __init__(self, tuned: TunedModel, *, tokens_at_once: int = 8192) -> None:
        super().__init__()
        self._tokenizer = tuned.tokenizer
        self._generator = TextGenerator(tuned.model, tuned.tokenizer)
        self._scorer = Scorer(tuned.model, tokens_at_once=tokens_at_once)
        self._has_prefix = tuned.tokenizer.end_token is not None and not has_tuned_state(tuned.model)

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer."""
        return self._tokenizer.name

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each (context, continuation): its log-probability, and whether greedy decoding would give it."""
        pairs = [self._pair(*request.args) for request in requests]
        scores = self._score(pairs, disable_tqdm)
        for request, score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, tuple(score))
        return [(score.logprob, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text; the whole of it is context, however long it is."""
        pairs = [Pair([END_OF_DOCUMENT], self._tokenizer.encode(request.args[0])) for request in requests]
        found = [score.logprob for score in self._score(pairs, disable_tqdm)]
        for request, logprob in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, logprob)
        return found

    @torch.no_grad()
    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """An answer to each (context, settings), up to one of the texts in ``until``."""
        start = self._generator.read([END_OF_DOCUMENT])[1] if self._has_prefix else None
        answers: list[str] = []
        for request in tqdm(requests, desc="generate", disable=disable_tqdm or None, leave=False):
            context, settings = request.args
            stop, longest, sampling = _read_settings(settings)
            stream = self._generator.stream(context, Sampler(sampling), max_tokens=longest, stop=stop, state=start)
            answers.append("".join(stream))
            self.cache_hook.add_partial("generate_until", request.args, answers[-1])
        return answers

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A dialogue in the World layout, up to ``Assistant:`` where an answer is to follow."""
        begun = [{"role": "assistant", "content": ""}] if add_generation_prompt else []
        return "".join(segment.text for segment in segments({"messages": [*chat_history, *begun]}))

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """What stands for the layout in reports."""
        return "RWKV World" if chat_template else None

    def _pair(self, context: str, continuation: str) -> Pair:
        return encode_pair(self._tokenizer, context, continuation, prefix=self._has_prefix)

    def _score(self, pairs: Sequence[Pair], quiet: bool) -> list[Score]:
        with tqdm(total=len(pairs), desc="score", disable=quiet or None, leave=False) as bar:
            update: Callable[[int], object] = bar.update
            return self._scorer.score(pairs, update)


def _read_settings(settings: Mapping[str, Any]) -> tuple[list[str], int, SamplingConfig]:
    """Stop texts, tokens at most, and how tokens are drawn: the likeliest, unless ``do_sample`` asks for more."""
    until = settings.get("until") or []
    stop = [until] if isinstance(until, str) else list(until)
    longest = int(settings.get("max_gen_toks", _LONGEST_ANSWER))
    if longest < 1:
        raise UserError("max_gen_toks of a task is out of range", found=longest, expected="1 or more")
    if not settings.get("do_sample") or not settings.get("temperature", 1.0):
        return stop, longest, SamplingConfig(temperature=0.0)
    names = {name: settings[name] for name in ("temperature", "top_p", "top_k") if name in settings}
    return stop, longest, SamplingConfig(**{"top_p": 1.0, **names}, seed=int(settings.get("seed", 0)))
