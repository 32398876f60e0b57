"""Losses and gradients against TRL's own code, given the same log-probabilities of tokens."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from rwkvpeft.objectives.preference.cpo import Cpo
from rwkvpeft.objectives.preference.dpo import Dpo
from rwkvpeft.objectives.preference.ipo import Ipo
from rwkvpeft.objectives.preference.kto import Kto
from rwkvpeft.objectives.preference.orpo import Orpo
from rwkvpeft.objectives.preference.scores import Scores
from rwkvpeft.objectives.preference.simpo import Simpo
from rwkvpeft.objectives.preference.wpo import Wpo

# importing it takes ten seconds
pytestmark = pytest.mark.slow
PAIRS, LONGEST, VOCABULARY = 5, 9, 6


class Machine:
    """One process, as TRL asks about it."""

    device = torch.device("cpu")

    @staticmethod
    def gather(tensor):
        return tensor

    gather_for_metrics = gather


class Said:
    """What a model and its reference say of chosen, rejected and other answers, and how long these are."""

    def __init__(self, *, alike=False):
        """``alike``: the answers are the likeliest tokens, so that WPO's weights go beyond 1."""
        draw = torch.Generator().manual_seed(3)
        logits = 2 * torch.randn(3, PAIRS, LONGEST, VOCABULARY, generator=draw, dtype=torch.float64)
        log_softmax = logits.log_softmax(-1)
        labels = torch.randint(VOCABULARY, (3, PAIRS, LONGEST, 1), generator=draw)
        if alike:
            labels = logits.argmax(-1, keepdim=True)
        self.lengths = torch.randint(1, LONGEST + 1, (3, PAIRS), generator=draw)
        self.mask = torch.arange(LONGEST) < self.lengths[..., None]
        self.tokens = (log_softmax.gather(-1, labels).squeeze(-1) * self.mask).requires_grad_()
        self.collisions = (2 * log_softmax).logsumexp(-1) * self.mask
        noise = 0.5 * torch.randn(3, PAIRS, generator=draw, dtype=torch.float64)
        self.reference = self.tokens.detach().sum(-1) + noise

    def scores(self):
        """What our losses take, and the reference, (P, 3)."""
        mine = (self.tokens.sum(-1), self.lengths.double(), self.collisions.sum(-1))
        return Scores(*(part.T for part in mine)), self.reference.T

    def ours(self, objective):
        """Mean loss and the gradients of the tokens' log-probabilities."""
        policy, reference = self.scores()
        found = objective.compare(policy, reference if objective.name in ("dpo", "ipo", "wpo", "kto") else None)
        return self.with_gradient(found.losses / found.examples)

    def with_gradient(self, loss):
        return loss.detach(), torch.autograd.grad(loss, self.tokens)[0]

    def means(self):
        return (self.tokens.sum(-1) / self.lengths)[:2]


def trainer(**settings):
    """The attributes of a trainer that its loss reads."""
    return SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=Machine, aux_loss_enabled=False, precompute_ref_logps=True,
        _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1, **settings,
    )


def output(tokens, collisions):
    nothing = torch.zeros_like(tokens)
    return SimpleNamespace(
        log_probs=tokens, log_sum_sq_probs=collisions, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool()
    )


def masks(mask):
    """TRL's inputs for answers behind a prompt of one token."""
    mask = torch.cat([torch.zeros_like(mask[:, :1]), mask], 1).long()
    return {"input_ids": torch.ones_like(mask), "completion_mask": mask, "attention_mask": torch.ones_like(mask)}


def trl_dpo(said, *, loss_type, beta, weighted=False):
    module = pytest.importorskip("trl.trainer.dpo_trainer")
    settings = trainer(
        ld_alpha=None, loss_types=[loss_type], loss_weights=[1.0], beta=beta, label_smoothing=0.0,
        use_weighting=weighted, f_divergence_type="reverse_kl",
    )
    answers = output(said.tokens[:2].flatten(0, 1), said.collisions[:2].flatten(0, 1))
    inputs = masks(said.mask[:2].flatten(0, 1))
    inputs |= {"ref_chosen_logps": said.reference[0], "ref_rejected_logps": said.reference[1]}
    return said.with_gradient(module.DPOTrainer._compute_loss(settings, lambda **_: answers, inputs, False))


def trl_kto(said, *, beta, desirable, undesirable):
    module = pytest.importorskip("trl.trainer.kto_trainer")
    settings = trainer(
        calculate_KL=True, loss_type="kto", beta=beta, desirable_weight=desirable, undesirable_weight=undesirable
    )
    settings._compute_kl_logps = lambda model, batch: said.tokens[2].detach().sum(-1)
    answers = output(said.tokens[:2].flatten(0, 1), said.collisions[:2].flatten(0, 1))
    inputs = masks(said.mask[:2].flatten(0, 1))
    inputs |= {
        "label": torch.arange(2 * PAIRS) < PAIRS, "ref_logps": said.reference[:2].flatten(),
        "ref_KL_logps": said.reference[2],
    }
    return said.with_gradient(module.KTOTrainer._compute_loss(settings, lambda **_: answers, inputs, False))


