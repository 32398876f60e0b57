"""What a flag of another toolkit means here, or why it means nothing."""

from __future__ import annotations

from dataclasses import dataclass

from rwkvpeft.config.flags import Kind


@dataclass(frozen=True)
class UpstreamFlag:
    """A flag accepted only at ``default`` unless ``translated``; then ``reason`` says what it means here."""

    default: str
    reason: str
    fix: str | None = None
    kind: Kind = "text"
    translated: bool = False


def means(meaning: str, default: str = "", kind: Kind = "text") -> UpstreamFlag:
    """A flag that is translated."""
    return UpstreamFlag(default, meaning, kind=kind, translated=True)


def nothing(default: object, reason: str, fix: str | None = None, kind: Kind = "text") -> UpstreamFlag:
    """A flag that is refused at any value but its default."""
    return UpstreamFlag(str(default), reason, fix, kind)
