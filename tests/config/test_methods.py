import importlib
import importlib.util
from dataclasses import fields

import pytest

from rwkvpeft.config import methods
from rwkvpeft.config.findings import Findings
from rwkvpeft.config.help import method_lines
from rwkvpeft.config.methods import check_method, hugging_face_methods, members
from rwkvpeft.registry import ADAPTERS


def messages(method):
    findings = Findings()
    check_method(method, findings)
    return [error.render() for error in findings.errors]


@pytest.fixture
def without_peft(monkeypatch):
    monkeypatch.setattr(methods, "find_spec", lambda name: None)


@pytest.mark.parametrize("method", ["none", *ADAPTERS, *(f"{name}+state" for name in ADAPTERS if name != "state")])
def test_our_names_are_known_without_peft(method, without_peft):
    assert messages(method) == []


def test_a_combination_names_its_members():
    assert members("lora+state") == ["lora", "state"]
    assert members("none") == []


@pytest.mark.parametrize("method", ["lora+miss", "state+state", "none+state", "lora+miss+state", "+lora"])
def test_only_one_method_and_state_combine(method):
    assert "METHOD+state" in messages(method)[0]


@pytest.mark.parametrize(("typed", "meant"), [("lroa", "lora"), ("pisa", "pissa"), ("mis", "miss")])
def test_a_slip_is_answered_with_the_nearest_of_ours(typed, meant):
    assert f"--peft {meant}" in messages(typed)[0]


def test_without_peft_its_names_are_answered_with_how_to_install_it(without_peft):
    assert "pip install 'rwkvpeft[peft]'" in messages("adalora")[0]


def test_the_names_read_from_the_installed_peft_are_those_it_has():
    if importlib.util.find_spec("peft") is None:
        pytest.skip("peft is not installed")
    assert {"adalora", "loha", "lokr", "vera"} <= set(hugging_face_methods())
    assert messages("adalora") == []
    assert "--peft adalora" in messages("adalroa")[0]


@pytest.mark.slow
def test_the_installed_peft_knows_every_name_that_is_read_and_its_help_can_be_shown():
    pytest.importorskip("peft")
    settings = importlib.import_module("rwkvpeft.adapters.huggingface_settings")
    assert set(settings.tuner_names()) <= set(hugging_face_methods())
    for name in settings.tuner_names():
        kind = settings.method_settings(name)
        assert all(item.name in method_lines(kind) for item in fields(kind))
