"""Every preference objective as a run builds it: defaults, micro-batches, batches without examples, lower precision."""

from __future__ import annotations

import pytest
import torch

from rwkvpeft.config.groups import (
    DataConfig,
    MethodConfig,
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    RuntimeConfig,
    ScheduleConfig,
    TrainConfig,
)
from rwkvpeft.config.objective import PREFERENCES, ObjectiveConfig
from rwkvpeft.objectives.base import Provided
from rwkvpeft.objectives.build import build_objective
from rwkvpeft.objectives.evaluation import add_up_own

LENGTHS = ((4, 3, 5, 2), (1, 2, 9, 3), (7, 1, 4, 6), (2, 8, 2, 1))
# of KTO the third answers: its estimate is of what is read at once, and no sum over micro-batches
WITHOUT_THIRD = tuple((*row[:3], 0) for row in LENGTHS)


def config(name, **settings):
    groups = (ModelConfig, DataConfig, ScheduleConfig, OptimizerConfig, MethodConfig, RuntimeConfig, OutputConfig)
    return TrainConfig(*(group() for group in groups), objective=ObjectiveConfig(objective=name, **settings))


def built(name, adapter=None, **settings):
    return build_objective(config(name, **settings), Provided(adapter=adapter))


def outcome(objective, model, batch, normaliser=None):
    """Loss, figures and gradients of all that is trained."""
    loss = objective(model, batch, normaliser)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    grads = torch.autograd.grad(loss.total, trained, materialize_grads=True)
    return {"loss": loss.total.detach(), **loss.metrics, **{f"gradient {i}": grad for i, grad in enumerate(grads)}}


@pytest.mark.parametrize("name", PREFERENCES)
def test_micro_batches_of_one_step_add_up(name, pairs, model_with):
    model, adapter = model_with("x070")
    objective = built(name, adapter, sft_share=0.5)
    made = pairs.drawn(WITHOUT_THIRD if name == "kto" else LENGTHS)
    normaliser = torch.tensor([8.0 if name == "kto" else 4.0, 14.0])
    whole = outcome(objective, model, made.batch(), normaliser)
    parts = [outcome(objective, model, made.part(*numbers).batch(), normaliser) for numbers in ((0, 3), (1, 2))]
    for key, value in whole.items():
        torch.testing.assert_close(parts[0][key] + parts[1][key], value, rtol=1e-9, atol=1e-11)
    # and a batch alone is divided by what it has itself
    own = outcome(objective, model, made.batch())
    torch.testing.assert_close(own, whole, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", PREFERENCES)
def test_held_out_figures_are_those_of_one_batch_of_everything(name, pairs, model_with):
    model, adapter = model_with("x070")
    objective = built(name, adapter, sft_share=0.5)
    made = pairs.drawn(WITHOUT_THIRD if name == "kto" else LENGTHS)
    whole = torch.tensor([8.0 if name == "kto" else 4.0, 14.0])
    expected = outcome(objective, model, made.batch(), whole)
    for size in (1, 2, 3):
        batches = [made.part(*range(start, min(start + size, 4))).batch() for start in range(0, 4, size)]
        for key, value in add_up_own(model, batches, objective, whole).items():
            assert value == pytest.approx(expected[key].item(), rel=1e-9, abs=1e-11), key


@pytest.mark.parametrize("name", PREFERENCES)
def test_a_prompt_whose_answers_weigh_nothing_changes_nothing(name, pairs, model_with):
    model, adapter = model_with("x070")
    objective = built(name, adapter, sft_share=0.5)
    made = pairs.drawn(LENGTHS)
    without = outcome(objective, model, made.part(0, 1, 2).batch())
    batch = made.batch()
    batch.weights[:, -sum(LENGTHS[3][1:]):] = 0
    torch.testing.assert_close(outcome(objective, model, batch), without, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("name", PREFERENCES)
def test_a_batch_without_weights_has_zero_loss_and_zero_gradients(name, compact, pairs, model_with):
    model, adapter = model_with("x070")
    objective = build_objective(config(name, sft_share=0.5), Provided(adapter=adapter, compact=compact))
    batch = pairs.drawn(LENGTHS).batch()
    found = outcome(objective, model, batch._replace(weights=batch.weights * 0, labels=batch.labels * 0 - 100))
    assert not any(value.any() for value in found.values())


@pytest.mark.parametrize("name", PREFERENCES)
def test_the_weight_of_a_loss_is_its_examples(name, pairs, model_with):
    model, adapter = model_with("x070")
    made = pairs.drawn([(4, 3, 5, 2), (1, 2, 0, 1), (3, 0, 0, 2)])
    assert built(name, adapter)(model, made.batch()).tokens == (3 if name == "kto" else 1)


@pytest.mark.parametrize("name", PREFERENCES)
@pytest.mark.parametrize("version", ["x060", "x070"])
def test_bf16_is_near_fp32(name, version, pairs, model_with):
    batch = pairs.drawn(LENGTHS).batch()
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        model, adapter = model_with(version, dtype=dtype)
        found = built(name, adapter)(model, batch)
        losses.append(found.total)
        assert found.total.dtype == torch.float32
        assert all(value.dtype == torch.float32 for value in found.metrics.values())
    torch.testing.assert_close(*losses, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("name", PREFERENCES)
def test_steps_raise_the_accuracy_on_what_is_learned(name, pairs, model_with):
    model, adapter = model_with("x070", dtype=torch.float32, move=False)
    objective = built(name, adapter, sft_share=0.0)
    batch = pairs.drawn([(5, 4, 4, 4)] * 4).batch()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    margins = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = objective(model, batch)
        loss.total.backward()
        optimizer.step()
        margins.append(loss.metrics["margin"].item())
    assert loss.metrics["accuracy"] == 1
    assert margins[-1] > margins[0] + 0.1


def test_what_is_left_open_is_as_the_help_says():
    usual = {name: (built(name).beta, built(name).sft_share, built(name).length_norm) for name in PREFERENCES}
    assert usual == {
        "dpo": (0.1, 0.0, False), "ipo": (0.1, 0.0, False), "wpo": (0.1, 0.0, False), "kto": (0.1, 0.0, False),
        "orpo": (0.1, 1.0, True), "simpo": (2.0, 0.0, True), "cpo": (0.1, 1.0, False),
    }


@pytest.mark.parametrize("name", PREFERENCES)
def test_what_is_given_is_taken(name):
    objective = built(name, beta=0.7, sft_share=0.2, length_norm=True, flip_share=0.1)
    assert (objective.beta, objective.sft_share, objective.length_norm) == (0.7, 0.2, True)
    assert objective.flip_share == 0.1
    assert built(name, length_norm=False).length_norm is False
    if name in ("dpo", "cpo", "simpo"):
        assert built(name, dpo_loss="hinge").hinge
        assert not built(name).hinge
    if name == "simpo":
        assert built(name, simpo_gamma=0.3).gamma == 0.3
    if name == "kto":
        objective = built(name, kto_desirable=1.2, kto_undesirable=0.8)
        assert (objective.desirable, objective.undesirable) == (1.2, 0.8)
