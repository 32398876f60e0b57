"""The formulas where log-probabilities are extreme, KTO by hand, and what a batch of examples adds up to."""

from __future__ import annotations

import math

import pytest
import torch

from rwkvpeft.config.objective import PREFERENCES, WITH_REFERENCE
from rwkvpeft.objectives.preference.base import USUAL
from rwkvpeft.objectives.preference.kto import Kto, kto_kl, kto_losses
from rwkvpeft.objectives.preference.orpo import log_odds
from rwkvpeft.objectives.preference.scores import Scores
from rwkvpeft.objectives.preference.wpo import wpo_weights
from rwkvpeft.registry import OBJECTIVES, find


def objective(name, **settings):
    settings = {"beta": USUAL[name].beta, "length_norm": USUAL[name].length_norm} | settings
    return find(OBJECTIVES, name, flag="")(**settings)


def scores(logprobs, tokens):
    logprobs = torch.tensor(logprobs, dtype=torch.float32).requires_grad_()
    return logprobs, Scores(logprobs, torch.tensor(tokens, dtype=torch.float32), 2 * logprobs.detach())


@pytest.mark.parametrize("name", PREFERENCES)
@pytest.mark.parametrize(
    "answers", [(0.0, 0.0, 0.0), (0.0, -1e4, -1.0), (-1e4, 0.0, -1.0), (-1e-8, -1e-8, 0.0), (-1e4, -1e4, -1e4)]
)
def test_extreme_log_probabilities_have_finite_losses_and_gradients(name, answers):
    logprobs, policy = scores([answers], [[3, 2, 4]])
    reference = torch.tensor([answers[1:] + answers[:1]]) if name in WITH_REFERENCE else None
    found = objective(name).compare(policy, reference)
    (grad,) = torch.autograd.grad(found.losses, logprobs)
    assert found.losses.isfinite()
    assert grad.isfinite().all()
    assert all(figure.isfinite() for figure in found.figures.values())


@pytest.mark.parametrize("name", PREFERENCES)
def test_a_pair_without_scored_tokens_is_no_example(name):
    reference = torch.tensor([[-2.0, -3.0, -4.0]]) if name in WITH_REFERENCE else None
    with_nothing = None if reference is None else torch.cat([reference, torch.zeros(1, 3)])
    results = []
    for logprobs, tokens, compared in (
        ([[-3.0, -4.0, -1.0]], [[2, 3, 4]], reference),
        ([[-3.0, -4.0, -1.0], [0.0, 0.0, 0.0]], [[2, 3, 4], [0, 0, 0]], with_nothing),
    ):
        logprobs, policy = scores(logprobs, tokens)
        found = objective(name).compare(policy, compared)
        (grad,) = torch.autograd.grad(found.losses, logprobs)
        results.append([found.losses, found.examples, *found.figures.values(), grad[0]])
        assert not grad[1:].any()
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in PREFERENCES if name != "kto"])
def test_a_pair_of_which_one_answer_has_no_scored_token_is_no_example(name):
    logprobs, policy = scores([[-3.0, 0.0]], [[2, 0]])
    found = objective(name).compare(policy, torch.zeros(1, 2) if name in WITH_REFERENCE else None)
    assert found.losses == found.examples == 0
    assert not torch.autograd.grad(found.losses, logprobs)[0].any()


def kto_by_hand(ratios, present, beta, desirable, undesirable):
    """Equations 7 and 8 of the paper, one answer at a time."""
    others = [row[2] for row, there in zip(ratios, present, strict=True) if there[2]]
    kl = max(0.0, sum(others) / len(others)) if others else 0.0
    losses = []
    for row, there in zip(ratios, present, strict=True):
        for column, weight, sign in ((0, desirable, 1), (1, undesirable, -1)):
            if there[column]:
                value = weight / (1 + math.exp(-sign * beta * (row[column] - kl)))
                losses.append(weight - value)
    return sum(losses), len(losses), kl


