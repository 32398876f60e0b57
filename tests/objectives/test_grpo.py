"""GRPO and its relatives against dense formulas: all logits, no packing, each prompt read again for each answer."""

from __future__ import annotations

import dataclasses
import itertools
import statistics

import pytest
import torch

from rwkvpeft.adapters.build import build_adapter
from rwkvpeft.checkpoints.load import build_model, fill_model, operator_of
from rwkvpeft.config.objective import RewardConfig
from rwkvpeft.data.batches import PromptBatch
from rwkvpeft.errors import UserError
from rwkvpeft.generation.batched import Request, decode
from rwkvpeft.generation.sampling import SamplingConfig
from rwkvpeft.models.shape import new_shape
from rwkvpeft.objectives.answers import evaluating
from rwkvpeft.objectives.base import Drawn, Provided
from rwkvpeft.objectives.grpo import Grpo
from rwkvpeft.objectives.own_answers import OwnAnswers
from rwkvpeft.objectives.reward_functions import RewardFunction
from rwkvpeft.objectives.rollouts import KeptRollouts
from rwkvpeft.ops.sequences import Sequences, taking_sequences
from rwkvpeft.registry import BACKENDS, MODELS, find

VOCABULARY = 11
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6]]
METHODS = {"none": {}, "lora": {"r": 2, "lora_dropout": 0.0}, "miss": {"r": 2}, "state": {}}
SETTINGS = RewardConfig(group_size=4, answer_tokens=6, answer_temperature=1.3, clip_low=0.1, clip_high=0.15)


def judge(prompts, answers, records):
    """Anything that differs between answers."""
    pairs = zip(answers, records, strict=True)
    return [(len(set(answer)) + len(answer)) % 5 * record["scale"] for answer, record in pairs]


def spelled(prompts, answers, records):
    return [float("d" in answer) for answer in answers]


FUNCTIONS = [RewardFunction("judge", "judge", 1.0, judge), RewardFunction("spelled", "spelled", -0.5, spelled)]
RECORDS = [{"scale": 1.0}, {"scale": 0.5}, {"scale": 2.0}]


def new_model(version="x070", method="lora"):
    torch.manual_seed(1)
    shape = new_shape(version, n_layer=2, n_embd=16, vocab_size=VOCABULARY, head_size=8)
    weights = find(MODELS, version, flag="").initial_weights(shape)
    weights = {name: tensor + 0.2 * torch.randn_like(tensor) for name, tensor in weights.items()}
    operator = operator_of(shape)
    model = build_model(shape, taking_sequences(operator, find(BACKENDS[operator], "torch", flag="")))
    fill_model(model, weights, device="cpu", dtype=torch.float64, source="")
    model.compute_dtype = torch.float64
    adapter = build_adapter(method, METHODS[method])
    if adapter is None:
        model.requires_grad_(True)
    else:
        adapter.attach(model)
    model.double()
    move(model, 0.1)
    return model.train(), adapter


def move(model, by):
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter += by * torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype)


def trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def answerer(settings):
    def answer(model, wanted):
        sampling = SamplingConfig(temperature=settings.answer_temperature, top_p=settings.answer_top_p)
        requests = [Request(one.prompt, one.seed) for one in wanted]
        with evaluating(model):
            found = dict(decode(model, requests, sampling, max_tokens=settings.answer_tokens, batch_size=5,
                                end_token=0))
        return [Drawn(*found[number]) for number in range(len(requests))]

    return answer


def text_of(tokens):
    return "".join("abcdefghijk"[token] for token in tokens)


def objective_of(settings=SETTINGS, adapter=None, folder=None, step=lambda: 0, functions=FUNCTIONS, **provided):
    provided = {"answer": answerer(settings), "record": RECORDS.__getitem__, "text": text_of, **provided}
    provided = Provided(adapter=adapter, chunk_rows=5, **provided)
    kept = None if folder is None else KeptRollouts(folder, settings.policy_steps)
    if folder is not None:
        provided = dataclasses.replace(provided, step=step)
    return Grpo(settings, OwnAnswers(settings, 7, functions, provided), provided, kept)


def batch_of(numbers=(0, 1, 2), shift=0):
    prompts = [PROMPTS[number] for number in numbers]
    ids = torch.tensor([[token for prompt in prompts for token in prompt]])
    places = torch.tensor([shift + number for number in numbers])
    return PromptBatch(ids, Sequences([len(prompt) for prompt in prompts]), torch.tensor(numbers), places,
                       torch.tensor(float(len(numbers))))


def gradients(model, total):
    model.zero_grad(set_to_none=True)
    total.backward()
    return {name: parameter.grad for name, parameter in trained(model).items() if parameter.grad is not None}


