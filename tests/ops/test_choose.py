"""Which backend is taken, and what is said when none can be."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from rwkvpeft.errors import UserError
from rwkvpeft.ops import choose
from rwkvpeft.ops.choose import choose_backend
from rwkvpeft.ops.contract import Backend, Needs, Supports
from rwkvpeft.registry import BACKENDS

NEEDS = Needs("cpu", torch.float32, 64, training=True)


def test_auto_takes_the_first_backend_that_can_and_says_why():
    choice = choose_backend("wkv7", "auto", NEEDS)
    assert choice.report.startswith("wkv7: torch")
    assert "reference: slower" in choice.report


@pytest.mark.parametrize("operator", BACKENDS)
def test_every_registered_backend_can_be_asked_for_by_name(operator):
    for name in BACKENDS[operator]:
        choice = choose_backend(operator, name, NEEDS)
        assert callable(choice.run)
        assert choice.report.startswith(f"{operator}: {name}")


@pytest.mark.parametrize("op", ["cuda", "triton", "fla"])
def test_a_backend_this_version_lacks_is_refused_with_the_reason_and_what_works(op):
    with pytest.raises(UserError, match=f"--op {op} cannot run") as caught:
        choose_backend("wkv6", op, NEEDS)
    assert "torch" in str(caught.value)
    assert "this version" in str(caught.value)


def test_an_unknown_name_is_refused_with_the_names_that_work():
    with pytest.raises(UserError, match="does not know 'torhc'") as caught:
        choose_backend("wkv7", "torhc", NEEDS)
    assert "auto, torch, reference" in str(caught.value)


FUSSY = Backend(
    "fussy", "for this test", lambda **_: None, Supports(device_types=frozenset({"cuda"}), head_sizes=frozenset({64}))
)


@pytest.fixture
def _with_fussy(monkeypatch):
    table = {"wkv7": {"fussy": f"{__name__}:FUSSY", **BACKENDS["wkv7"]}}
    monkeypatch.setattr(choose, "BACKENDS", table)
    choose_backend.cache_clear()
    yield
    choose_backend.cache_clear()


@pytest.mark.usefixtures("_with_fussy")
def test_auto_passes_over_what_cannot_serve_and_gives_each_reason():
    choice = choose_backend("wkv7", "auto", dataclasses.replace(NEEDS, head_size=32))
    assert choice.report.startswith("wkv7: torch")
    assert "fussy: device cpu (it can cuda), head size 32 (it can 64)" in choice.report


@pytest.mark.usefixtures("_with_fussy")
def test_a_backend_that_cannot_serve_is_refused_with_its_limits():
    with pytest.raises(UserError, match="--op fussy cannot run this job") as caught:
        choose_backend("wkv7", "fussy", NEEDS)
    assert "device cpu (it can cuda)" in str(caught.value)
    assert "auto, torch, reference" in str(caught.value)
