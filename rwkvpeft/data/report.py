"""What the data hold and how much of it is trained, in a few lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_MUCH_PADDING = 0.5


@dataclass(frozen=True)
class MixedPart:
    """One of several data sets: its share of what is drawn, and how often it is seen in one pass."""

    name: str
    share: float
    times: float


@dataclass(frozen=True)
class DataReport:
    """Counts of one pass over the data.

    Attributes:
        documents, tokens: in the file.
        longest: tokens of the longest document, its final 0 included.
        rows: rows that hold something to train.
        ctx_len: tokens in a row at most.
        trained_tokens: targets of a weight above 0.
        cut_endings: documents whose final 0 lies beyond the row, so that their end is never learnt.
        empty_rows: rows without a trained token, which are left out.
        scanned_documents: how many documents, from the first, the counts of trained tokens and empty rows are about.
        mixed: the parts of a mixture; empty for one data set.
        padding: tokens of all rows that are padding up to ctx_len.
        packed_documents, packed_tokens: documents in ``rows`` and their inputs, where rows hold several.
        notes: how the files are read.
    """

    documents: int
    tokens: int
    longest: int
    rows: int
    ctx_len: int
    trained_tokens: int
    cut_endings: int
    empty_rows: int
    scanned_documents: int
    mixed: tuple[MixedPart, ...] = ()
    padding: int = 0
    packed_documents: int = 0
    packed_tokens: int = 0
    notes: tuple[str, ...] = ()

    @staticmethod
    def of_all(reports: Sequence[DataReport], mixed: tuple[MixedPart, ...]) -> DataReport:
        """The counts of several data sets together."""
        summed = ("documents", "tokens", "rows", "trained_tokens", "cut_endings", "empty_rows", "scanned_documents",
                  "padding")
        return DataReport(
            **{name: sum(getattr(report, name) for report in reports) for name in summed},
            longest=max(report.longest for report in reports),
            ctx_len=reports[0].ctx_len,
            mixed=mixed,
            notes=tuple(note for report in reports for note in report.notes),
        )

    @property
    def mixed_parts(self) -> str:
        """The parts of a mixture as text."""
        return "; ".join(
            f"{part.name} {100 * part.share:.3g} % of what is drawn, {part.times:.3g} x in a pass"
            for part in self.mixed
        )

    def render(self) -> str:
        """The counts as text; what needs attention stands on lines of its own."""
        partial = self.scanned_documents < self.documents
        scope = f" in the first {self.scanned_documents:,} documents" if partial else ""
        lines = [
            f"data: {_count(self.documents, 'document')}, {_count(self.tokens, 'token')}, the longest {self.longest:,}",
            f"rows: {self.rows:,} of at most {self.ctx_len:,} tokens, {self.trained_tokens:,} tokens trained{scope}",
        ]
        if self.packed_documents:
            share = 100 * self.packed_tokens / (self.rows * self.ctx_len)
            lines.append(f"packed: {self.packed_documents / self.rows:.1f} documents a row, {share:.1f} % of it filled")
        if self.mixed:
            lines.append(f"mixed: {self.mixed_parts}")
        lines += [f"note: {note}" for note in self.notes]
        share = self.padding / max(1, self.rows * self.ctx_len)
        if share > _MUCH_PADDING:
            lines.append(f"note: {100 * share:.0f} % of the rows is padding, which --dataload pack leaves out")
        if self.cut_endings:
            share = 100 * self.cut_endings / self.documents
            lines.append(
                f"note: {_count(self.cut_endings, 'document')} ({share:.1f} %) longer than --ctx_len "
                f"{self.ctx_len:,} + 1: the rest of each is cut off and its end is not trained"
            )
        if self.empty_rows:
            lines.append(f"note: {_count(self.empty_rows, 'row')} without a trained token left out{scope}")
        return "\n".join(lines)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
