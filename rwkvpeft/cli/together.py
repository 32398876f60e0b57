"""The processes that train together, as the training command sees them; alone it has nobody to wait for."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from rwkvpeft.config.groups import TrainConfig
from rwkvpeft.config.launcher import Launch, read_launch
from rwkvpeft.config.parse import build_groups

if TYPE_CHECKING:
    from rwkvpeft.training.peers import Peers

_NEEDED = ("proj_dir", "resume", "peer_timeout")


class Alone:
    """A run of one process: the verbs of ``Peers``, which have nothing to do."""

    def __enter__(self) -> Alone:
        return self

    def __exit__(self, *error: object) -> None:
        return

    def wait(self) -> None:
        """Nobody goes first."""

    def doing(self, what: str) -> None:
        """Nobody asks."""

    def follow(self, config: TrainConfig) -> TrainConfig:
        """The settings as they are."""
        return config

    def agree(self, what: Mapping[str, Any]) -> None:
        """Nobody disagrees."""

    def ready(self, words: Sequence[str]) -> None:
        """Nobody waits."""

    def callbacks(self) -> list[Any]:
        """Nothing to note."""
        return []


def find_launch(given: dict[str, Any]) -> tuple[Launch, list[str]]:
    """Which process this is; ``given`` takes devices and machines from the launcher. Returns also remarks.

    Raises: UserError if launcher and flags contradict each other.
    """
    launch = read_launch(os.environ, given.get("devices"), given.get("num_nodes"))
    if not launch.by or launch.by == "python train.py":
        return launch, []
    there = {"devices": launch.devices, "num_nodes": launch.num_nodes}
    taken = {name: number for name, number in there.items() if given.get(name, 1) != number}
    given |= there
    words = " ".join(f"--{name} {number}" for name, number in taken.items())
    return launch, [f"{words}: so {launch.by} started the processes"] if taken else []


def join_others(launch: Launch, given: Mapping[str, Any]) -> AbstractContextManager[Peers | Alone]:
    """The other processes for the length of a ``with`` block.

    Raises: UserError if they cannot be reached.
    """
    if launch.world_size == 1 or any(given.get(name) for name in ("check", "preview")) or _only_draws(given):
        return Alone()
    from rwkvpeft.training.peers import Peers

    early = build_groups({name: given[name] for name in _NEEDED if name in given})
    return Peers(launch, early.output, early.faults.peer_timeout)


def leaves_it_to_the_first(launch: Launch, given: Mapping[str, Any]) -> bool:
    """Whether this process has nothing to do, because the first one does all there is."""
    return not launch.leads and (bool(given.get("check") or given.get("preview")) or _only_draws(given))


def _only_draws(given: Mapping[str, Any]) -> bool:
    return bool(given.get("train_stage", 0) == 1)