def check_gradients(found, expected, tolerance=1e-9):
    assert found.keys() == expected.keys()
    assert any(gradient.abs().max() > 1e-4 for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=tolerance, msg=name)


# the formulas once more, one token at a time


def dense_logprobs(model, prompt, answer, temperature):
    logits, _ = model(torch.tensor([[*prompt, *answer]]))
    rows = (logits[0, len(prompt) - 1 : -1] / temperature).log_softmax(-1)
    return rows[torch.arange(len(answer)), torch.tensor(answer)]


def dense_advantages(rewards, kind):
    if kind == "reinforce++":
        flat = [reward for group in rewards for reward in group]
        spread = statistics.stdev(flat) + 1e-4
        return [[(reward - statistics.mean(flat)) / spread for reward in group] for group in rewards]
    found = []
    for group in rewards:
        mean = statistics.mean(group)
        if kind == "group":
            found.append([(reward - mean) / (statistics.stdev(group) + 1e-4) for reward in group])
        elif kind == "centred":
            found.append([reward - mean for reward in group])
        else:
            found.append([reward - (sum(group) - reward) / (len(group) - 1) for reward in group])
    return found


def dense_loss(model, adapter, settings, rollouts, rewards):
    """The mean over prompts; ``rollouts`` of the objective's own ``Rollout``."""
    groups = []
    for prompt, rollout, found in zip(PROMPTS, rollouts, dense_advantages(rewards, settings.advantage), strict=True):
        sums, lengths = [], []
        for number, answer in enumerate(rollout.answers):
            new = dense_logprobs(model, prompt, answer, settings.answer_temperature)
            ratio = (new - torch.tensor(rollout.old[number], dtype=new.dtype)).exp()
            bounded = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
            each = -torch.minimum(ratio * found[number], bounded * found[number])
            if settings.kl_beta:
                with torch.no_grad(), adapter.disabled(model):
                    reference = dense_logprobs(model, prompt, answer, settings.answer_temperature)
                each = each + settings.kl_beta * ((reference - new).exp() - (reference - new) - 1)
            learned = settings.overlong == "keep" or rollout.ended[number]
            sums.append(each.sum() * learned)
            lengths.append((len(answer), learned))
        size = settings.group_size
        if settings.answer_mean == "grpo":
            groups.append(sum(total / length for total, (length, _) in zip(sums, lengths, strict=True)) / size)
        elif settings.answer_mean == "dapo":
            groups.append(sum(sums) / max(1, sum(length for length, learned in lengths if learned)))
        else:
            groups.append(sum(sums) / (size * settings.answer_tokens))
    return sum(groups) / len(groups)


def second_step(model, adapter, settings, folder, by=0.05):
    """Loss of the second step with the same answers, and the rollouts it learns from, with their rewards."""
    settings = dataclasses.replace(settings, policy_steps=2)
    step = [0]
    objective = objective_of(settings, adapter, folder, lambda: step[0])
    objective(model, batch_of())
    step[0] = 1
    move(model, by)
    loss = objective(model, batch_of())
    rollouts = objective.kept.find([0, 1, 2], 1)
    return loss, rollouts, objective.own.rewards(rollouts).tolist()


