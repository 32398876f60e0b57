"""State tuning's file layout."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rwkvpeft.adapters.state import StateAdapter, check_states
from rwkvpeft.errors import UserError


def tiny(n_layer: int = 3) -> nn.Module:
    model = nn.Module()
    layers = list(range(n_layer))
    model.shape = SimpleNamespace(n_layer=n_layer, dim_att=8, head_size=4, time_mixing_layers=layers)
    model.blocks = nn.ModuleList()
    for _ in range(n_layer):
        block = nn.Module()
        block.att = nn.Module()
        block.att.output = nn.Linear(8, 8, bias=False)
        block.att.register_parameter("time_state", None)
        model.blocks.append(block)
    return model


def test_a_state_file_holds_one_zero_memory_per_layer_and_nothing_else():
    model = tiny()
    adapter = StateAdapter(train_parts=["time", "ln"])
    adapter.attach(model)
    tensors = adapter.trained_tensors(model)
    assert list(tensors) == [f"blocks.{i}.att.time_state" for i in range(3)]
    assert all(tensor.shape == (2, 4, 4) and not tensor.any() for tensor in tensors.values())


def test_a_state_already_in_the_base_is_where_training_starts():
    model = tiny(1)
    model.blocks[0].att.time_state = nn.Parameter(torch.ones(2, 4, 4, dtype=torch.bfloat16))
    adapter = StateAdapter()
    adapter.attach(model)
    (memory,) = adapter.trained_tensors(model).values()
    assert memory.dtype == torch.float32
    assert (memory == 1).all()


@pytest.mark.parametrize(("n_layer", "dim_att"), [(4, 8), (3, 16)])
def test_a_state_of_another_model_is_refused(n_layer, dim_att):
    states = {f"blocks.{i}.att.time_state": torch.zeros(2, 4, 4) for i in range(3)}
    check_states(states, n_layer=3, dim_att=8)
    with pytest.raises(UserError, match="does not fit"):
        check_states(states, n_layer=n_layer, dim_att=dim_att)
