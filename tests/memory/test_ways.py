"""Ways out when memory does not suffice: the cheapest first, each with what it saves."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from rwkvpeft.adapters.build import build_adapter
from rwkvpeft.config.groups import TrainConfig
from rwkvpeft.config.parse import build_groups
from rwkvpeft.errors import UserError
from rwkvpeft.memory import cheapest_ways, check_memory, expect, ways_out
from rwkvpeft.models.shape import new_shape

SMALL = new_shape("x070", n_layer=3, n_embd=128, vocab_size=512)


def _config(peft: str = "none", **values: object) -> TrainConfig:
    common = {"peft": peft, "precision": "bf16", "ctx_len": 64, "micro_bsz": 1, "accelerator": "cpu"}
    return build_groups({**common, **values})


def _flags(config: TrainConfig) -> list[str]:
    return [way.flags for way in ways_out(config)]


def _need(config: TrainConfig) -> int:
    parts = ["time", "ln"]
    return expect(SMALL, config, lambda part: build_adapter(config.method.peft, {}, parts)).total


@pytest.mark.parametrize(
    ("config", "ways"),
    [
        (_config(micro_bsz=8), ["--micro_split 8", "--grad_cp 1", "--peft lora"]),
        (_config(micro_bsz=8, micro_split="8", grad_cp="1"), ["--peft lora"]),
        (_config(micro_bsz=8, length_buckets=True, grad_cp="1"),
         ["--micro_bsz 1 --accumulate_grad_batches 8", "--peft lora"]),
        (_config("lora", grad_cp="1", precision="fp32"), ["--precision bf16", "--quant nf4"]),
        (_config("lora", grad_cp="1", quant="nf4"), []),
        (_config("lora", grad_cp="1", quant="nf4", ctx_len=4096), ["--infctx --infctx_grad exact", "--ctx_len 512"]),
        (_config("lora", grad_cp="1", quant="nf4", ctx_len=4096, infctx=True, chunk_ctx=512), ["--chunk_ctx 256"]),
        (_config("lora", grad_cp="1", quant="nf4", ctx_len=4096, dataload="pack"), ["--ctx_len 512"]),
        (_config(grad_cp="1", devices=4), ["--strategy deepspeed_stage_2", "--peft lora"]),
        (_config(grad_cp="1", devices=4, strategy="deepspeed_stage_3"),
         ["--strategy deepspeed_stage_3_offload", "--peft lora"]),
        (_config("lora", grad_cp="auto", quant="nf4"), ["--grad_cp 1"]),
    ],
)
def test_what_costs_least_is_named_first(config: TrainConfig, ways: list[str]) -> None:
    assert _flags(config) == ways


def test_smaller_weights_come_first_where_the_weights_are_what_is_large() -> None:
    ways = ways_out(_config("lora", micro_bsz=2), weights_first=True)
    assert [way.flags for way in ways] == ["--quant nf4", "--micro_split 2", "--grad_cp 1"]


def test_each_way_is_told_with_the_bytes_it_saves() -> None:
    config = _config(micro_bsz=8, precision="fp32")
    lines = cheapest_ways(config, _need)
    # an adapter on so small a model would save nothing
    assert [re.sub(r" \(saves [\d.]+ MB\)", "", line) for line in lines] == ["--micro_split 8", "--grad_cp 1"]
    saved = float(re.search(r"saves ([\d.]+) MB", lines[0])[1])  # type: ignore[index]
    alone = replace(config, schedule=replace(config.schedule, micro_bsz=1, accumulate_grad_batches=8))
    assert saved == pytest.approx((_need(config) - _need(alone)) / 1e6, abs=0.1)


def test_a_way_that_saves_nothing_is_not_named() -> None:
    def unmoved(config: TrainConfig) -> int:
        return 1000 if config.runtime.grad_cp == "0" else 900

    assert cheapest_ways(_config(micro_bsz=8), unmoved) == ["--grad_cp 1 (saves 0.0 MB)"]


def test_a_way_whose_bytes_cannot_be_told_is_named_without() -> None:
    def unknown(config: TrainConfig) -> int:
        raise UserError("this cannot be told")

    assert cheapest_ways(_config(grad_cp="1"), unknown) == ["--peft lora"]


def test_where_auto_chose_too_much_whole_blocks_are_named_all_the_same() -> None:
    assert "--grad_cp 1" in cheapest_ways(_config("lora", quant="fp8", grad_cp="auto"), _need)


def test_a_refusal_before_the_start_says_what_each_way_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rwkvpeft.memory.least.memory_of_each", lambda *_: 10**6)
    with pytest.raises(UserError, match="cannot fit") as caught:
        check_memory(SMALL, _config("lora", micro_bsz=8, precision="fp32"), lambda part: build_adapter("lora", {}))
    assert re.search(r"\(saves [\d.]+ MB\), or ", str(caught.value.fix))
