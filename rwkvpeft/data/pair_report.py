"""What preference data hold and how much of them is learned from, in a few lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rwkvpeft.data.report import DataReport, MixedPart


@dataclass(frozen=True)
class PairReport(DataReport):
    """``documents`` are records, ``rows`` those that are learned from, ``trained_tokens`` the scored ones of them.

    Attributes:
        unpaired: records with one answer.
        shared_tokens: what the answers to each prompt share, which is read once.
        answer_tokens: of all answers.
    """

    unpaired: int = 0
    shared_tokens: int = 0
    answer_tokens: int = 0

    @staticmethod
    def of_pairs(reports: Sequence[PairReport], mixed: tuple[MixedPart, ...]) -> PairReport:
        """The counts of several data sets together."""
        own = ("unpaired", "shared_tokens", "answer_tokens")
        counts = {name: sum(getattr(report, name) for report in reports) for name in own}
        return PairReport(**{**vars(DataReport.of_all(reports, mixed)), **counts})

    def render(self) -> str:
        """The counts as text; what needs attention stands on lines of its own."""
        pairs = self.documents - self.unpaired
        kinds = [f"{pairs:,} pairs"] * (pairs > 0) + [f"{self.unpaired:,} single answers"] * (self.unpaired > 0)
        read = self.shared_tokens + self.answer_tokens
        lines = [
            f"data: {' and '.join(kinds)}, {self.tokens:,} tokens, the longest record {self.longest:,}",
            f"rows: {self.rows:,}, {read:,} tokens read in a pass, {self.shared_tokens:,} of them for both answers; "
            f"{self.trained_tokens:,} tokens scored",
        ]
        if self.mixed:
            lines.append(f"mixed: {self.mixed_parts}")
        lines += [f"note: {note}" for note in self.notes]
        if self.cut_endings:
            lines.append(f"note: {self.cut_endings:,} rows have an answer longer with its prompt than --ctx_len "
                         f"{self.ctx_len:,}: the rest of it is cut off")
        if self.empty_rows:
            lines.append(f"note: {self.empty_rows:,} records left out, of whose answers nothing to tell apart is left "
                         f"within --ctx_len {self.ctx_len:,}")
        return "\n".join(lines)
