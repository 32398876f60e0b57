"""What is logged of each part of a model."""

from __future__ import annotations

import json

import pytest
import torch

from rwkvpeft.models.names import part_of

LORA = {"peft": "lora", "peft_config": {"r": 2, "lora_dropout": 0.3}, "train_parts": ["time", "ln"]}


def lines_of(folder, name="parts.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def trained(model):
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters() if tensor.requires_grad}


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("emb.weight", "emb"),
        ("head.weight", "head"),
        ("head.lora_A", "head.adapter"),
        ("ln_out.bias", "ln_out"),
        ("blocks.0.ln0.weight", "blocks.0.norms"),
        ("blocks.11.ln2.bias", "blocks.11.norms"),
        ("blocks.3.att.key.weight", "blocks.3.att"),
        ("blocks.3.att.key.lora_A", "blocks.3.att.adapter"),
        ("blocks.3.ffn.key.ia3_l.default", "blocks.3.ffn.adapter"),
        ("blocks.3.att.time_maa_w1", "blocks.3.att.time"),
        ("blocks.3.att.x_r", "blocks.3.att.time"),
        ("blocks.3.ffn.x_k", "blocks.3.ffn.time"),
        ("blocks.3.att.ln_x.weight", "blocks.3.att.norms"),
        ("blocks.3.att.time_state", "blocks.3.att.state"),
        ("blocks.3.ffn.shift_state", "blocks.3.ffn.state"),
    ],
)
def test_every_tensor_belongs_to_a_part(name, part):
    assert part_of(name) == part


def test_every_so_many_steps_there_is_a_line_for_all_parts(train, tmp_path):
    train(log_parts=3, grad_clip=0.01)
    lines = lines_of(tmp_path / "run")
    assert [line["step"] for line in lines] == [3, 6]
    wanted = {"emb", "head", "ln_out", "blocks.0.att", "blocks.1.ffn.time", "blocks.1.att.norms"}
    assert wanted <= lines[0]["parts"].keys()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_gradient_norms_before_clipping_make_up_that_of_the_step(train, tmp_path, precision):
    train(log_parts=1, grad_clip=0.01, precision=precision)
    compared = 0
    for line, step in zip(lines_of(tmp_path / "run"), lines_of(tmp_path / "run", "loss_data.jsonl"), strict=True):
        norms = [part["grad_norm"] for part in line["parts"].values()]
        if step["grad_norm"] is None:
            # an fp16 step that overflowed and was not taken
            assert None in norms
            continue
        total = sum(norm**2 for norm in norms) ** 0.5
        assert total == pytest.approx(step["grad_norm"], rel=1e-5)
        assert total > 0.01
        compared += 1
    assert compared


def test_weights_and_steps_are_those_of_the_model(train, tmp_path, base):
    _, model, _ = train(log_parts=1, epoch_steps=1, epoch_count=1)
    before = torch.load(base, weights_only=True)
    part = lines_of(tmp_path / "run")[0]["parts"]["emb"]
    moved = (model.emb.weight.detach() - before["emb.weight"]).norm().item()
    assert part["weight_norm"] == pytest.approx(before["emb.weight"].norm().item(), rel=1e-5)
    assert part["update_norm"] == pytest.approx(moved, rel=1e-5)
    assert part["update_ratio"] == pytest.approx(part["update_norm"] / part["weight_norm"], rel=1e-6)


def test_adapters_are_parts_of_their_own(train, tmp_path):
    train(log_parts=2, **LORA)
    parts = lines_of(tmp_path / "run")[0]["parts"]
    assert "blocks.0.att.adapter" in parts
    assert "blocks.0.att" not in parts
    assert parts["blocks.0.att.adapter"]["update_norm"] > 0


def test_looking_changes_nothing(train):
    settings = {**LORA, "dropout": 0.1, "accumulate_grad_batches": 3}
    _, plain, _ = train("plain", **settings)
    _, watched, _ = train("watched", log_parts=1, **settings)
    assert all(torch.equal(tensor, trained(watched)[name]) for name, tensor in trained(plain).items())


def test_after_a_resume_the_lines_go_on(train, tmp_path):
    train("whole", log_parts=1)
    train("cut", log_parts=1, my_exit=0)
    with (tmp_path / "cut" / "parts.jsonl").open("a") as file:
        file.write('{"step": 5, "parts": {}}\n{"step": 6, "pa')
    train("cut", log_parts=1)
    assert lines_of(tmp_path / "cut") == lines_of(tmp_path / "whole")


@pytest.mark.parametrize("settings", [{"dropout": 0.2}, {"neftune_alpha": 5.0}, {"label_smoothing": 0.1}])
def test_a_regularised_run_that_was_cut_goes_on_bit_for_bit(train, settings):
    _, whole, _ = train("whole", **LORA, **settings)
    train("cut", my_exit=0, **LORA, **settings)
    _, resumed, _ = train("cut", **LORA, **settings)
    assert all(torch.equal(tensor, trained(resumed)[name]) for name, tensor in trained(whole).items())


def test_weight_decay_moves_in_a_straight_line_and_a_resumed_run_follows_it(train, tmp_path):
    decay = {"weight_decay": 0.5, "weight_decay_final": 0.1}
    _, whole, _ = train("whole", **decay)
    train("cut", my_exit=0, **decay)
    _, resumed, _ = train("cut", **decay)
    found = [line["weight_decay"] for line in lines_of(tmp_path / "cut", "loss_data.jsonl")]
    assert found == pytest.approx([0.5 - 0.4 * step / 8 for step in range(8)])
    assert all(torch.equal(tensor, trained(resumed)[name]) for name, tensor in trained(whole).items())
