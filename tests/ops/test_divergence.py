"""How far rows of logits are from a teacher's words."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkvpeft.ops.divergence import Mix, Told, compare, likeliest

KINDS = ["tail", "renorm", "student", "reverse"]
GOLDEN_KINDS = {
    "kl_full": "tail", "kl_reverse_full": "reverse", "kl_topk_renorm": "renorm", "kl_topk_fullstudent": "student",
    "mix": "renorm", "smoothed_ce": "renorm",
}  # fmt: skip
GOLDEN_CASES = [
    *(f"{kind}_T{temperature}" for kind in list(GOLDEN_KINDS)[:4] for temperature in ("1.0", "2.0")),
    "smoothed_ce_eps0.0", "smoothed_ce_eps0.1", "mix",
]  # fmt: skip


def words(logits, k, temperature=1.0):
    found = likeliest(logits, k, (temperature,))
    return Told(found.ids, found.logprobs / temperature - found.normalisers[0][:, None], found.tails[0])


def logits_of(rows, tokens, seed=0, spread=2.0, dtype=torch.float64):
    return spread * torch.randn(rows, tokens, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def loss_of(logits, labels, told, mix):
    found = compare(logits, labels, told, mix, gradient=False)
    return (mix.alpha * mix.temperature**2 * found.divergence + (1 - mix.alpha) * found.cross_entropy).sum()


@pytest.mark.golden
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_losses_and_gradients_are_the_published_ones(golden, case, dtype):
    data = np.load(golden / "distill_losses.npz")
    setting = json.loads((golden / "losses.json").read_text())["distill"][case]
    targets = torch.tensor(data["targets"]).flatten()
    counted = targets >= 0
    student, teacher = (
        torch.tensor(data[name], dtype=dtype).flatten(0, 1)[counted] for name in ("student_logits", "teacher_logits")
    )
    kind = case.rpartition("_T")[0] or case.rpartition("_eps")[0] or case
    whole = kind in ("kl_full", "kl_reverse_full")
    k = student.shape[1] if whole else data["teacher_topk_ids"].shape[2]
    told = words(teacher, k, setting.get("temperature", 1.0))
    alpha = {"smoothed_ce": 0.0, "mix": 1 - setting.get("alpha", 0.0)}.get(kind, 1.0)
    mix = Mix(GOLDEN_KINDS[kind], alpha, setting.get("temperature", 1.0), setting.get("eps", 0.0))
    found = compare(student, targets[counted], told, mix, gradient=True)
    mean = loss_of(student, targets[counted], told, mix) / counted.sum()
    expected = torch.tensor(data[f"{case}|dlogits"]).flatten(0, 1)[counted]
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert mean.item() == pytest.approx(float(data[f"{case}|loss"]), rel=tolerance)
    assert (found.gradient / counted.sum() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 3, 11])
def test_the_gradient_is_that_of_differences(kind, temperature, k):
    student, labels = logits_of(3, 11, 1), torch.tensor([0, 10, 4])
    told, mix = words(logits_of(3, 11, 2), k, temperature), Mix(kind, 0.6, temperature, 0.1)
    gradient = compare(student, labels, told, mix, gradient=True).gradient
    step = 1e-6
    for row, column in [(0, 0), (1, 10), (2, 4), (2, 7), (0, int(told.ids[0, 0]))]:
        moved = torch.zeros_like(student)
        moved[row, column] = step
        ahead, behind = (loss_of(student + sign * moved, labels, told, mix) for sign in (1, -1))
        assert gradient[row, column].item() == pytest.approx(((ahead - behind) / (2 * step)).item(), abs=1e-7)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_teacher_that_tells_all_tokens_apart_gives_the_whole_divergence(temperature):
    student, teacher = logits_of(4, 9, 1), logits_of(4, 9, 2)
    p, q = (logits.div(temperature).log_softmax(1) for logits in (teacher, student))
    told = words(teacher, 9, temperature)
    labels = torch.zeros(4, dtype=torch.int64)
    for kind, expected in (("tail", F.kl_div(q, p, log_target=True, reduction="none")),
                           ("reverse", F.kl_div(p, q, log_target=True, reduction="none"))):
        found = compare(student, labels, told, Mix(kind, 1.0, temperature), gradient=False)
        torch.testing.assert_close(found.divergence, expected.sum(1))
    assert told.tail.eq(-math.inf).all()


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 40), st.data())
def test_tokens_told_apart_only_raise_the_divergence_up_to_the_whole(tokens, data):
    seed, spread = data.draw(st.integers(0, 99)), data.draw(st.floats(0.1, 20))
    kind, temperature = data.draw(st.sampled_from(["tail", "reverse"])), data.draw(st.sampled_from([0.5, 1.0, 4.0]))
    student, teacher = logits_of(3, tokens, seed, spread), logits_of(3, tokens, seed + 1, spread)
    labels = torch.zeros(3, dtype=torch.int64)
    found = [
        compare(student, labels, words(teacher, k, temperature), Mix(kind, 1.0, temperature), gradient=False).divergence
        for k in sorted({1, (tokens + 1) // 2, tokens})
    ]
    for fewer, more in pairwise(found):
        assert (fewer <= more + 1e-9 * more.abs() + 1e-12).all()
    assert (found[0] >= -1e-12).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 4, 16])
@pytest.mark.parametrize("spread", [1e-3, 300.0, 3e4])
def test_logits_far_apart_give_finite_losses_and_gradients(kind, k, spread):
    student, teacher = logits_of(6, 16, 1, spread, torch.float32), logits_of(6, 16, 2, spread, torch.float32)
    # the student is sure of what the teacher holds for likeliest, so that it leaves no tail, and of what it does not
    student[0, teacher[0].argmax()] = 1e5
    student[1, teacher[1].argmin()] = 1e5
    labels = torch.arange(6)
    found = compare(student, labels, words(teacher, k, 2.0), Mix(kind, 0.5, 2.0, 0.1), gradient=True)
    assert all(part.isfinite().all() for part in found)


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_agrees_is_not_moved(kind):
    logits = logits_of(5, 20)
    labels = torch.zeros(5, dtype=torch.int64)
    k = 20 if kind == "student" else 4
    found = compare(logits, labels, words(logits, k, 2.0), Mix(kind, 1.0, 2.0), gradient=True)
    torch.testing.assert_close(found.divergence, torch.zeros(5, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(found.gradient, torch.zeros_like(logits), atol=1e-12, rtol=0)


def test_words_that_were_rounded_are_scaled_to_a_whole():
    told = words(logits_of(4, 30, 2), 6)
    rounded = Told(told.ids, told.logprobs + 0.01, told.tail + 0.01)
    student, labels = logits_of(4, 30, 1), torch.zeros(4, dtype=torch.int64)
    for kind in ("tail", "reverse"):
        found, expected = (compare(student, labels, by, Mix(kind, 1.0, 1.0), gradient=True) for by in (rounded, told))
        torch.testing.assert_close(found.divergence, expected.divergence)
        torch.testing.assert_close(found.gradient, expected.gradient)


def test_the_likeliest_tokens_and_the_rest_hold_everything():
    logits = logits_of(7, 50)
    found = likeliest(logits, 5, (1.0, 0.7, 3.0))
    for row, temperature in enumerate((1.0, 0.7, 3.0)):
        expected = (logits / temperature).log_softmax(1)
        own = found.logprobs / temperature - found.normalisers[row][:, None]
        torch.testing.assert_close(own, expected.gather(1, found.ids))
        torch.testing.assert_close(own.exp().sum(1) + found.tails[row].exp(), torch.ones(7, dtype=torch.float64))
