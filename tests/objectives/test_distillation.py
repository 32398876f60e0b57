"""Learning from a teacher: live or stored, whole rows, chunks and packed rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from rwkvpeft.checkpoints.load import build_model, fill_model, operator_of
from rwkvpeft.checkpoints.quantised import Quantiser
from rwkvpeft.config.groups import (
    DataConfig,
    LongContextConfig,
    MethodConfig,
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    RuntimeConfig,
    ScheduleConfig,
    TrainConfig,
)
from rwkvpeft.config.objective import DistillationConfig, ObjectiveConfig
from rwkvpeft.data.batches import TokenBatch
from rwkvpeft.errors import UserError
from rwkvpeft.models.layers import Linear
from rwkvpeft.models.shape import new_shape
from rwkvpeft.objectives.base import Provided
from rwkvpeft.objectives.build import build_objective
from rwkvpeft.objectives.distillation import require_same_vocabulary
from rwkvpeft.objectives.language_modelling import LanguageModelling
from rwkvpeft.objectives.teaching import Teacher
from rwkvpeft.ops.sequences import Sequences
from rwkvpeft.registry import BACKENDS, MODELS, find

VOCABULARY = 19
VERSIONS = ["x052", "x060", "x070"]


def new_model(version, seed=1, layers=2, width=16, dtype=torch.float32, quantiser=None, **sizes):
    """Random weights, none of them zero."""
    torch.manual_seed(seed)
    shape = new_shape(version, n_layer=layers, n_embd=width, vocab_size=VOCABULARY, head_size=8, **sizes)
    weights = find(MODELS, version, flag="").initial_weights(shape)
    weights = {name: tensor + 0.2 * torch.randn_like(tensor) for name, tensor in weights.items()}
    model = build_model(shape, find(BACKENDS[operator_of(shape)], "torch", flag="").run)
    fill_model(model, weights, device="cpu", dtype=dtype, source="", quantiser=quantiser)
    return model


def student_of(version="x070", dtype=torch.float64):
    return new_model(version, dtype=dtype).requires_grad_(True).train()


def teacher_of(version="x060", dtype=torch.float64):
    return new_model(version, seed=7, layers=3, width=24, dtype=dtype).requires_grad_(False).eval()


def batch_of(rows=2, tokens=11, masked=((0, 3), (1, 0))):
    draw = torch.Generator().manual_seed(5)
    ids = torch.randint(VOCABULARY, (rows, tokens + 1), generator=draw)
    weights = torch.rand(rows, tokens, generator=draw) + 0.1
    for place in masked:
        weights[place] = 0
    return TokenBatch(ids[:, :-1], ids[:, 1:], weights, weights.sum().double())


def config_of(chunk=0, grad="exact", pull=0.1, **distillation):
    long = LongContextConfig(infctx=True, chunk_ctx=chunk, infctx_grad=grad) if chunk else LongContextConfig()
    return TrainConfig(
        ModelConfig(), DataConfig(), ScheduleConfig(), OptimizerConfig(logit_penalty=pull),
        MethodConfig(label_smoothing=0.1), RuntimeConfig(), OutputConfig(), long_context=long,
        objective=ObjectiveConfig(objective="distill"),
        distillation=DistillationConfig(teacher="t", **{"distill_top_k": 4, **distillation}),
    )  # fmt: skip


def objective_of(config, teacher):
    return build_objective(config, Provided(teacher=teacher, chunk_rows=8))


def results(objective, student, batch):
    student.zero_grad()
    loss = objective(student, batch)
    loss.total.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in student.named_parameters()
                 if parameter.grad is not None}
    return {"total": loss.total.detach(), **{name: value.detach() for name, value in loss.metrics.items()}}, gradients


@pytest.mark.parametrize("teacher", VERSIONS)
@pytest.mark.parametrize("student", VERSIONS)
def test_a_teacher_of_any_version_gives_the_whole_divergence(student, teacher):
    student, teacher, batch = student_of(student), teacher_of(teacher), batch_of()
    config = config_of(distill_top_k=0, distill_alpha=1.0, distill_temperature=1.5)
    loss = objective_of(config, teacher)(student, batch)
    p, q = (model(batch.input_ids)[0].div(1.5).log_softmax(-1) for model in (teacher, student))
    each = F.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    mean = (each * batch.weights).sum() / batch.weights.sum()
    torch.testing.assert_close(loss.metrics["divergence"], mean.detach())
    torch.testing.assert_close(loss.total, 1.5**2 * mean)


def test_alpha_0_is_language_modelling():
    student, batch = student_of(), batch_of()
    found = results(objective_of(config_of(distill_alpha=0.0), teacher_of()), student, batch)
    expected = results(LanguageModelling(0.1, chunk_rows=8, label_smoothing=0.1), student, batch)
    torch.testing.assert_close(found[0]["total"], expected[0]["total"])
    torch.testing.assert_close(found[1], expected[1])


@pytest.mark.parametrize("kind", ["tail", "renorm", "student", "reverse"])
@pytest.mark.parametrize("version", VERSIONS)
def test_exact_chunks_give_loss_figures_and_gradients_of_whole_rows(version, kind):
    student, teacher, batch = student_of(version), teacher_of(), batch_of()
    whole = results(objective_of(config_of(distill_loss=kind), teacher), student, batch)
    chunked = results(objective_of(config_of(chunk=4, distill_loss=kind), teacher), student, batch)
    torch.testing.assert_close(chunked, whole)


def test_truncated_chunks_have_the_same_loss_and_other_gradients():
    student, teacher, batch = student_of(), teacher_of(), batch_of()
    whole, gradients = results(objective_of(config_of(), teacher), student, batch)
    found, truncated = results(objective_of(config_of(chunk=4, grad="truncated"), teacher), student, batch)
    torch.testing.assert_close(found, whole)
    name = "blocks.0.att.key.weight"
    assert not torch.allclose(truncated[name], gradients[name])
    torch.testing.assert_close(truncated["head.weight"], gradients["head.weight"])


def test_the_teacher_reads_each_batch_once_however_the_student_does():
    student, teacher, batch = student_of(), teacher_of(), batch_of()
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    teacher.emb.register_forward_hook(lambda module, given, made: calls.append(given[0].shape[1]))
    results(objective_of(config_of(chunk=4), teacher), student, batch)
    assert calls == [4, 4, 3]


@pytest.mark.parametrize("version", VERSIONS)
def test_packed_documents_are_taught_as_if_each_were_alone(version):
    student, teacher, batch = student_of(version), teacher_of(version), batch_of(rows=1, masked=((0, 3),))
    packed = batch._replace(sequences=Sequences((4, 1, 6)))
    objective = objective_of(config_of(pull=0.0), teacher)
    found = objective(student, packed).total
    apart = []
    for start, stop in ((0, 4), (4, 5), (5, 11)):
        alone = TokenBatch(*(part[:, start:stop] for part in batch[:3]), batch.step_weight)
        apart.append(objective(student, alone, batch.weights.sum()).total)
    torch.testing.assert_close(found, sum(apart))


@pytest.mark.parametrize("chunk", [None, 4])
def test_labels_said_before_give_what_a_live_teacher_gives(chunk):
    student, teacher, batch = student_of(), teacher_of(), batch_of()
    labelled = Teacher(teacher, 4, 2.0, chunk).label(batch)
    found = build_objective(config_of(), Provided(chunk_rows=8))(student, labelled)
    torch.testing.assert_close(found, objective_of(config_of(), teacher)(student, batch))


def test_a_teacher_of_another_precision_comes_close():
    student, batch = student_of(dtype=torch.float32), batch_of()
    exact = objective_of(config_of(), teacher_of())(student, batch).total.item()
    for dtype in (torch.bfloat16, torch.float16):
        found = objective_of(config_of(), teacher_of(dtype=dtype))(student, batch).total
        assert found.dtype == torch.float32
        assert found.item() == pytest.approx(exact, rel=0.02)


def test_tokens_without_weight_are_not_asked_about():
    labelled = Teacher(teacher_of(), 4, 2.0).label(batch_of())
    assert not labelled.teacher_ids[0, 3].any()
    assert labelled.teacher_logprobs[0, 2].any()


def test_micro_batches_of_one_step_add_up_to_it():
    student, teacher, batch = student_of(), teacher_of(), batch_of()
    objective = objective_of(config_of(pull=0.0), teacher)
    whole = objective(student, batch).total
    halves = [objective(student, TokenBatch(*(part[row : row + 1] for part in batch[:3]), batch.step_weight),
                        batch.step_weight).total for row in (0, 1)]
    torch.testing.assert_close(sum(halves), whole)


def test_a_head_with_an_adapter_learns_as_the_plain_one():
    class Adapted(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.weight = inner.weight

        def forward(self, x):
            return x @ self.weight.T

    student, teacher, batch = student_of(), teacher_of(), batch_of()
    plain = results(objective_of(config_of(), teacher), student, batch)
    student.head = Adapted(student.head)
    torch.testing.assert_close(results(objective_of(config_of(), teacher), student, batch), plain)


def test_a_quantised_head_learns_as_its_values_do():
    student = new_model("x070", quantiser=Quantiser("int8", head=True)).train()
    student.emb.weight.requires_grad_(True)
    teacher, batch = teacher_of(dtype=torch.float32), batch_of()
    quantised = results(objective_of(config_of(), teacher), student, batch)
    plain = Linear(16, VOCABULARY)
    plain.weight = torch.nn.Parameter(student.head.dequantized(torch.float32), requires_grad=False)
    student.head = plain
    torch.testing.assert_close(results(objective_of(config_of(), teacher), student, batch), quantised)


@pytest.mark.parametrize("version", ["x052", "x060"])
def test_models_that_copy_earlier_tokens_teach_and_learn(version):
    student = new_model(version, dtype=torch.float64, head_qk=8).requires_grad_(True).train()
    teacher = new_model(version, seed=7, dtype=torch.float64, head_qk=8).requires_grad_(False).eval()
    batch = batch_of()
    loss = objective_of(config_of(distill_top_k=0, distill_alpha=1.0, distill_temperature=1.0), teacher)(student, batch)
    p, q = (model(batch.input_ids)[0].log_softmax(-1) for model in (teacher, student))
    each = F.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(loss.total, (each * batch.weights).sum() / batch.weights.sum())


def test_a_teacher_of_another_vocabulary_is_refused():
    with pytest.raises(UserError, match="another vocabulary"):
        require_same_vocabulary(student_of().shape, VOCABULARY + 1, "t.pth")


def test_a_student_that_learns_comes_closer_to_its_teacher():
    student, teacher, batch = student_of(dtype=torch.float32), teacher_of(dtype=torch.float32), batch_of()
    objective = objective_of(replace(config_of(pull=0.0, distill_alpha=1.0), method=MethodConfig()), teacher)
    optimizer = torch.optim.Adam(student.parameters(), 1e-2)
    divergences = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = objective(student, batch)
        loss.total.backward()
        optimizer.step()
        divergences.append(loss.metrics["divergence"].item())
    assert divergences[-1] < 0.5 * divergences[0]
