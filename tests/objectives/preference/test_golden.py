"""The formulas against recorded losses and gradients with respect to every token's log-probability."""

from __future__ import annotations

import json
from typing import NamedTuple

import numpy as np
import pytest
import torch

from rwkvpeft.objectives.preference.dpo import dpo_losses
from rwkvpeft.objectives.preference.ipo import ipo_losses
from rwkvpeft.objectives.preference.orpo import odds_ratio_losses
from rwkvpeft.objectives.preference.simpo import simpo_losses

pytestmark = pytest.mark.golden


class Side(NamedTuple):
    """Sums and means of an answer's log-probabilities, of the policy and of what it gained over the reference."""

    sums: torch.Tensor
    means: torch.Tensor
    gains: torch.Tensor
    mean_gains: torch.Tensor
    nll: torch.Tensor


def side(policy, reference, mask):
    count = mask.sum(1)
    sums, gains = (policy * mask).sum(1), ((policy - reference) * mask).sum(1)
    return Side(sums, sums / count, gains, gains / count, -(policy * mask).sum() / count.sum())


def dpo(settings, won, lost):
    plain = {"beta": settings["beta"], "flip_share": settings.get("label_smoothing", 0.0)}
    return dpo_losses(won.gains, lost.gains, **plain)


FORMULAS = {
    "dpo_plus_nll": lambda s, won, lost: dpo(s, won, lost) + s["nll_weight"] * won.nll,
    "dpo_hinge": lambda s, won, lost: dpo_losses(won.gains, lost.gains, beta=s["beta"], hinge=True),
    "dpo": dpo,
    "ipo_sum": lambda s, won, lost: ipo_losses(won.gains, lost.gains, beta=s["beta"]),
    "ipo_mean": lambda s, won, lost: ipo_losses(won.mean_gains, lost.mean_gains, beta=s["beta"]),
    "orpo_lambda": lambda s, won, lost: won.nll + s["lambda"] * odds_ratio_losses(won.means, lost.means),
    "orpo_seqnll": lambda s, won, lost: -won.means + s["lambda"] * odds_ratio_losses(won.means, lost.means),
    "simpo": lambda s, won, lost: simpo_losses(won.means, lost.means, beta=s["beta"], gamma=s["gamma"]),
}
CASES = (
    "dpo_beta0.1", "dpo_beta0.5", "dpo_smoothed", "dpo_hinge", "dpo_plus_nll", "ipo_sum_beta0.1", "ipo_sum_beta0.5",
    "ipo_mean_beta0.1", "ipo_mean_beta0.5", "orpo_lambda0.1", "orpo_lambda0.5", "orpo_seqnll_lambda0.1",
    "orpo_seqnll_lambda0.5", "simpo_b2_g1", "simpo_b2.5_g0.5",
)


@pytest.fixture(scope="module")
def recorded(golden):
    settings = json.loads((golden / "losses.json").read_text())["preference"]
    assert set(settings) == set(CASES)
    return settings, dict(np.load(golden / "preference_losses.npz"))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_the_recorded_ones(recorded, case, dtype, limit):
    settings, arrays = recorded
    sides, policies = [], []
    for answer in ("chosen", "rejected"):
        parts = [torch.from_numpy(arrays[f"{kind}_{answer}"]) for kind in ("policy_logp", "ref_logp", "mask")]
        policies.append(parts[0].to(dtype).requires_grad_())
        sides.append(side(policies[-1], parts[1].to(dtype), parts[2]))
    formula = next(FORMULAS[name] for name in FORMULAS if case.startswith(name))
    losses = formula(settings[case], *sides)
    grads = torch.autograd.grad(losses.mean(), policies)
    found = {"loss": losses.mean(), "dpolicy_chosen": grads[0], "dpolicy_rejected": grads[1]}
    # what is recorded of each pair lacks the cross entropy where that is a mean over the tokens of all pairs
    if not case.startswith(("dpo_plus_nll", "orpo_lambda")):
        found["per_example"] = losses
    for name, value in found.items():
        expected = torch.from_numpy(np.asarray(arrays[f"{case}|{name}"]))
        scale = max(expected.abs().max().item(), 1.0 if name == "loss" else 1e-3)
        assert (value.detach().double() - expected).abs().max() <= limit * scale, name
