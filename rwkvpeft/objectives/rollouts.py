"""A model's answers to prompts and what was found of them, kept while several optimizer steps learn from them.

Letters: G answers to a prompt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rwkvpeft.atomic import write_whole
from rwkvpeft.errors import ContractError, UserError


@dataclass(frozen=True)
class Rollout:
    """The answers to one prompt; plain numbers, for they wait on the host and in files.

    Args:
        answers: tokens of each of the G answers.
        sampled: of each token the log-probability it was drawn with.
        ended: whether each answer found its end.
        rewards: of each function, by its name, the answers' rewards, not weighted.
        old: of each token the log-probability before the first step that learns from it, as the training computes it;
            none before that.
    """

    answers: Sequence[Sequence[int]]
    sampled: Sequence[Sequence[float]]
    ended: Sequence[bool]
    rewards: Mapping[str, Sequence[float]]
    old: Sequence[Sequence[float]] = ()


class KeptRollouts:
    """Rollouts by the place in the run that their prompts were drawn at.

    They are written to files of ``folder`` as they come, so that a run that is resumed between the steps of a
    generation goes on with the answers it had. The files say before which step they were drawn: what was drawn before
    the present one or later belongs to a run that was given up, and is not taken.

    Args:
        steps: optimizer steps that learn from the same answers.
    """

    def __init__(self, folder: Path, steps: int) -> None:
        self._folder = folder
        self._steps = steps
        self._found: dict[int, tuple[int, Rollout]] | None = None

    def find(self, places: Sequence[int], step: int) -> list[Rollout] | None:
        """The rollouts at ``places``, or None if not all of them were drawn in an earlier step of this generation.

        Raises: UserError for a file that cannot be read.
        """
        if self._found is None:
            self._found = self._read(step)
        self._found = {place: kept for place, kept in self._found.items() if kept[0] + self._steps > step}
        kept = [self._found[place] for place in places if place in self._found]
        earlier = [rollout for drawn, rollout in kept if drawn < step]
        return earlier if len(earlier) == len(places) else None

    def keep(self, places: Sequence[int], step: int, rollouts: Sequence[Rollout]) -> None:
        """Keep what was drawn before ``step`` + 1 was taken.

        Raises: NotWrittenError if the file cannot be written.
        """
        if self._found is None:
            raise ContractError("rollouts are looked for before any are kept")
        self._found |= {place: (step, rollout) for place, rollout in zip(places, rollouts, strict=True)}
        record = {"step": step, "places": list(places), "rollouts": [asdict(rollout) for rollout in rollouts]}
        path = self._folder / f"step-{step:08d}-place-{places[0]}.json"
        write_whole(path, lambda partial: partial.write_text(json.dumps(record), encoding="utf-8"))

    def _read(self, step: int) -> dict[int, tuple[int, Rollout]]:
        found: dict[int, tuple[int, Rollout]] = {}
        for path in sorted(self._folder.glob("step-*.json")):
            drawn = step_of(path)
            if drawn is not None and step - self._steps < drawn < step:
                found |= {place: (drawn, rollout) for place, rollout in _read_file(path)}
        return found


def _read_file(path: Path) -> list[tuple[int, Rollout]]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        rollouts = [Rollout(**rollout) for rollout in record["rollouts"]]
        return list(zip(record["places"], rollouts, strict=True))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as reason:
        raise UserError(f"{path}, the answers that this step learns from, cannot be read", found=reason,
                        fix="delete it: the prompts are answered anew, by the model as it is now") from reason


def step_of(path: Path) -> int | None:
    """The step before which a file's answers were drawn; None for another file."""
    parts = path.stem.split("-")
    return int(parts[1]) if len(parts) == 4 and parts[0] == "step" and parts[1].isdigit() else None

