"""Advantages against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from rwkvpeft.objectives.advantages import advantages, equal_groups

REWARDS = torch.tensor([[1.0, 0.0, 0.0, 3.0], [2.0, 2.0, 2.0, 6.0]], dtype=torch.float64)
# means 1 and 3; sums of squares 6 and 12; of all eight: mean 2, sum of squares 26
EXPECTED = {
    "centred": [[0.0, -1.0, -1.0, 2.0], [-1.0, -1.0, -1.0, 3.0]],
    "rloo": [[0.0, -4 / 3, -4 / 3, 8 / 3], [-4 / 3, -4 / 3, -4 / 3, 4.0]],
    "group": [[x / (2**0.5 + 1e-4) for x in (0, -1, -1, 2)], [x / (2 + 1e-4) for x in (-1, -1, -1, 3)]],
    "reinforce++": [
        [x / ((26 / 7) ** 0.5 + 1e-4) for x in (-1, -2, -2, 1)], [x / ((26 / 7) ** 0.5 + 1e-4) for x in (0, 0, 0, 4)]
    ],
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_advantages_are_those_worked_out_by_hand(kind):
    torch.testing.assert_close(advantages(REWARDS, kind), torch.tensor(EXPECTED[kind], dtype=torch.float64))


@pytest.mark.parametrize("kind", EXPECTED)
def test_equally_good_answers_have_no_advantage_whatever_their_mean_rounds_to(kind):
    rewards = torch.full((2, 3), 0.1)
    assert torch.equal(advantages(rewards, kind), torch.zeros(2, 3))


def test_rloo_compares_with_the_mean_of_the_others():
    rewards = torch.rand(3, 5, dtype=torch.float64)
    others = (rewards.sum(1, keepdim=True) - rewards) / 4
    torch.testing.assert_close(advantages(rewards, "rloo"), rewards - others)


def test_groups_of_equal_rewards_are_found():
    assert equal_groups(torch.tensor([[1.0, 1.0], [0.0, 1.0]])).tolist() == [True, False]