def trl_cpo(said, values, **settings):
    module = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
    losses = module.CPOTrainer.cpo_loss(SimpleNamespace(accelerator=Machine, alpha=0.0, **settings), *values)[0]
    return said.with_gradient(losses.mean())


def same(ours, theirs, limit=1e-12):
    torch.testing.assert_close(ours[0], theirs[0].double(), rtol=limit, atol=limit)
    torch.testing.assert_close(ours[1], theirs[1].double(), rtol=limit, atol=limit)


@pytest.mark.parametrize("beta", [0.1, 1.5])
def test_dpo(beta):
    said = Said()
    same(said.ours(Dpo(beta)), trl_dpo(said, loss_type="sigmoid", beta=beta))


@pytest.mark.parametrize("beta", [0.1, 1.5])
def test_dpo_with_a_hinge(beta):
    said = Said()
    same(said.ours(Dpo(beta, hinge=True)), trl_dpo(said, loss_type="hinge", beta=beta))


def test_dpo_by_means():
    said = Said()
    same(said.ours(Dpo(0.5, length_norm=True)), trl_dpo(said, loss_type="sigmoid_norm", beta=0.5))


def test_dpo_with_label_smoothing():
    """TRL's DPO has none any more; its CPO has, and is given what the policy gained over the reference."""
    said = Said()
    gains = said.tokens.sum(-1)[:2] - said.reference[:2]
    theirs = trl_cpo(said, gains, beta=0.5, loss_type="sigmoid", label_smoothing=0.2)
    same(said.ours(Dpo(0.5, flip_share=0.2)), theirs)


def test_ipo_by_means():
    said = Said()
    same(said.ours(Ipo(0.2, length_norm=True)), trl_dpo(said, loss_type="ipo", beta=0.2))


def test_ipo_by_sums():
    said = Said()
    gains = said.tokens.sum(-1)[:2] - said.reference[:2]
    same(said.ours(Ipo(0.2)), trl_cpo(said, gains, beta=0.2, loss_type="ipo", label_smoothing=0.0))


def test_wpo():
    said = Said()
    weights = (said.tokens.detach() - said.collisions).sum(-1) / said.lengths
    assert (weights[:2].sum(0) < 0).all()
    same(said.ours(Wpo(0.1)), trl_dpo(said, loss_type="sigmoid", beta=0.1, weighted=True))


def test_wpo_counts_no_pair_more_than_once_where_trl_does():
    said = Said(alike=True)
    ours, theirs = said.ours(Wpo(0.1)), trl_dpo(said, loss_type="sigmoid", beta=0.1, weighted=True)
    assert ours[0] < theirs[0]
    same(ours, said.ours(Dpo(0.1)))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cpo(smoothing):
    said = Said()
    theirs = trl_cpo(said, said.tokens.sum(-1)[:2], beta=0.3, loss_type="sigmoid", label_smoothing=smoothing)
    same(said.ours(Cpo(0.3, flip_share=smoothing)), theirs)


def test_cpo_with_a_hinge():
    said = Said()
    theirs = trl_cpo(said, said.tokens.sum(-1)[:2], beta=0.3, loss_type="hinge", label_smoothing=0.0)
    same(said.ours(Cpo(0.3, hinge=True)), theirs)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_simpo(smoothing):
    said = Said()
    theirs = trl_cpo(
        said, said.means(), beta=2.0, loss_type="simpo", label_smoothing=smoothing, simpo_gamma=0.7
    )
    same(said.ours(Simpo(2.0, gamma=0.7, length_norm=True, flip_share=smoothing)), theirs)


def test_orpo():
    module = pytest.importorskip("trl.experimental.orpo.orpo_trainer")
    said = Said()
    settings = SimpleNamespace(accelerator=Machine, beta=0.4)
    # what TRL takes off the cross entropy, in fp32
    theirs = said.with_gradient(-module.ORPOTrainer.odds_ratio_loss(settings, *said.means())[0].mean())
    same(said.ours(Orpo(0.4, length_norm=True)), theirs, limit=1e-6)


@pytest.mark.parametrize("shift", [1.0, 0.0])
@pytest.mark.parametrize(("desirable", "undesirable"), [(1.0, 1.0), (1.3, 0.4)])
def test_kto(desirable, undesirable, shift):
    said = Said()
    said.reference[2] -= shift
    # with and without an estimate above 0
    assert ((said.tokens[2].sum(-1) - said.reference[2]).mean() > 0) == bool(shift)
    ours = said.ours(Kto(0.3, desirable=desirable, undesirable=undesirable))
    same(ours, trl_kto(said, beta=0.3, desirable=desirable, undesirable=undesirable))
