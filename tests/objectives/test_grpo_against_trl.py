"""The loss of a group of answers against TRL's trainer, given the same log-probabilities."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from rwkvpeft.config.objective import RewardConfig
from rwkvpeft.objectives.policy_loss import Groups, PolicyLoss, Probabilities

LENGTHS = [5, 2, 7, 1]
LONGEST = 9
# of one group TRL's bnpo is what DAPO's formula says; its dapo is a mean over a whole batch
NAMES = {"grpo": "grpo", "dapo": "bnpo", "dr_grpo": "dr_grpo"}


@pytest.fixture
def said():
    """Log-probabilities of padded answers, new, old and of the reference, and which of them are there."""
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    new, old, reference = (-torch.rand(3, 4, max(LENGTHS), dtype=torch.float64) - 0.1).unbind()
    return new.requires_grad_(), old, reference, mask, torch.randn(4, dtype=torch.float64)


def trl_loss(said, settings):
    module = pytest.importorskip("trl.trainer.grpo_trainer")
    new, old, reference, mask, advantages = said
    # what it logs goes nowhere
    trainer = MagicMock()
    trainer.accelerator.gather = lambda values: values.detach().reshape(-1)
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (new, torch.zeros_like(old), None)
    trainer.aux_loss_enabled = trainer.use_vllm = trainer._entropy_bonus_enabled = False
    trainer.off_policy_mask_threshold = None
    trainer.top_entropy_quantile = 1.0
    trainer.importance_sampling_level, trainer.loss_type = "token", NAMES[settings.answer_mean]
    trainer.beta, trainer.epsilon_low, trainer.epsilon_high = settings.kl_beta, settings.clip_low, settings.clip_high
    trainer.args = SimpleNamespace(delta=None, use_bias_correction_kl=False)
    trainer.max_completion_length = settings.answer_tokens
    trainer.current_gradient_accumulation_steps = 1
    inputs = {
        "prompt_ids": torch.ones(4, 1).long(), "prompt_mask": torch.ones(4, 1).long(),
        "completion_ids": mask.long(), "completion_mask": mask.long(), "advantages": advantages,
        "old_per_token_logps": old, "ref_per_token_logps": reference,
    }
    return module.GRPOTrainer._compute_loss(trainer, None, inputs)


@pytest.mark.parametrize("kl_beta", [0.0, 0.2])
@pytest.mark.parametrize("answer_mean", NAMES)
def test_loss_and_gradients_of_a_group_are_trls(said, answer_mean, kl_beta):
    new, old, reference, mask, advantages = said
    settings = RewardConfig(answer_mean=answer_mean, kl_beta=kl_beta, clip_high=0.28, answer_tokens=LONGEST)
    expected = trl_loss(said, settings)
    packed = Probabilities(new[mask], old[mask], reference[mask] if kl_beta else None)
    kept = torch.ones(1, 4, dtype=torch.bool)
    found = PolicyLoss(settings)(packed, advantages[None], kept, Groups(torch.tensor(LENGTHS), 4))
    torch.testing.assert_close(found.total, expected, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(loss, new)[0] for loss in (found.total, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)
