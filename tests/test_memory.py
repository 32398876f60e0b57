"""What a run needs: the least never exceeds what is used, the expected is what is used, and a refusal helps."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from rwkvpeft.adapters.build import build_adapter
from rwkvpeft.checkpoints.load import build_model, fill_model, operator_of
from rwkvpeft.checkpoints.quantised import Quantisation, Quantiser
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
from rwkvpeft.data.batches import TokenBatch
from rwkvpeft.errors import UserError
from rwkvpeft.memory import (
    Programs,
    bytes_kept,
    check_memory,
    choose_level,
    count,
    count_parameters,
    expect,
    expect_levels,
    free_memory,
    least_need,
    refuse_if_too_large,
    total_memory,
    training_outline,
)
from rwkvpeft.models.recompute import LEVELS
from rwkvpeft.models.shape import new_shape
from rwkvpeft.objectives.base import Provided
from rwkvpeft.objectives.build import build_objective
from rwkvpeft.ops.sequences import Sequences
from rwkvpeft.ops.wkv7.chunked import wkv7
from rwkvpeft.registry import ADAPTERS, BACKENDS, BLOCK_OPS, MODELS, find

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SMALL = new_shape("x070", n_layer=4, n_embd=128, vocab_size=1024)
SEVEN_B = new_shape("x070", n_layer=32, n_embd=4096, vocab_size=65536)


def config(peft="none", micro_bsz=4, ctx_len=1024, quant="none", settings=None, accumulate=1, **runtime):
    return TrainConfig(
        ModelConfig(),
        DataConfig(ctx_len=ctx_len),
        ScheduleConfig(micro_bsz=micro_bsz, accumulate_grad_batches=accumulate),
        OptimizerConfig(),
        MethodConfig(peft=peft, quant=quant, peft_config=settings or {}),
        RuntimeConfig(**{"precision": "bf16", "accelerator": "cpu", **runtime}),
        OutputConfig(),
    )


def adapter_of(settings):
    return build_adapter(settings.method.peft, settings.method.peft_config, ["time", "ln"])


def expected(shape, settings):
    return expect(shape, settings, lambda part: adapter_of(settings))


def least(shape, settings):
    return least_need(shape, settings, lambda part: adapter_of(settings))


def real_model(shape, settings, weights=None):
    adapter = adapter_of(settings)
    quant = settings.method.quant
    model = build_model(shape, wkv7)
    fill_model(
        model,
        weights or find(MODELS, "x070", flag="--my_testing").initial_weights(shape),
        device="cpu",
        dtype=DTYPES[settings.runtime.precision],
        source="random weights",
        quantiser=None if quant == "none" else Quantiser(quant, keep=adapter.trains),
        prepare=adapter.prepare if adapter else None,
    )
    if adapter is not None:
        adapter.attach(model)
    model.recompute = LEVELS[settings.runtime.grad_cp]
    return model.train()


def measured_step(model, settings, documents=()):
    """Bytes alive beside the weights at the worst moment of a step, from the profiler's record of the allocator."""
    rows, tokens = settings.schedule.micro_bsz, settings.data.ctx_len
    sequences = Sequences(rows * documents) if documents else None
    if sequences is not None:
        rows, tokens = 1, sequences.tokens
    ids = torch.randint(1, model.shape.vocab_size, (rows, tokens + 1))
    batch = TokenBatch(ids[:, :-1], ids[:, 1:], torch.ones(rows, tokens), torch.tensor(float(rows * tokens)), sequences)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        build_objective(settings, Provided(rows="torch"))(model, batch).total.backward()
    events = sorted(record.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    alive = worst = 0
    for event in events:
        if event.name() == "[memory]":
            alive += event.nbytes()
            worst = max(worst, alive)
    return worst


@pytest.mark.parametrize("version", MODELS)
def test_parameters_are_counted_exactly(version):
    shape = new_shape(version, n_layer=2, n_embd=128, vocab_size=300, head_size=64)
    weights = find(MODELS, version, flag="--my_testing").initial_weights(shape)
    assert count_parameters(shape) == sum(tensor.numel() for tensor in weights.values())


@pytest.mark.parametrize("peft", ["none", *ADAPTERS, "lora+state"])
@pytest.mark.parametrize("quant", ["none", "fp8"])
def test_what_rests_in_memory_is_counted_as_a_real_run_has_it(peft, quant):
    if (peft, quant) == ("none", "fp8"):
        pytest.skip("full training has no frozen weights")
    settings = config(peft, quant=quant)
    outline = training_outline(SMALL, settings, adapter_of(settings))
    assert count(outline) == count(real_model(SMALL, settings))


@pytest.mark.parametrize(
    ("peft", "quant", "precision", "grad_cp"),
    [
        ("lora", "none", "fp32", "1"),
        ("lora", "none", "fp32", "selective"),
        ("lora", "none", "fp32", "0"),
        ("none", "none", "fp32", "1"),
        ("none", "none", "fp32", "selective"),
        ("miss", "fp8", "bf16", "1"),
        ("miss", "fp8", "bf16", "selective"),
    ],
)
def test_the_expected_peak_of_a_step_is_the_measured_one(peft, quant, precision, grad_cp):
    settings = config(peft, micro_bsz=1, ctx_len=256, quant=quant, precision=precision, grad_cp=grad_cp)
    model = real_model(SMALL, settings)
    need = expected(SMALL, settings)
    assert need.gradients + need.activations == pytest.approx(measured_step(model, settings), rel=0.06)


@pytest.mark.parametrize(("top_k", "told"), [(5, 5), (0, SMALL.vocab_size)])
def test_what_a_teacher_says_of_a_batch_is_counted(tmp_path, top_k, told):
    settings = config("lora", micro_bsz=2, ctx_len=256, precision="fp32")
    taught = replace(
        settings,
        objective=replace(settings.objective, objective="distill"),
        distillation=replace(settings.distillation, teacher=str(tmp_path / "no.pth"), distill_top_k=top_k),
    )
    more = expected(SMALL, taught).activations - expected(SMALL, settings).activations
    assert more == 2 * 256 * (8 * told + 4)


@pytest.mark.parametrize("documents", [(3,) * 60, (200, 5, 7, 100)])
def test_the_expected_peak_of_packed_documents_is_the_measured_one(documents):
    settings = config("lora", micro_bsz=2, ctx_len=256, precision="fp32")
    need = expect(SMALL, settings, lambda part: adapter_of(settings), documents=documents)
    measured = measured_step(real_model(SMALL, settings), settings, documents)
    assert need.gradients + need.activations == pytest.approx(measured, rel=0.06)


def in_chunks(settings, grad, chunk=64):
    return replace(settings, long_context=LongContextConfig(infctx=True, chunk_ctx=chunk, infctx_grad=grad))


@pytest.mark.parametrize(
    ("peft", "grad_cp", "grad"),
    [("none", "0", "truncated"), ("none", "1", "exact"), ("lora", "0", "exact"), ("state", "0", "exact")],
)
def test_the_expected_peak_of_a_step_in_chunks_is_the_measured_one(peft, grad_cp, grad):
    settings = in_chunks(config(peft, micro_bsz=1, ctx_len=6 * 64 - 7, precision="fp32", grad_cp=grad_cp), grad)
    need = expected(SMALL, settings)
    measured = measured_step(real_model(SMALL, settings), settings)
    assert need.gradients + need.activations == pytest.approx(measured, rel=0.06)


@pytest.mark.parametrize("grad", ["truncated", "exact"])
def test_further_chunks_need_no_more_than_the_states_between_them(grad):
    few, many = (expected(SMALL, in_chunks(config("lora", ctx_len=length), grad)).total for length in (1024, 65536))
    states = 4 * 4 * (2 * 128 * 2 + 2 * 64 * 64 * 4) * (1024 - 16)
    assert many - few == (states if grad == "exact" else 0)


@pytest.mark.parametrize("grad", ["truncated", "exact"])
@pytest.mark.parametrize("peft", ["none", "lora"])
def test_the_least_of_a_run_in_chunks_is_never_more_than_the_expected(peft, grad):
    settings = in_chunks(config(peft, ctx_len=256, grad_cp="1"), grad)
    assert least(SMALL, settings).total <= expected(SMALL, settings).total


@pytest.mark.parametrize("peft", ["none", "lora", "state"])
@pytest.mark.parametrize("grad_cp", LEVELS)
@pytest.mark.parametrize("chunk", [0, 48])
def test_a_deep_model_is_expected_to_need_what_running_all_its_blocks_says(monkeypatch, peft, grad_cp, chunk):
    if chunk and (peft, grad_cp) != ("lora", "1"):
        pytest.skip("one case is enough for chunks")
    shape = replace(SMALL, n_layer=7)
    settings = config(peft, ctx_len=96, grad_cp=grad_cp, accumulate=2)
    settings = in_chunks(settings, "exact", chunk) if chunk else settings
    continued = expected(shape, settings)
    for module in ("expected", "outline"):
        monkeypatch.setattr(f"rwkvpeft.memory.{module}.FEW", 10)
    assert continued.total == pytest.approx(expected(shape, settings).total, rel=1e-3)


@pytest.mark.parametrize("peft", ["none", *ADAPTERS])
@pytest.mark.parametrize(
    "settings",
    [{"grad_cp": "1"}, {"grad_cp": "selective"}, {"grad_cp": "0", "precision": "fp32"}, {"accumulate": 4}],
)
def test_the_least_is_never_more_than_the_expected(peft, settings):
    settings = config(peft, **settings)
    assert least(SMALL, settings).total <= expected(SMALL, settings).total


def test_quantised_weights_need_their_bits():
    plain, packed = (least(SEVEN_B, config("lora", quant=quant)).weights for quant in ("none", "nf4"))
    blocks = SEVEN_B.n_layer * 12 * SEVEN_B.n_embd**2
    assert plain - packed == pytest.approx(blocks * (16 - 4.5) / 8, rel=1e-3)


def test_a_base_that_is_quantised_in_its_file_counts_as_such():
    settings = config("lora")
    from_file = least_need(SEVEN_B, settings, lambda part: adapter_of(settings), Quantisation("nf4"))
    assert from_file == least(SEVEN_B, config("lora", quant="nf4"))


def test_layers_below_the_first_trained_one_keep_nothing():
    settings = config("lora", settings={"target_modules": ["blocks.3.ffn.key"]})
    settings = replace(settings, method=replace(settings.method, train_parts=["none"]))
    need = least_need(SMALL, settings, lambda part: build_adapter("lora", settings.method.peft_config))
    assert need.activations == least(SMALL, config("lora")).activations // 4


def test_checkpointing_saves_activations():
    assert expected(SMALL, config(grad_cp="1")).activations < 0.5 * expected(SMALL, config()).activations


def test_an_optimizer_with_small_moments_is_told_from_adam():
    settings = config("lora")
    small = replace(settings, optimizer=OptimizerConfig(optim="paged_adamw8bit"))
    assert expected(SMALL, small).optimizer * 4 == expected(SMALL, settings).optimizer
    assert least(SMALL, small).optimizer == 0


def test_a_run_that_cannot_fit_is_refused_with_ways_out():
    need = least(SEVEN_B, config())
    with pytest.raises(UserError, match="cannot fit") as caught:
        refuse_if_too_large(need, 24 * 10**9, config())
    assert caught.value.fix == "--peft lora, or --micro_split 4, or --grad_cp 1"


def test_a_head_that_a_quantised_file_left_whole_is_counted_as_the_run_quantises_it():
    settings = config("lora", quant="nf4")
    with_head = replace(settings, method=replace(settings.method, quant_head=True))
    whole, packed = (least_need(SMALL, run, lambda part: adapter_of(settings), Quantisation("nf4")).weights
                     for run in (settings, with_head))
    assert packed < whole


def test_a_run_that_may_fit_is_let_through():
    settings = config("lora")
    check_memory(SMALL, settings, lambda part: adapter_of(settings))
    assert total_memory("cpu") > 10**8


def test_a_gpus_memory_is_told_without_taking_some_of_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80_000))
    monkeypatch.delattr(torch.cuda, "mem_get_info")
    assert total_memory("cuda") == 80_000


