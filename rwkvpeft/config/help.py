"""What ``--help`` says of each flag."""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
from typing import Any

from rwkvpeft.config import upstream
from rwkvpeft.config.flags import FlagSpec, specs


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Wide enough for the long flags, never wider than a page."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=_width())


def _width() -> int:
    return max(60, min(shutil.get_terminal_size((110, 24)).columns, 120)) - 2


def help_text(spec: FlagSpec) -> str:
    """The flag's sentence, its default and its unit."""
    return f"{spec.help} {_default(spec)}".strip().replace("%", "%%")


def _default(spec: FlagSpec) -> str:
    facts = [spec.unit] if spec.unit else []
    if spec.default is not None and spec.default not in ("", {}) and spec.default is not False:
        facts.append(f"default: {_shown(spec.default)}")
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
    """A method's own settings, one paragraph each."""
    paragraphs = []
    for spec in specs(settings):
        name = f"{spec.name} ({spec.alias})" if spec.alias else spec.name
        text = f"{spec.help} {_default(spec)}".strip()
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
