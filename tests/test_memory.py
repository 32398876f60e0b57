"""The least a run needs: close below what is known, and a refusal that helps."""

from __future__ import annotations

import pytest

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
from rwkvpeft.errors import UserError
from rwkvpeft.memory import check_memory, count_parameters, count_trained, need_of, refuse_if_too_large, total_memory
from rwkvpeft.models.shape import new_shape
from rwkvpeft.registry import MODELS, find


def config(peft="none", micro_bsz=4, optim="none", **runtime):
    return TrainConfig(
        ModelConfig(),
        DataConfig(ctx_len=1024),
        ScheduleConfig(micro_bsz=micro_bsz),
        OptimizerConfig(optim=optim),
        MethodConfig(peft=peft),
        RuntimeConfig(**{"precision": "bf16", "accelerator": "cpu", **runtime}),
        OutputConfig(),
    )


@pytest.mark.parametrize("version", MODELS)
def test_parameters_are_counted_to_a_few_percent_and_never_too_many(version):
    shape = new_shape(version, n_layer=2, n_embd=128, vocab_size=300, head_size=64)
    weights = find(MODELS, version, flag="--my_testing").initial_weights(shape)
    real = sum(tensor.numel() for tensor in weights.values())
    assert 0.93 * real < count_parameters(shape) <= real


def test_a_7b_model_counts_seven_billion():
    shape = new_shape("x070", n_layer=32, n_embd=4096, vocab_size=65536)
    assert count_parameters(shape) == pytest.approx(7.2e9, rel=0.02)


def test_an_adapter_trains_a_small_part():
    shape = new_shape("x070", n_layer=12, n_embd=768, vocab_size=65536)
    assert count_trained(shape, MethodConfig(peft="state")) == 12 * 12 * 64 * 64
    assert count_trained(shape, MethodConfig(peft="lora")) < 0.05 * count_parameters(shape)


def test_checkpointing_saves_activations():
    shape = new_shape("x070", n_layer=24, n_embd=2048, vocab_size=65536)
    assert need_of(shape, config(grad_cp=1)).activations < 0.2 * need_of(shape, config()).activations


def test_8_bit_and_paged_moments_leave_room():
    shape = new_shape("x070", n_layer=12, n_embd=768, vocab_size=65536)
    needs = {optim: need_of(shape, config(optim=optim)).optimizer for optim in ("adam", "adam8bit", "paged_adam")}
    assert needs["adam"] == 4 * needs["adam8bit"] > needs["paged_adam"] == 0


def test_a_run_that_cannot_fit_is_refused_with_ways_out():
    shape = new_shape("x070", n_layer=32, n_embd=4096, vocab_size=65536)
    with pytest.raises(UserError, match="cannot fit") as caught:
        refuse_if_too_large(need_of(shape, config()), 24 * 10**9, config())
    assert caught.value.fix == "--peft lora, or --micro_bsz 1 --accumulate_grad_batches 4, or --grad_cp 1"


def test_a_run_that_may_fit_is_let_through():
    shape = new_shape("x070", n_layer=2, n_embd=128, vocab_size=300)
    check_memory(shape, config("lora"))
    assert total_memory("cpu") > 10**8
