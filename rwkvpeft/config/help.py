"""What ``--help`` says of each flag."""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
from dataclasses import MISSING, fields
from typing import Any

from rwkvpeft.config import upstream
from rwkvpeft.config.flags import FlagSpec

_LONGEST_HELP = 400


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Wide enough for the long flags, never wider than a page."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=_width())


def _width() -> int:
    return max(60, min(shutil.get_terminal_size((110, 24)).columns, 120)) - 2


def help_text(spec: FlagSpec) -> str:
    """The flag's sentence, its default and its unit."""
    return f"{spec.help} {_default(spec.default, spec.unit)}".strip().replace("%", "%%")


def _default(default: Any, unit: str = "") -> str:
    facts = [unit] if unit else []
    if default is not None and default not in ("", {}) and default is not False:
        facts.append(f"default: {_shown(default)}")
    return f"({'; '.join(facts)})" if facts else ""


def _shown(default: Any) -> str:
    if isinstance(default, dict):
        return json.dumps(default)
    return (
        " ".join(default)
        if isinstance(default, list)
        else f"{default:g}"
        if isinstance(default, float)
        else str(default)
    )


def method_lines(settings: type) -> str:
    """A method's own settings, one paragraph each; ``settings`` is a dataclass of ours or of another package."""
    paragraphs = []
    for item in fields(settings):
        if not item.init:
            continue
        # other packages write whole pages, or nothing
        told = textwrap.shorten(str(item.metadata.get("help") or ""), _LONGEST_HELP, placeholder=" ...")
        default = item.default if item.default_factory is MISSING else item.default_factory()
        text = f"{told} {_default(None if default is MISSING else default, item.metadata.get('unit', ''))}".strip()
        alias = item.metadata.get("alias")
        name = f"{item.name} ({alias})" if alias else item.name
        paragraphs.append(textwrap.fill(f"{name:<24}  {text}", _width() - 2, subsequent_indent=" " * 26))
    return "\n".join(paragraphs) or "no settings"


def upstream_lines() -> str:
    """The flags of RWKV-PEFT and RWKV-LM that are not fields, in two lists."""
    lines = ["also understood, as RWKV-PEFT and RWKV-LM write them:"]
    for name, known in upstream.FLAGS.items():
        if known.translated:
            lines.append(textwrap.fill(f"  --{name:<20} {known.reason}", _width(), subsequent_indent=" " * 25))
    silent = ", ".join(f"--{name}" for name, known in upstream.FLAGS.items() if not known.translated)
    lines.append("")
    lines.append(
        textwrap.fill(f"accepted at upstream's default only, since they change nothing here: {silent}", _width())
    )
    return "\n".join(lines)
