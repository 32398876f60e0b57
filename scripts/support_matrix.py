"""Run the contract tests of every adapter on every base and write what passed as a table into README.md.

    python scripts/support_matrix.py            run the tests, write the table
    python scripts/support_matrix.py --check    run the tests, fail if README.md says something else
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from rwkvpeft.registry import ADAPTERS

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
START = "<!-- support matrix: written by scripts/support_matrix.py -->"
END = "<!-- end of the support matrix -->"
BASES = ("fp32", "bf16", "int8", "nf4", "fp4", "fp8")
VERSIONS = {"x052": "v5", "x060": "v6", "x070": "v7"}
CHECKS = 6


def main() -> int:
    """Run, then write or compare. Returns 1 if a test failed or, with --check, the table is another one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with README.md, write nothing")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "support.json"
        words = [sys.executable, "-m", "pytest", "tests/contracts", "-q", "--support-report", str(report)]
        code = subprocess.run(words, cwd=ROOT, check=False).returncode
        outcomes = json.loads(report.read_text(encoding="utf-8"))
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(START)
    after = rest.split(END)[1]
    new = f"{before}{START}\n{table(outcomes)}\n{END}{after}"
    if flags.check:
        return 1 if code or new != text else 0
    README.write_text(new, encoding="utf-8")
    return code


def table(outcomes: dict[str, dict[str, str]]) -> str:
    """One row for each method, one column for each base; versions are named only where not all of them passed."""
    passed: dict[str, dict[str, list[str]]] = {}
    for combination, checks in outcomes.items():
        method, base, version = combination.rsplit("-", 2)
        cell = passed.setdefault(method, {}).setdefault(base, [])
        if len(checks) == CHECKS and set(checks.values()) == {"passed"}:
            cell.append(VERSIONS[version])
    lines = ["| `--peft` | " + " | ".join(BASES) + " |", "|---|" + "---|" * len(BASES)]
    # ours first, then those of Hugging Face
    for method, row in sorted(passed.items(), key=lambda item: (item[0].partition("+")[0] not in ADAPTERS, item[0])):
        lines.append(f"| {method} | " + " | ".join(_cell(row.get(base)) for base in BASES) + " |")
    return "\n".join(lines)


def _cell(versions: list[str] | None) -> str:
    if versions is None:
        return " "
    return "yes" if len(versions) == len(VERSIONS) else ", ".join(sorted(versions)) or "no"


if __name__ == "__main__":
    sys.exit(main())
