"""A prompt that is read once for all its answers against a pass over each answer behind its prompt."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkvpeft.config.objective import PREFERENCES, WITH_REFERENCE
from rwkvpeft.objectives.base import Provided
from rwkvpeft.objectives.preference.base import USUAL
from rwkvpeft.objectives.preference.scores import Scores, score_answers, some_answers
from rwkvpeft.registry import MODELS, OBJECTIVES, find

VERSIONS = sorted(MODELS)
RAGGED = ((4, 3, 5), (1, 2, 1), (9, 1, 40), (2, 6, 6), (35, 1, 33))
LIMITS = {torch.float64: 1e-10, torch.float32: 2e-5}


def separate_scores(model, made):
    """The same as ``score_answers``, with one pass over each answer behind its prompt and all logits at once."""
    sums, tokens, collisions = [], [], []
    for prompt, answers in zip(made.prompts, made.answers, strict=True):
        for answer in answers:
            tokens.append(float(len(answer)))
            if not answer:
                zero = model.head.weight.new_zeros((), dtype=model.compute_dtype)
                sums.append(zero)
                collisions.append(zero)
                continue
            logits, _ = model(torch.tensor([[*prompt, *answer[:-1]]]))
            told = logits[0, len(prompt) - 1 :].log_softmax(-1)
            sums.append(told.gather(1, torch.tensor(answer)[:, None]).sum())
            collisions.append((2 * told).logsumexp(1).sum())
    rows = len(made.prompts)
    stacked = [torch.stack(sums), torch.tensor(tokens).to(sums[0]), torch.stack(collisions).detach()]
    return Scores(*(part.view(rows, -1) for part in stacked))


def gradients(model, value):
    wanting = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    # of no answer at all
    value = value if value.requires_grad else value + 0 * next(iter(wanting.values())).sum()
    grads = torch.autograd.grad(value, list(wanting.values()), materialize_grads=True)
    return dict(zip(wanting, grads, strict=True))


def check_close(found, expected, limit):
    for name, tensor in expected.items():
        scale = tensor.double().norm() + 1e-3
        assert (found[name].double() - tensor.double()).norm() <= limit * scale, name


def check(model, made, dtype):
    together = score_answers(model, made.batch(), Provided(), collision=True)
    apart = separate_scores(model, made)
    assert together.logprobs.requires_grad
    check_close(together._asdict(), apart._asdict(), LIMITS[dtype])
    pull = torch.randn(together.logprobs.shape, generator=torch.Generator().manual_seed(5))
    check_close(*(gradients(model, (scores.logprobs * pull).sum()) for scores in (together, apart)), LIMITS[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("peft", ["lora", "state", "none"])
@pytest.mark.parametrize("version", VERSIONS)
def test_log_probabilities_and_gradients_are_those_of_separate_passes(version, peft, dtype, pairs, model_with):
    model, _ = model_with(version, dtype=dtype, peft=peft)
    check(model, pairs.drawn(RAGGED), dtype)


@pytest.mark.parametrize("peft", ["lora", "state"])
@pytest.mark.parametrize("version", VERSIONS)
def test_prompts_of_one_token_start_from_what_the_model_starts_from(version, peft, pairs, model_with):
    model, _ = model_with(version, peft=peft)
    check(model, pairs.drawn(((1, 3, 5), (1, 2, 2))), torch.float64)


@pytest.mark.parametrize("peft", ["lora", "state"])
@pytest.mark.parametrize("version", VERSIONS)
def test_the_gradient_of_a_recomputed_model_is_the_same(version, peft, pairs, model_with):
    model, _ = model_with(version, peft=peft)
    model.recompute = "block"
    check(model, pairs.drawn(RAGGED), torch.float64)


@pytest.fixture(scope="module")
def tuned(model_with):
    return {version: model_with(version, peft="lora+state")[0] for version in VERSIONS}


@settings(max_examples=12, deadline=None)
@given(
    version=st.sampled_from(VERSIONS),
    lengths=st.lists(st.tuples(st.integers(1, 40), *(st.integers(0, 40),) * 3), min_size=1, max_size=4),
)
def test_any_lengths_will_do(version, lengths, tuned, pairs):
    check(tuned[version], pairs.drawn(lengths), torch.float64)


def test_some_of_the_answers_are_a_batch_of_their_own(pairs, model_with):
    model, _ = model_with("x070")
    made = pairs.drawn([(4, 3, 5, 2), (1, 2, 0, 7), (3, 0, 2, 1)])
    batch = made.batch(reference=torch.arange(9.0).view(3, 3))
    whole = score_answers(model, batch, Provided())
    for first, last in ((0, 2), (2, 3), (1, 2)):
        part = some_answers(batch, first, last)
        scores = score_answers(model, part, Provided())
        torch.testing.assert_close(scores.logprobs, whole.logprobs[:, first:last], rtol=1e-12, atol=1e-12)
        assert torch.equal(scores.tokens, whole.tokens[:, first:last])
        assert torch.equal(part.reference, batch.reference[:, first:last])


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", PREFERENCES)
def test_losses_are_those_of_separate_passes(name, version, pairs, model_with):
    """Of the adapter's model and of the reference, by the formulas; the way there is the whole objective's."""
    model, adapter = model_with(version)
    made = pairs.drawn([(4, 3, 5, 2), (1, 2, 6, 7), (3, 4, 2, 1)])
    kind = find(OBJECTIVES, name, flag="")
    usual = USUAL[name]
    objective = kind(
        usual.beta, sft_share=0.3, length_norm=usual.length_norm, provided=Provided(adapter=adapter, chunk_rows=4)
    )
    loss = objective(model, made.batch(), torch.tensor([4.0, 9.0]))
    policy = separate_scores(model, made)
    reference = None
    if name in WITH_REFERENCE:
        with torch.no_grad(), adapter.disabled(model):
            reference = separate_scores(model, made).logprobs
    found = objective.compare(policy, reference)
    expected = found.losses / 4 - 0.3 * policy.logprobs[:, 0].sum() / 9
    torch.testing.assert_close(loss.total, expected, rtol=1e-10, atol=1e-12)
    assert loss.tokens == (6 if name == "kto" else 3)
    torch.testing.assert_close(loss.metrics["margin"], found.figures["margin"] / 4, rtol=1e-8, atol=1e-10)
    check_close(gradients(model, loss.total), gradients(model, expected), 1e-9)