def test_a_method_that_looks_at_values_is_not_checked(monkeypatch):
    def looks(adapter, model):
        model.get_parameter("head.weight").max().item()

    monkeypatch.setattr("rwkvpeft.adapters.lora.LoraAdapter.insert", looks)
    settings = config("lora")
    check_memory(SMALL, settings, lambda part: adapter_of(settings))
    with pytest.raises(UserError, match="cannot be told"):
        expected(SMALL, settings)


@pytest.mark.parametrize("peft", ["none", "lora", "state"])
def test_each_level_of_recomputing_needs_less_than_the_faster_one(peft):
    needs = [need.total for need in expect_levels(SMALL, config(peft), lambda part: adapter_of(config(peft))).values()]
    assert needs == sorted(needs, reverse=True)
    assert len(set(needs)) == len(LEVELS)


@pytest.mark.parametrize(("free", "taken"), [(None, "1"), (0, "1"), (2.0, "1"), (4.2, "selective"), (9.0, "0")])
def test_auto_takes_the_fastest_level_that_fits(free, taken):
    need = expected(SMALL, config())
    needs = {level: need._replace(activations=size * 10**9 - need.total + need.activations)
             for level, size in (("0", 8), ("selective", 3), ("1", 1))}
    free = None if free is None else int(free * 10**9)
    assert choose_level(needs, config(grad_cp="auto"), free=free, device_type="cpu").grad_cp == taken


