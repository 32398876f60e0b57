"""Which settings of rows go together."""

from __future__ import annotations

from rwkvpeft.config.findings import Findings
from rwkvpeft.config.groups import DataConfig


def check_rows(data: DataConfig, findings: Findings) -> None:
    """Note what batches of similar lengths cannot be combined with."""
    if data.length_buckets:
        findings.check(
            data.dataload == "pad",
            "--length_buckets puts padded documents of similar lengths together, and --dataload is not pad",
            found=f"--dataload {data.dataload}",
            fix="leave --length_buckets out, or --dataload pad",
        )
        findings.check(
            bool(data.data_shuffle),
            "--length_buckets changes the order of the documents, and --data_shuffle 0 keeps the file's",
            fix="leave one of the two out",
        )
