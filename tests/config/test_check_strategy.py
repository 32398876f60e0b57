"""What a strategy cannot honour is refused with the reason and a way out."""

from __future__ import annotations

import pytest

from rwkvpeft.config.parse import parse_train
from rwkvpeft.config.resolve import Machine, resolve
from rwkvpeft.errors import UserError
from rwkvpeft.registry import STRATEGIES

GIVEN = {"load_model": "m.pth", "data_file": "d.jsonl", "random_seed": 1}


def settle(**values):
    return resolve({**GIVEN, **values}, Machine("cpu", has_bf16=True))[0]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("peft", ["none", "lora", "pissa", "miss", "bat", "state", "lora+state"])
def test_every_strategy_takes_every_method_of_ours(strategy, peft):
    assert settle(strategy=strategy, peft=peft).runtime.strategy == strategy


@pytest.mark.parametrize(
    ("strategy", "values", "reason"),
    [
        ("deepspeed_stage_1", {"precision": "fp16"}, "gradient scaler"),
        ("fsdp", {"precision": "fp16"}, "gradient scaler"),
        ("deepspeed_stage_2", {"precision": "fp64"}, "fp32"),
        ("deepspeed_stage_2", {"optim": "muon"}, "whole"),
        ("fsdp", {"optim": "adam8bit"}, "whole"),
        ("deepspeed_stage_1", {"log_parts": 5}, "log_parts"),
        ("deepspeed_stage_1", {"cuda_graph": True}, "CUDA graph"),
        ("deepspeed_stage_3", {"infctx": True, "ctx_len": 2048}, "infctx"),
        ("fsdp", {"infctx": True, "ctx_len": 2048}, "infctx"),
        ("ddp", {"ds_bucket_mb": 100}, "no effect"),
        ("auto", {"ds_config": "x.json"}, "no effect"),
        ("deepspeed_stage_1", {"ds_bucket_mb": 0}, "too small"),
    ],
)
def test_what_a_strategy_cannot_do_is_refused(strategy, values, reason):
    with pytest.raises(UserError, match=reason):
        settle(strategy=strategy, **values)


def test_stages_that_keep_weights_whole_take_long_rows_in_chunks():
    assert settle(strategy="deepspeed_stage_2", infctx=True, ctx_len=2048).long_context.infctx


def test_an_unknown_strategy_is_told_the_nearest():
    with pytest.raises(UserError) as caught:
        parse_train(["--strategy", "deepspeed_stage2"])
    assert "deepspeed_stage_2" in caught.value.render()