CASES = [
    {"answer_mean": mean, "advantage": advantage, "overlong": overlong, "kl_beta": kl_beta}
    for mean, advantage, overlong, kl_beta in itertools.product(
        ("grpo", "dapo", "dr_grpo"), ("group", "centred", "rloo", "reinforce++"), ("keep", "mask"), (0.0, 0.3)
    )
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_loss_and_gradients_are_those_of_the_dense_formulas(case, tmp_path):
    model, adapter = new_model()
    settings = dataclasses.replace(SETTINGS, **case)
    loss, rollouts, rewards = second_step(model, adapter, settings, tmp_path)
    assert loss.metrics["clipped"] > 0.05
    found = gradients(model, loss.total)
    expected = dense_loss(model, adapter, settings, rollouts, rewards)
    torch.testing.assert_close(loss.total, expected, rtol=0, atol=1e-10)
    check_gradients(found, gradients(model, expected))


@pytest.mark.parametrize("version", ["x060", "x070"])
@pytest.mark.parametrize("method", METHODS)
def test_every_kind_of_training_has_exact_gradients(version, method, tmp_path):
    model, adapter = new_model(version, method)
    settings = dataclasses.replace(SETTINGS, kl_beta=0.2 if adapter else 0.0)
    loss, rollouts, rewards = second_step(model, adapter, settings, tmp_path)
    found = gradients(model, loss.total)
    expected = dense_loss(model, adapter, settings, rollouts, rewards)
    torch.testing.assert_close(loss.total, expected, rtol=0, atol=1e-10)
    check_gradients(found, gradients(model, expected))


def test_the_first_step_has_the_gradient_of_the_plain_policy():
    model, _ = new_model()
    lines = []
    objective = objective_of(log=lines.append)
    found = gradients(model, objective(model, batch_of()).total)
    rollouts = objective.own.draw(model, batch_of(), training=True)
    expected = 0.0
    for line, (prompt, answer) in zip(lines, pairs(rollouts), strict=False):
        expected -= line["advantage"] * dense_logprobs(model, prompt, answer, 1.3).mean() / (4 * 3)
    check_gradients(found, gradients(model, expected))


def pairs(rollouts):
    return [(prompt, answer) for prompt, one in zip(PROMPTS, rollouts, strict=True) for answer in one.answers]


def test_a_ratio_beyond_its_bound_has_no_gradient_where_it_would_go_further(tmp_path):
    model, adapter = new_model()
    settings = dataclasses.replace(SETTINGS, clip_low=0.0, clip_high=0.0)
    loss, rollouts, rewards = second_step(model, adapter, settings, tmp_path)
    found = gradients(model, loss.total)
    # without room only tokens count that went the wrong way
    wanted = 0.0
    for (prompt, answer), old, advantage in zip(
        pairs(rollouts), [x for one in rollouts for x in one.old],
        [x for group in dense_advantages(rewards, "group") for x in group], strict=True,
    ):
        ratio = (dense_logprobs(model, prompt, answer, 1.3) - torch.tensor(old, dtype=torch.float64)).exp()
        wrong_way = (ratio - 1) * advantage < 0
        wanted -= (ratio * advantage * wrong_way).sum() / (len(answer) * 4 * 3)
    assert 0 < loss.metrics["clipped"] < 1
    check_gradients(found, gradients(model, wanted))


def test_groups_of_equal_rewards_teach_nothing():
    model, _ = new_model()
    equal = [RewardFunction("equal", "equal", 1.0, lambda prompts, answers, records: [0.1] * len(answers))]
    loss = objective_of(functions=equal)(model, batch_of())
    assert loss.metrics["equal_groups"] == 1
    assert loss.metrics["reward"] == pytest.approx(0.1)
    assert all(torch.count_nonzero(gradient) == 0 for gradient in gradients(model, loss.total).values())


@pytest.mark.parametrize("kind", ["group", "centred", "rloo"])
def test_micro_batches_add_up_to_the_whole_batch(kind):
    model, _ = new_model()
    objective = objective_of(dataclasses.replace(SETTINGS, advantage=kind, answer_mean="dapo"))
    whole = objective(model, batch_of())
    parts = [objective(model, batch_of(numbers), torch.tensor(3.0)) for numbers in ((0, 2), (1,))]
    total = sum(part.total for part in parts)
    torch.testing.assert_close(total, whole.total, rtol=0, atol=1e-12)
    for name, value in whole.metrics.items():
        torch.testing.assert_close(sum(part.metrics[name] for part in parts), value)
    check_gradients(gradients(model, total), gradients(model, objective(model, batch_of()).total))


def test_the_figures_have_the_names_that_were_told():
    model, adapter = new_model()
    objective = objective_of(dataclasses.replace(SETTINGS, kl_beta=0.1), adapter)
    loss = objective(model, batch_of())
    assert tuple(loss.metrics) == objective.metric_names
    assert {"reward_judge", "reward_spelled", "kl"} <= set(objective.metric_names)
    assert loss.metrics["reward"] == pytest.approx(
        float(loss.metrics["reward_judge"] - 0.5 * loss.metrics["reward_spelled"]), abs=1e-6
    )
    assert not any(value.requires_grad for value in loss.metrics.values())


def test_drawing_and_training_compute_the_same_probabilities():
    model, _ = new_model()
    assert objective_of()(model, batch_of()).metrics["sampling_gap"] < 1e-6


def test_the_divergence_from_the_base_is_nothing_before_the_first_step():
    model, adapter = new_model()
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.zero_()
    loss = objective_of(dataclasses.replace(SETTINGS, kl_beta=0.5), adapter)(model, batch_of())
    assert loss.metrics["kl"] == 0


def test_answers_follow_from_seed_and_place_whatever_is_answered_beside_them():
    model, _ = new_model()
    own = objective_of().own
    together = own.draw(model, batch_of(), training=True)
    alone = [own.draw(model, batch_of((number,)), training=True)[0] for number in range(3)]
    assert [one.answers for one in together] == [one.answers for one in alone]
    elsewhere = own.draw(model, batch_of(shift=3), training=True)
    other_seed = dataclasses.replace(own, seed=8).draw(model, batch_of(), training=True)
    evaluation = own.draw(model, batch_of(), training=False)
    for other in (elsewhere, other_seed, evaluation):
        assert [one.answers for one in other] != [one.answers for one in together]
    assert len({tuple(answer) for answer in together[0].answers}) > 1


def test_an_evaluation_is_minus_the_mean_reward_and_always_the_same():
    model, _ = new_model()
    lines = []
    objective = objective_of(log=lines.append)
    with torch.no_grad():
        first, second = objective(model, batch_of()), objective(model, batch_of())
    assert first.total == second.total
    assert first.total == pytest.approx(-float(first.metrics["reward"]))
    assert first.tokens == 3
    assert not lines


def test_every_answer_is_logged_with_what_was_found_of_it():
    model, _ = new_model()
    lines = []
    loss = objective_of(log=lines.append)(model, batch_of(shift=5))
    assert len(lines) == 12
    assert [line["place"] for line in lines[::4]] == [5, 6, 7]
    assert lines[0]["prompt"] == text_of(PROMPTS[0])
    assert set(lines[0]["rewards"]) == {"judge", "spelled"}
    assert statistics.mean(line["reward"] for line in lines) == pytest.approx(float(loss.metrics["reward"]))
    assert sum(line["advantage"] for line in lines) == pytest.approx(0, abs=1e-9)


def test_a_text_of_the_answerer_is_what_is_judged():
    model, _ = new_model()
    seen = []

    def look(prompts, answers, records):
        seen.extend(answers)
        return [0.0] * len(answers)

    def answer(model, wanted):
        return [drawn._replace(text="cut") for drawn in answerer(SETTINGS)(model, wanted)]

    objective_of(functions=[RewardFunction("look", "look", 1.0, look)], answer=answer)(model, batch_of())
    assert seen == ["cut"] * 12


# several steps with the same answers


def test_a_generation_is_drawn_once_and_then_anew(tmp_path):
    model, _ = new_model()
    step, lines = [0], []
    objective = objective_of(dataclasses.replace(SETTINGS, policy_steps=2), None, tmp_path, lambda: step[0],
                             log=lines.append)
    for now, drawn in enumerate([12, 12, 24, 24]):
        step[0] = now
        objective(model, batch_of(shift=now // 2 * 3))
        assert len(lines) == drawn


def test_a_run_resumed_between_the_steps_of_a_generation_goes_on_with_its_answers(tmp_path):
    settings = dataclasses.replace(SETTINGS, policy_steps=3)
    model, _ = new_model()
    step = [0]
    straight = objective_of(settings, None, tmp_path, lambda: step[0])
    straight(model, batch_of())
    step[0] = 1
    move(model, 0.05)
    expected = straight(model, batch_of())
    resumed = objective_of(settings, None, tmp_path, lambda: 1)(model, batch_of())
    assert resumed.total == expected.total
    assert all(resumed.metrics[name] == value for name, value in expected.metrics.items())


def test_another_split_of_the_prompts_finds_the_same_answers(tmp_path):
    settings = dataclasses.replace(SETTINGS, policy_steps=2)
    model, _ = new_model()
    objective_of(settings, None, tmp_path, lambda: 0)(model, batch_of())
    move(model, 0.05)
    whole = objective_of(settings, None, tmp_path, lambda: 1)(model, batch_of())
    again = objective_of(settings, None, tmp_path, lambda: 1)
    parts = [again(model, batch_of(numbers), torch.tensor(3.0)).total for numbers in ((0,), (1, 2))]
    torch.testing.assert_close(sum(parts), whole.total, rtol=0, atol=1e-12)


def test_answers_of_a_run_that_was_given_up_are_not_taken(tmp_path):
    settings = dataclasses.replace(SETTINGS, policy_steps=2)
    model, _ = new_model()
    objective_of(settings, None, tmp_path, lambda: 4)(model, batch_of())
    anew = objective_of(settings, None, tmp_path, lambda: 4)
    anew(model, batch_of())
    assert KeptRollouts(tmp_path, 2).find([0, 1, 2], 4) is None
    assert KeptRollouts(tmp_path, 2).find([0, 1, 2], 6) is None
    assert KeptRollouts(tmp_path, 2).find([0, 1, 2], 5) is not None


def test_a_broken_file_of_answers_is_named(tmp_path):
    (tmp_path / "step-00000002-place-0.json").write_text('{"places": [0')
    with pytest.raises(UserError, match=r"step-00000002-place-0.json.*cannot be read"):
        KeptRollouts(tmp_path, 2).find([0], 3)