@pytest.mark.parametrize("seed", range(4))
def test_kto_is_the_papers_with_answers_missing(seed):
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 3, (6, 3), generator=draw).double()
    present = tokens > 0
    policy, reference = 3 * torch.randn(2, 6, 3, generator=draw, dtype=torch.float64) * present
    ratios = policy - reference
    # on both sides of the bound at 0
    ratios[:, 2] += (1 if seed % 2 else -3) * present[:, 2]
    found = Kto(0.7, desirable=1.4, undesirable=0.6).compare(Scores(ratios + reference, tokens), reference)
    loss, examples, kl = kto_by_hand(ratios.tolist(), present.tolist(), 0.7, 1.4, 0.6)
    assert found.losses.item() == pytest.approx(loss, rel=1e-12)
    assert found.examples == examples
    assert (found.figures["kl"] / examples).item() == pytest.approx(kl, rel=1e-12)


def test_ktos_estimate_has_no_gradient_and_is_never_negative():
    ratios = torch.tensor([1.0, 3.0, -50.0], requires_grad=True)
    kl = kto_kl(ratios, torch.tensor([True, True, False]))
    assert kl == 2
    assert not kl.requires_grad
    assert kto_kl(-ratios, torch.tensor([True, True, False])) == 0
    assert kto_kl(ratios, torch.zeros(3, dtype=torch.bool)) == 0


def test_ktos_gradient_pulls_wanted_answers_up_and_others_down():
    ratios = torch.tensor([[0.2, 0.3]], requires_grad=True)
    (grad,) = torch.autograd.grad(kto_losses(ratios, torch.tensor(0.1), beta=0.5).sum(), ratios)
    assert grad[0, 0] < 0 < grad[0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_odds_are_those_of_the_probability(dtype):
    probabilities = torch.tensor([1e-6, 0.1, 0.5, 0.9, 0.999], dtype=torch.float64)
    expected = (probabilities / (1 - probabilities)).log()
    found = log_odds(probabilities.log().to(dtype))
    torch.testing.assert_close(found.double(), expected, rtol=2e-5 if dtype == torch.float32 else 1e-10, atol=1e-6)


def test_log_odds_have_the_gradient_of_finite_differences():
    logprobs = torch.tensor([-20.0, -1.0, -0.7, -0.6, -1e-3], dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(log_odds, logprobs)


def test_wpos_weights_are_at_most_one_and_without_gradient():
    logprobs = torch.tensor([[-1.0, -2.0], [-0.1, -0.2], [-1e4, -1e4]], requires_grad=True)
    weights = wpo_weights(logprobs, torch.tensor([[-0.5, -0.5], [-2.0, -2.0], [-1.0, -1.0]]))
    torch.testing.assert_close(weights, torch.tensor([math.exp(-2), 1.0, 0.0]))
    assert not weights.requires_grad


def test_accuracy_of_kto_is_that_of_pairs_and_of_single_answers_their_side_of_the_estimate():
    tokens = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 1]], dtype=torch.float32)
    # a pair in order, though both gain less than any answer; a wanted answer that gains less; another that does too
    ratios = torch.tensor([[-1.0, -2.0, 1.0], [0.5, 0.0, 1.0], [0.0, 0.5, 1.0]])
    found = Kto(1.0).compare(Scores(ratios, tokens), torch.zeros(3, 3))
    assert found.examples == 4
    assert found.figures["accuracy"] == 3


@pytest.mark.parametrize("name", PREFERENCES)
def test_figures_are_those_that_are_declared(name):
    _, policy = scores([[-3.0, -4.0, -1.0]], [[2, 3, 4]])
    found = objective(name).compare(policy, torch.zeros(1, 3) if name in WITH_REFERENCE else None)
    declared = find(OBJECTIVES, name, flag="").metric_names
    assert {*found.figures, "sft_loss"} == set(declared)
