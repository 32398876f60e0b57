"""Drawing tokens."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from rwkvpeft.errors import UserError
from rwkvpeft.generation.sampling import Sampler, SamplingConfig

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0]).log_softmax(0)


def draws(count: int = 2000, logits=LOGITS, **settings) -> Counter:
    config = SamplingConfig(**{"top_p": 1.0, "seed": 3, **settings})
    sampler = Sampler(config)
    return Counter(sampler.draw(logits) for _ in range(count))


def test_temperature_zero_takes_the_likeliest():
    assert set(draws(50, temperature=0.0)) == {0}


def test_temperature_one_draws_by_probability():
    counts = draws()
    for token in range(4):
        assert counts[token] / 2000 == pytest.approx(LOGITS[token].exp().item(), abs=0.04)


def test_a_higher_temperature_flattens_and_a_lower_one_sharpens():
    plain, hot, cold = draws(), draws(temperature=2.0), draws(temperature=0.5)
    assert cold[0] > plain[0] > hot[0]


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    # probabilities 0.64, 0.24, 0.09, 0.03
    assert set(draws(500, top_p=0.5)) == {0}
    assert set(draws(500, top_p=0.7)) == {0, 1}
    assert set(draws(500, top_p=0.0)) == {0}


def test_top_k_keeps_at_most_so_many():
    assert set(draws(500, top_k=2)) == {0, 1}
    assert set(draws(50, top_k=1)) == {0}
    assert set(draws(500, top_k=99)) >= {0, 1, 2}


def test_a_very_low_temperature_does_not_underflow():
    assert set(draws(50, temperature=0.01)) == {0}


def test_a_seed_gives_the_same_tokens_again():
    def drawn(seed):
        sampler = Sampler(SamplingConfig(top_p=1.0, seed=seed))
        return [sampler.draw(LOGITS) for _ in range(30)]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_penalties_lower_what_was_drawn_and_fade():
    logits = torch.tensor([1.0, 0.5, 0.0])
    sampler = Sampler(SamplingConfig(temperature=0, presence_penalty=0.3, frequency_penalty=0.4, penalty_decay=0.5))
    # after 0 once: 1 - 0.3 - 0.4 < 0.5; then both are penalised, 0 by the faded count
    assert [sampler.draw(logits) for _ in range(3)] == [0, 1, 0]
    sampler.forget()
    assert sampler.draw(logits) == 0


def test_logits_are_left_as_they_were():
    logits = LOGITS.clone()
    sampler = Sampler(SamplingConfig(presence_penalty=1.0))
    sampler.draw(logits)
    sampler.draw(logits)
    assert torch.equal(logits, LOGITS)


@pytest.mark.parametrize("settings", [{"temperature": -1}, {"top_p": 1.5}, {"top_k": -2}, {"penalty_decay": 2}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(UserError, match="out of range"):
        SamplingConfig(**settings)


def test_logits_without_a_number_are_refused():
    with pytest.raises(UserError, match="not finite"):
        Sampler(SamplingConfig()).draw(torch.full((4,), torch.nan))
