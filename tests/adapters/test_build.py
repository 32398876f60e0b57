"""From ``--peft`` and ``--peft_config`` to an adapter, and from a file's tensors back to a method."""

from __future__ import annotations

import pytest
import torch

from rwkvpeft.adapters.build import build_adapter, recognise
from rwkvpeft.errors import UserError
from rwkvpeft.registry import ADAPTER_SETTINGS, ADAPTERS, find


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({"use_dora": True}, "dora"),
        ({"use_dora": False, "init_lora_weights": True}, "lora"),
        ({"init_lora_weights": "pissa", "lora_alpha": 8}, "pissa"),
        ({"init_lora_weights": "pissa_niter_7"}, "pissa"),
    ],
)
def test_hugging_faces_keys_choose_among_the_lora_methods(settings, method):
    adapter = build_adapter("lora", settings)
    assert adapter.name == method
    assert getattr(adapter.config, "svd_niter", 7) == (7 if "pissa_niter_7" in settings.values() else
                                                       4 if method == "pissa" else 7)


@pytest.mark.parametrize("start", ["olora", "gaussian", False])
def test_a_start_of_lora_that_is_not_known_here_is_refused(start):
    with pytest.raises(UserError, match="init_lora_weights"):
        build_adapter("lora", {"init_lora_weights": start})


@pytest.mark.parametrize("settings", [{"lora_alpha": 16}, {"lora_dropout": 0.1}])
def test_settings_that_pissa_does_not_have_are_refused_where_they_would_do_something(settings):
    with pytest.raises(UserError, match="pissa does not know"):
        build_adapter("lora", {"init_lora_weights": "pissa", "r": 8, **settings})


def test_states_beside_another_method_have_rates_of_their_own():
    adapter = build_adapter("lora+state", {"r": 4, "state": {"lr_final": 0.1}})
    assert adapter.rates("blocks.0.att.time_state")[:2] == (1.0, 0.1)
    assert adapter.rates("blocks.0.att.key.lora_A") is None
    assert build_adapter(adapter.name, adapter.settings()).settings() == adapter.settings()


@pytest.mark.parametrize("method", ["state+state", "lora+dora", "lora+state+miss", "none+state", "+state"])
def test_only_one_method_and_state_go_together(method):
    with pytest.raises(UserError, match="combines"):
        build_adapter(method, {})


@pytest.mark.parametrize(
    ("tensors", "method", "rank"),
    [
        ({"lora_A": (4, 8), "lora_B": (6, 4)}, "lora", 4),
        ({"lora_A": (4, 8), "lora_B": (6, 4), "lora_M": (6, 1)}, "dora", 4),
        ({"lora_A": (4, 8), "lora_B": (6, 4), "init_lora_A": (4, 8), "init_lora_B": (6, 4)}, "pissa", 4),
        ({"disha": (5, 6)}, "miss", 5),
        ({"disha": (4, 2, 2)}, "bat", 2),
    ],
)
def test_a_files_tensors_tell_method_rank_and_targets(tensors, method, rank):
    named = {f"blocks.0.att.key.{name}": torch.zeros(shape) for name, shape in tensors.items()}
    found, settings = recognise({**named, "blocks.0.ln1.weight": torch.zeros(8)}, "a file")
    assert (found, settings["r"], settings["target_modules"]) == (method, rank, ["blocks.0.att.key"])


def test_a_file_of_no_method_is_refused():
    with pytest.raises(UserError, match="no recipe"):
        recognise({"blocks.0.att.key.weight": torch.zeros(2, 2)}, "a file")


@pytest.mark.parametrize("method", sorted(ADAPTERS))
def test_the_settings_shown_in_help_are_the_methods_own(method):
    assert find(ADAPTER_SETTINGS, method, flag="") is find(ADAPTERS, method, flag="").Config
