from __future__ import annotations

import pytest
import torch

from rwkvpeft.errors import UserError
from rwkvpeft.models.shape import new_shape, normalise_names, read_shape
from rwkvpeft.registry import MODELS, find


def weights(version: str) -> dict[str, torch.Tensor]:
    shape = new_shape(version, n_layer=2, n_embd=32, vocab_size=40, head_size=8)
    return find(MODELS, version, flag="--my_testing").initial_weights(shape)


@pytest.mark.parametrize("version", MODELS)
def test_a_shape_is_read_back_from_the_tensors_it_made(version):
    shape = new_shape(version, n_layer=2, n_embd=32, vocab_size=40, head_size=8)
    assert read_shape(weights(version)) == shape


@pytest.mark.parametrize("prefix", ["_forward_module.", "model.", "_orig_mod.module."])
def test_a_trainers_prefix_is_stripped(prefix):
    plain = weights("x070")
    assert normalise_names({prefix + name: tensor for name, tensor in plain.items()}).keys() == plain.keys()


def test_an_old_v7_file_without_block_0s_unused_values_is_read():
    plain = {name: tensor for name, tensor in weights("x070").items() if not name.startswith("blocks.0.att.v")}
    assert read_shape(plain | {"blocks.0.att.value.weight": torch.zeros(32, 32)}).value_rank == 32


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "is not an RWKV checkpoint"),
        ({"blocks.0.att.time_mix_k": torch.zeros(1)}, "v4"),
        ({"model.layers.0.attn.r_proj.weight": torch.zeros(1)}, "flash-linear-attention"),
        ({"blocks.0.att.key.lora_A": torch.zeros(1)}, "is an adapter"),
    ],
)
def test_a_file_of_another_kind_is_named(tensors, words):
    with pytest.raises(UserError, match=words):
        read_shape(tensors)


def test_a_file_that_lost_a_block_is_refused():
    broken = {name: tensor for name, tensor in weights("x060").items() if not name.startswith("blocks.0.")}
    broken |= {name: tensor for name, tensor in weights("x060").items() if name.startswith("blocks.0.att.time")}
    broken["blocks.5.ln1.weight"] = torch.zeros(32)
    with pytest.raises(UserError, match="lacks whole blocks"):
        read_shape(broken)
