"""Make problems in addition: for imitation answers of a careless pupil, for rewards the problems alone.

    python scripts/arithmetic/problems.py --output out/arithmetic

Writes three files: ``demonstrations.jsonl``, several answers to each problem, a share of which is wrong;
``train.jsonl``, the same problems once, with the right ``answer`` that ``reward.py`` compares with; and
``heldout.jsonl``, other problems. A model that imitates the first is as careless; rewards can teach it better.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ERRORS = (-10, -2, -1, 1, 2, 10)


def main() -> int:
    """Write the files and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("out/arithmetic"), help="folder of the files")
    parser.add_argument("--largest", type=int, default=19, help="largest number that is added (default: %(default)s)")
    parser.add_argument("--held_out", type=int, default=100, help="problems put apart (default: %(default)s)")
    parser.add_argument("--demonstrations", type=int, default=16, help="answers to each (default: %(default)s)")
    parser.add_argument("--careless", type=float, default=0.3, help="share of wrong ones (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (default: %(default)s)")
    flags = parser.parse_args()
    draw = random.Random(flags.seed)
    pairs = [(a, b) for a in range(flags.largest + 1) for b in range(flags.largest + 1)]
    if not 0 < flags.held_out < len(pairs):
        parser.error(f"--held_out must be between 1 and {len(pairs) - 1}")
    draw.shuffle(pairs)
    held_out, trained = pairs[: flags.held_out], pairs[flags.held_out :]
    shown = trained * flags.demonstrations
    draw.shuffle(shown)
    write(flags.output / "demonstrations.jsonl", [demonstration(a, b, flags.careless, draw) for a, b in shown])
    write(flags.output / "train.jsonl", [problem(a, b) for a, b in trained])
    write(flags.output / "heldout.jsonl", [problem(a, b) for a, b in held_out])
    return 0


def demonstration(a: int, b: int, careless: float, draw: random.Random) -> dict[str, str]:
    """A question and an answer, which is wrong with probability ``careless``."""
    error = draw.choice(ERRORS) if draw.random() < careless else 0
    return {"text": f"{a}+{b}={abs(a + b + error)}"}


def problem(a: int, b: int) -> dict[str, str | bool]:
    """A question and what is right."""
    # as it is, without the turns of a conversation
    return {"prompt": f"{a}+{b}=", "raw": True, "answer": str(a + b)}


def write(path: Path, records: Sequence[Mapping[str, str | bool]]) -> None:
    """Write one record a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    print(f"{path}: {len(records)} records")


if __name__ == "__main__":
    sys.exit(main())
