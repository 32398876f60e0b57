"""Text from a model, piece by piece, with its recurrent form: memory does not grow with the length of the text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rwkvpeft.data.tokenizer import END_OF_DOCUMENT, IncrementalDecoder, Tokenizer
from rwkvpeft.errors import UserError
from rwkvpeft.generation.sampling import Sampler
from rwkvpeft.models.backbone import Rwkv
from rwkvpeft.models.state import RecurrentState


class TextGenerator:
    """Continues texts.

    Args:
        model: in evaluation mode, adapters attached.
        tokenizer: the one the model was trained with.
        chunk: prompt tokens read at once.
    Raises: UserError if the tokenizer has ids beyond the model's vocabulary, and for headQK.
    """

    def __init__(self, model: Rwkv, tokenizer: Tokenizer, *, chunk: int = 256) -> None:
        if tokenizer.vocab_size > model.shape.vocab_size:
            raise UserError(
                f"the tokenizer {tokenizer.name} does not belong to this model",
                found=f"{tokenizer.vocab_size} token ids",
                expected=f"at most {model.shape.vocab_size}",
                fix="--tokenizer with the one the model was trained with",
            )
        model.shape.check_recurrent("continuing a text")
        self.model = model
        self.tokenizer = tokenizer
        self.chunk = chunk
        self.end_token = tokenizer.end_token

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        return self.tokenizer.encode(text)

    @torch.inference_mode()
    def read(self, tokens: Sequence[int], state: RecurrentState | None = None) -> tuple[Tensor, RecurrentState]:
        """Feed tokens, at least one, in chunks.

        Returns: the logits (V,) after the last token, and the state there.
        """
        device = self.model.emb.weight.device
        for start in range(0, len(tokens), self.chunk):
            chunk = torch.tensor([tokens[start : start + self.chunk]], dtype=torch.int64, device=device)
            hidden, state = self.model.hidden(chunk, state)
        assert state is not None
        return self.model.head(hidden[0, -1]), state

    def stream(
        self,
        prompt: str,
        sampler: Sampler,
        *,
        max_tokens: int,
        stop: Sequence[str] = (),
        state: RecurrentState | None = None,
    ) -> Iterator[str]:
        """Continue ``prompt``; pieces of text come as soon as they are certain.

        Ends after ``max_tokens`` tokens, at the token that ends a document, or before the first of the ``stop``
        texts. An empty prompt is the beginning of a document.

        Args:
            state: what came before the prompt; None for nothing.
        """
        logits, state = self.read(self.encode(prompt) or [END_OF_DOCUMENT], state)
        decoder = IncrementalDecoder(self.tokenizer)
        gate = StopGate(stop)
        for count in range(1, max_tokens + 1):
            token = sampler.draw(logits)
            if token == self.end_token:
                break
            piece = gate.push(decoder.push(token))
            if piece:
                yield piece
            if gate.stopped:
                return
            if count < max_tokens:
                logits, state = self.read([token], state)
        rest = gate.push(decoder.finish()) + gate.finish()
        if rest:
            yield rest


class StopGate:
    """Lets text through up to the first of some texts, holding back what may be the beginning of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.stopped = False
        self._stop = [text for text in stop if text]
        self._held = ""

    def push(self, text: str) -> str:
        """What of the text so far can be shown now."""
        if self.stopped:
            return ""
        self._held += text
        places = [place for text in self._stop if (place := self._held.find(text)) >= 0]
        if places:
            self.stopped = True
            shown = self._held[: min(places)]
            self._held = ""
            return shown
        keep = max((self._overlap(text) for text in self._stop), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def finish(self) -> str:
        """What was held back, when nothing more comes."""
        held, self._held = self._held, ""
        return held

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins ``stop``."""
        sizes = range(min(len(stop) - 1, len(self._held)), 0, -1)
        return next((size for size in sizes if self._held.endswith(stop[:size])), 0)
