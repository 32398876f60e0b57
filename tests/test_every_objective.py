"""Every objective trains, goes on exactly and merges: the cells of scripts/objective_table.py."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from rwkvpeft.registry import OBJECTIVES

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "objective_table.py"
SPEC = importlib.util.spec_from_file_location("objective_table", SCRIPT)
assert SPEC is not None
table = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = table
SPEC.loader.exec_module(table)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("objectives")
    table.make_inputs(folder)
    return folder


def turns(start):
    """Each objective with another kind of training: each kind comes up with every version, the script runs all."""
    kinds = [(method, version) for version in table.VERSIONS for method in table.METHODS]
    return [(name, *kinds[(start + number) % len(kinds)]) for number, name in enumerate(OBJECTIVES)]


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "method", "version"), [*turns(0), *turns(5)])
def test_an_objective_trains_goes_on_exactly_and_merges(inputs, objective, method, version):
    assert table.run_cell(objective, method, version, "none", inputs) == table.Cell()


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["dpo", "kto", "distill", "grpo"])
def test_an_objective_trains_an_adapter_on_a_quantised_base(inputs, objective):
    pytest.importorskip("bitsandbytes")
    assert table.run_cell(objective, "lora", "v7", "nf4", inputs) == table.Cell()


def test_full_training_of_a_quantised_base_is_refused(inputs):
    assert table.run_cell("dpo", "full", "v7", "nf4", inputs) == table.Cell("", refused=True)
