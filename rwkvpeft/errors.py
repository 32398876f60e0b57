"""The two errors this package raises itself: one for people, one for broken promises inside."""

from __future__ import annotations

from collections.abc import Iterable


def _as_text(part: object) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Iterable):
        return ", ".join(str(item) for item in part)
    return str(part)


class UserError(Exception):
    """A mistake a user can mend. The command line prints it without a traceback and exits with code 2.

    Args:
        what: the mistake in one sentence, without a full stop; names the flag, file or line at fault.
        found: what was there.
        expected: what would have been right; a list is joined with commas.
        fix: what to do about it, as a command or a flag where possible.
    """

    def __init__(
        self,
        what: str,
        *,
        found: object = None,
        expected: object = None,
        fix: object = None,
    ) -> None:
        self.what = what
        self.found = found
        self.expected = expected
        self.fix = fix
        super().__init__(self.render())

    def render(self) -> str:
        """The message as it is printed: one line, then up to three labelled ones."""
        lines = [f"error: {self.what}"]
        for label, part in (("found", self.found), ("expected", self.expected), ("try", self.fix)):
            if part is not None:
                lines.append(f"  {label:<9} {_as_text(part)}")
        return "\n".join(lines)


class ContractError(Exception):
    """A promise between two parts of this package was broken: a defect of ours, shown with its traceback."""
