"""What ``--check`` found, as text with a picture of the lengths, and that picture as a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from rwkvpeft.atomic import write_whole
from rwkvpeft.data.check import SHOWN_LINES, DataCheck

_BAR = 40
_WARNINGS = {
    "untrained": "without a trained token",
    "cut": "longer than --ctx_len + 1, so that the end is cut off and not learnt",
    "cut_answers": "that lose trained tokens by that",
    "open_thoughts": "with a <think> that is never closed",
    "stray_ends": "with a </think> that nothing opens",
    "too_long": "longer than --ctx_len, which are left out",
    "duplicates": "that stood there before, token for token",
}


def render(found: DataCheck) -> str:
    """The counts and the lengths as text; what needs attention stands on lines of its own, bad lines at the end."""
    lengths = found.lengths()
    if not len(lengths):
        notes = [f"note: {note}" for note in found.notes]
        return "\n".join(["data: no document", *notes, "error: there is nothing to train on", *_bad_lines(found)])
    tokens = int(lengths.sum(dtype=np.int64))
    lines = [f"data: {_number(len(lengths), 'document')}, {_number(tokens, 'token')}"]
    if not found.are_prompts:
        lines.append(f"trained: {_number(found.trained, 'token')}, {100 * found.trained / tokens:.1f} %")
    lines += [*_histogram(lengths, found.ctx_len)]
    lines += [f"note: {note}" for note in found.notes]
    for name, words in _WARNINGS.items():
        count = getattr(found, name)
        if count:
            examples = ", ".join(found.examples[name])
            more = ", ..." if count > len(found.examples[name]) else ""
            share = 100 * count / len(lengths)
            lines.append(f"note: {_number(count, 'document')} ({share:.1f} %) {words}: {examples}{more}")
    if found.are_prompts and found.too_long == len(lengths):
        lines.append("error: every prompt is longer than --ctx_len")
    if not found.trained and not found.are_prompts:
        lines.append("error: nothing would be trained with these settings")
    lines += [f"error: {refusal}" for refusal in found.refusals]
    return "\n".join([*lines, *_bad_lines(found)])


def write_picture(found: DataCheck, path: Path) -> bool:
    """Draw the lengths into a PNG file; False where matplotlib is not installed. Raises: UserError."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    lengths = found.lengths()
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    edges = np.geomspace(1, max(int(lengths.max()), 2) + 1, 50)
    axes.hist(lengths, bins=edges.tolist())
    axes.set_xscale("log")
    axes.set_xlabel("tokens")
    axes.set_ylabel("documents")
    if found.ctx_len is not None:
        axes.axvline(found.ctx_len + 1, color="black", linestyle="--", label=f"--ctx_len {found.ctx_len}")
        axes.legend()
    write_whole(path, lambda partial: figure.savefig(partial))
    return True


def _histogram(lengths: npt.NDArray[np.int32], ctx_len: int | None) -> list[str]:
    """Numbers, and a bar for each power of two."""
    low, middle, high, top = (int(np.percentile(lengths, share)) for share in (0, 50, 95, 100))
    lines = [f"lengths: {low:,} to {top:,} tokens, half of them up to {middle:,}, 95 % up to {high:,}"]
    classes = np.bincount(np.maximum(np.ceil(np.log2(np.maximum(lengths, 1))), 0).astype(int))
    first = int(np.flatnonzero(classes)[0])
    width = len(f"{1 << (len(classes) - 1):,}")
    for power in range(first, len(classes)):
        bar = "#" * -(-_BAR * int(classes[power]) // int(classes.max()))
        beyond = "  cut by --ctx_len" if ctx_len is not None and (1 << power) // 2 > ctx_len else ""
        lines.append(f"  up to {1 << power:>{width},} |{bar:<{_BAR}}| {classes[power]:,}{beyond}")
    return lines


def _bad_lines(found: DataCheck) -> list[str]:
    if not found.bad:
        return []
    rest = len(found.bad) - SHOWN_LINES
    return [
        f"error: {_number(len(found.bad), 'bad line')}",
        *(f"  {line}" for line in found.bad[:SHOWN_LINES]),
        *([f"  and {rest:,} more"] if rest > 0 else []),
    ]


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
