"""How much better an answer was than the others to its prompt.

Letters: P prompts, G answers to each; r rewards.

    group        (r - mean) / (std + 1e-4) of the group        DeepSeekMath, arXiv 2402.03300, section 4.1
    centred      r - mean of the group                          Dr. GRPO, arXiv 2503.20783, section 3.2
    rloo         r - mean of the group's other answers          RLOO, arXiv 2402.14740, equation 9
    reinforce++  (r - mean) / (std + 1e-4) of all answers       REINFORCE++, arXiv 2501.03262, section 3.3

Deviations are those of a sample (divided by n - 1); the 1e-4 is TRL's, so that answers that are all but equally good
are not told apart by round-off.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

_LEAST_DEVIATION = 1e-4


def advantages(rewards: Tensor, kind: str) -> Tensor:
    """The advantage of each answer, (P, G); exactly 0 in a group (reinforce++: a batch) of equal rewards.

    Args:
        rewards: (P, G) of a floating dtype; G at least 2.
        kind: a name of the module's table.
    """
    # of equal numbers the mean may differ by its last bit, which a small deviation would blow up
    together = rewards.flatten() if kind == "reinforce++" else rewards
    equal = together.amax(-1, keepdim=True) == together.amin(-1, keepdim=True)
    found = _KINDS[kind](together).masked_fill(equal, 0.0)
    return found.view_as(rewards)


def equal_groups(rewards: Tensor) -> Tensor:
    """(P,) whether all answers to a prompt were equally good, so that there is nothing to learn from them."""
    return rewards.amax(1) == rewards.amin(1)


def _centred(rewards: Tensor) -> Tensor:
    return rewards - rewards.mean(-1, keepdim=True)


def _scaled(rewards: Tensor) -> Tensor:
    return _centred(rewards) / (rewards.std(-1, keepdim=True) + _LEAST_DEVIATION)


def _against_others(rewards: Tensor) -> Tensor:
    count = rewards.shape[-1]
    # r_i - (sum - r_i) / (G - 1)
    return _centred(rewards) * (count / (count - 1))


_KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "group": _scaled,
    "centred": _centred,
    "rloo": _against_others,
    "reinforce++": _scaled,
}
