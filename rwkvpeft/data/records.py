"""Records as a source of documents: tokenised when it is made, and held in memory with who says each token."""

from __future__ import annotations

import json
import sys
from array import array
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from rwkvpeft.config.groups import DataConfig
from rwkvpeft.data.conversation import RecordError, require_end, segments, tokenise
from rwkvpeft.data.jsonl import SHOWN, Record, excerpt, line_error
from rwkvpeft.data.parallel import tokenised_blocks
from rwkvpeft.data.progress import Progress, ProgressLines
from rwkvpeft.data.source import TokenSource
from rwkvpeft.data.tokenizer import Tokenizer, load_tokenizer
from rwkvpeft.data.voices import Spoken, Voice, VoiceTable
from rwkvpeft.errors import UserError


class RecordSource(TokenSource):
    """Records of any origin, tokenised when the source is made and held in memory: three bytes a token, five above
    65536 ids.
    """

    def __init__(self, name: str, records: Iterable[Record], tokenizer: Tokenizer, text_key: str = "text") -> None:
        """Args: ``name`` of the file, for messages. Raises: UserError with NAME:LINE for a record that is no document,
        and what ``records`` raises."""
        require_end(tokenizer)
        self.name = name
        stream = empty_stream(tokenizer)
        sizes, lines = array("i"), array("q")
        codes, table = bytearray(), VoiceTable()
        for record in records:
            try:
                tokens, spoken = tokenise(segments(record.value, text_key), tokenizer, table)
            except (RecordError, UserError) as reason:
                what = reason.what if isinstance(reason, UserError) else str(reason)
                # tables hold values that JSON does not know, as dates
                shown = json.dumps(record.value, ensure_ascii=False, default=str)[:SHOWN]
                raise line_error(name, record.line, what, excerpt(shown.encode("utf-8", errors="replace"))) from reason
            stream.extend(array(stream.typecode, tokens))
            sizes.append(len(tokens))
            lines.append(record.line)
            codes += spoken.tobytes()
        self._hold(stream, sizes, lines, codes, table)

    def _hold(
        self, stream: array[int], sizes: array[int], lines: array[int], codes: bytearray, table: VoiceTable
    ) -> None:
        self._lines = np.frombuffer(lines, dtype=np.int64)
        self.stream = _read_only(np.frombuffer(stream, dtype=np.uint16 if stream.typecode == "H" else np.int32))
        self.sizes = np.frombuffer(sizes, dtype=np.int32)
        self.starts = np.cumsum(self.sizes, dtype=np.int64) - self.sizes
        self._codes, self._voices = _read_only(np.frombuffer(codes, dtype=np.uint8)), table.voices

    def label(self, index: int) -> str:
        """See ``TokenSource``: file and line, or row where a file has no lines."""
        return f"{self.name}:{self._lines[index]}"

    @property
    def voices(self) -> tuple[Voice, ...]:
        """All voices that occur, and that of prompts."""
        return self._voices

    def spoken(self, index: int) -> Spoken:
        """Who says each token of document ``index``. Known from the roles, not from the text."""
        start = int(self.starts[index])
        return Spoken(self._codes[start : start + int(self.sizes[index])], self._voices)


class JsonlSource(RecordSource):
    """A jsonl file as documents; a large one is tokenised in several processes."""

    def __init__(
        self,
        path: str | Path,
        tokenizer: Tokenizer,
        text_key: str = "text",
        report: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        """Raises: UserError with FILE:LINE for a line that is no document, or if the file holds none."""
        path = Path(path)
        self.name = str(path)
        stream = empty_stream(tokenizer)
        sizes, places = array("i"), array("q")
        codes, table, lines = bytearray(), VoiceTable(), 0
        total = path.stat().st_size if path.is_file() else 0
        for end, block in tokenised_blocks(path, tokenizer.name, text_key, with_voices=True):
            if block.bad:
                first = block.bad[0]
                raise line_error(path, lines + first.line, first.what, first.shown)
            stream.frombytes(block.tokens.tobytes())
            sizes.frombytes(block.sizes.tobytes())
            codes += table.translation(block.voices)[block.codes].tobytes()
            places.frombytes((block.places.astype(np.int64) + lines).tobytes())
            lines += block.lines
            report(Progress("tokenise", end, total, len(stream)))
        if not sizes:
            raise UserError(f"{path} holds no record", found=f"{lines} lines", expected="JSON objects, one a line")
        self._hold(stream, sizes, places, codes, table)


def open_jsonl(config: DataConfig) -> JsonlSource:
    """The file ``--data_file`` names. Raises: UserError as ``JsonlSource`` does, and for weights that are not read."""
    with ProgressLines(sys.stderr.isatty()) as progress:
        source = JsonlSource(config.data_file, load_tokenizer(config.tokenizer), config.text_key, progress.show_slow)
    check_weights(source, config)
    return source


def check_weights(source: RecordSource, config: DataConfig) -> None:
    """Refuse turns with weights of their own where ``--loss_mask`` goes by something else. Raises: UserError."""
    error = weight_error(source.name, source.voices, config)
    if error is not None:
        raise error


def weight_error(name: str, voices: Iterable[Voice], config: DataConfig) -> UserError | None:
    """What is wrong where turns have weights of their own and ``--loss_mask`` does not go by turns."""
    weights = sorted({voice.weight for voice in voices if voice.is_answer and voice.weight != 1})
    if not weights or config.loss_mask in ("qa", "last"):
        return None
    return UserError(
        f'{name}: its turns have a "weight" or are not to be trained, and --loss_mask {config.loss_mask} '
        "does not go by turns",
        found=f"turns of weight {', '.join(f'{weight:g}' for weight in weights[:5])}",
        fix="--loss_mask qa",
    )


def empty_stream(tokenizer: Tokenizer) -> array[int]:
    """An array for tokens, two bytes each where that is enough."""
    return array("H" if tokenizer.vocab_size <= 1 << 16 else "i")


def _read_only(values: np.ndarray) -> np.ndarray:
    values.flags.writeable = False
    return values
