"""Drawing tokens."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkvpeft.data.sampling import mix
from rwkvpeft.errors import UserError
from rwkvpeft.generation.sampling import RowSampler, Sampler, SamplingConfig

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


@pytest.mark.parametrize(
    "setting",
    [{"temperature": 1e-46}, {"temperature": float("inf")}, {"presence_penalty": float("nan")},
     {"frequency_penalty": float("-inf")}],
)  # fmt: skip
def test_settings_under_which_logits_are_no_numbers_are_refused(setting):
    with pytest.raises(UserError, match="out of range"):
        SamplingConfig(**setting)


def test_a_very_low_temperature_does_not_underflow():
    assert set(draws(50, temperature=0.01)) == set(draws(50, temperature=1e-6)) == {0}


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


def drawn_plainly(logits, seed, number, config):
    """The token of one row by the definition, with everything sorted."""
    probabilities = logits.double().softmax(0)
    ordered = probabilities.sort(descending=True).values
    kept = int((ordered.cumsum(0) < config.top_p).sum()) + 1
    kept = min(kept, config.top_k or kept, len(ordered))
    weights = probabilities.where(probabilities >= ordered[kept - 1], 0) ** (1 / config.temperature)
    sums = (weights / weights.sum()).cumsum(0)
    return int((sums <= (mix(seed, number) >> 16) / 2**48).sum())


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**63),
    # all likely tokens are among the first few, or they are not
    spread=st.sampled_from([0.0, 0.3, 3.0]),
    is_coarse=st.booleans(),
    top_p=st.sampled_from([0.0, 0.3, 0.9, 0.999, 1.0]),
    top_k=st.sampled_from([0, 2, 50, 400, 5000]),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
)
def test_rows_are_drawn_by_the_definition(seed, spread, is_coarse, top_p, top_k, temperature):
    config = SamplingConfig(temperature=temperature, top_p=top_p, top_k=top_k)
    logits = spread * torch.randn(3, 700, generator=torch.Generator().manual_seed(seed % 2**63))
    # equally likely tokens stay or go together
    logits = logits.round() if is_coarse else logits
    sampler = RowSampler(config, [seed, seed + 1, seed + 2])
    for number in range(3):
        expected = [drawn_plainly(row, seed + place, number, config) for place, row in enumerate(logits)]
        assert sampler.draw(logits).tokens.tolist() == expected


def test_rows_keep_their_numbers_and_penalties_when_others_come_and_go():
    config = SamplingConfig(top_p=1.0, temperature=2.0, presence_penalty=1.0, frequency_penalty=0.5)
    sampler = RowSampler(config, [1, 2, 3])
    rows = [sampler.draw(LOGITS.expand(3, -1)).tokens.tolist() for _ in range(5)]
    sampler.select([2, 1])
    sampler.restart(1, 9)
    rows += [sampler.draw(LOGITS.expand(2, -1)).tokens.tolist() for _ in range(5)]
    for found, seed in (([row[2] for row in rows[:5]] + [row[0] for row in rows[5:]], 3),
                        ([row[1] for row in rows[5:]], 9)):
        alone = RowSampler(config, [seed])
        assert found == [int(alone.draw(LOGITS[None]).tokens) for _ in found]


def test_the_log_probability_is_that_of_the_model_at_the_temperature():
    config = SamplingConfig(top_p=0.5, temperature=2.0, presence_penalty=5.0)
    sampler = RowSampler(config, [0])
    for _ in range(3):
        drawn = sampler.draw(LOGITS[None])
        expected = (LOGITS / 2).log_softmax(0)[drawn.tokens]
        torch.testing.assert_close(drawn.logprobs, expected)
    greedy = RowSampler(SamplingConfig(temperature=0), [0]).draw(LOGITS[None])
    torch.testing.assert_close(greedy.logprobs, LOGITS[:1])


def test_one_row_without_a_number_is_refused():
    logits = torch.zeros(2, 4)
    logits[1] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        RowSampler(SamplingConfig(), [0, 1]).draw(logits)
