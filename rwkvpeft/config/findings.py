"""Several mistakes, one message: a user mends a command line in one go."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from textwrap import indent

from rwkvpeft.errors import UserError


class Findings:
    """Collects the mistakes of one pass of checks."""

    def __init__(self) -> None:
        self.errors: list[UserError] = []

    def add(self, what: str, *, found: object = None, expected: object = None, fix: object = None) -> None:
        """Note a mistake; the arguments are those of ``UserError``."""
        self.errors.append(UserError(what, found=found, expected=expected, fix=fix))

    def check(
        self, holds: bool, what: str, *, found: object = None, expected: object = None, fix: object = None
    ) -> None:
        """Note a mistake unless ``holds``."""
        if not holds:
            self.add(what, found=found, expected=expected, fix=fix)

    def raise_any(self) -> None:
        """Raise what was collected as one ``UserError``; return when there is nothing."""
        if not self.errors:
            return
        if len(self.errors) == 1:
            raise self.errors[0]
        texts = [error.render().removeprefix("error: ") for error in self.errors]
        items = [f"{number}. " + indent(text, "   ").lstrip() for number, text in enumerate(texts, start=1)]
        raise UserError(f"{len(texts)} settings need a change\n" + indent("\n".join(items), "  "))


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like ``name``, or None when nothing is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return near[0] if near else None
