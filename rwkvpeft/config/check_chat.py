"""Which settings of ``--check`` go together."""

from __future__ import annotations

from rwkvpeft.config.findings import Findings
from rwkvpeft.config.groups import DataConfig


def check_chat(data: DataConfig, findings: Findings) -> None:
    """Note what the report on a data set cannot be combined with, and that it needs data."""
    if data.check:
        findings.check(bool(data.data_file), "--check: no data are given", fix="--data_file FILE.jsonl")
        findings.check(not data.preview, "--check and --preview both print and exit", fix="one after the other")