def test_a_level_that_was_asked_for_is_taken_whatever_is_free():
    assert choose_level({}, config(grad_cp="0"), free=0, device_type="cpu").grad_cp == "0"


def test_free_memory_of_a_gpu_counts_what_pytorch_holds_unused(monkeypatch):
    device = torch.device("cuda", 1)
    for name, answer in (("mem_get_info", (700, 1000)), ("memory_reserved", 250), ("memory_allocated", 50)):
        monkeypatch.setattr(torch.cuda, name, lambda asked, answer=answer: answer if asked == device else None)
    assert free_memory(device) == 900


def test_free_memory_is_part_of_all_memory():
    assert 0 < free_memory(torch.device("cpu")) < total_memory("cpu")


@pytest.mark.parametrize("version", MODELS)
def test_triton_programs_are_counted_without_a_gpu_and_need_less_than_those_in_pytorch(version):
    pytest.importorskip("triton")
    shape = new_shape(version, n_layer=1, n_embd=128, vocab_size=512)
    kernel = find(BACKENDS[operator_of(shape)], "triton", flag="--op")
    programs = Programs(kernel.run, find(BLOCK_OPS, "triton", flag="--fused_kernel"))
    settings = config("lora", ctx_len=64)
    plain = expect_levels(shape, settings, lambda part: adapter_of(settings))
    fused = expect_levels(shape, settings, lambda part: adapter_of(settings), programs=programs)
    assert all(fused[level].activations < plain[level].activations for level in LEVELS)


@pytest.mark.parametrize(("level", "most"), [("selective", 14.0), ("block", 1.01)])
def test_a_block_of_fused_operators_keeps_little_more_than_it_must(level, most):
    pytest.importorskip("triton")
    shape = new_shape("x070", n_layer=4, n_embd=1024, vocab_size=512)
    kernel = find(BACKENDS[operator_of(shape)], "triton", flag="--op")
    programs = Programs(kernel.run, find(BLOCK_OPS, "triton", flag="--fused_kernel"))
    settings = config("lora", micro_bsz=1, settings={"r": 16, "lora_dropout": 0})
    kept = []
    for layers in (3, 4):
        part = replace(shape, n_layer=layers)
        model = training_outline(part, settings, adapter_of(settings), programs=programs)
        model.recompute = level
        kept.append(bytes_kept(model, 1, 1024))
    # in (T, C) tensors of bf16: the block's own input is 1 of them
    assert 1 <= (kept[1] - kept[0]) / (2 * 1024 * 1024) < most
