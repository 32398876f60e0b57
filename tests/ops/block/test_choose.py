from dataclasses import replace

import pytest
import torch

from rwkvpeft.errors import UserError
from rwkvpeft.ops.block.choose import choose_block_ops
from rwkvpeft.ops.block.plain import PLAIN
from rwkvpeft.ops.block.trial import objection
from rwkvpeft.ops.contract import Needs

ON_CPU = Needs("cpu", torch.float32, 16, training=True)


@pytest.mark.parametrize("name", ["auto", "torch"])
def test_a_cpu_runs_plain_pytorch(name):
    assert choose_block_ops(name, ON_CPU).ops is PLAIN


def test_the_listing_says_why_the_kernels_are_passed_over():
    assert choose_block_ops("auto", ON_CPU).listing == ("block by triton: device cpu",)


def test_kernels_asked_for_on_a_cpu_are_refused():
    with pytest.raises(UserError, match="device cpu"):
        choose_block_ops("triton", ON_CPU)


def test_an_unknown_name_is_refused():
    with pytest.raises(UserError, match="does not know 'cuda'"):
        choose_block_ops("cuda", ON_CPU)


def test_fp64_is_refused_by_the_kernels():
    triton_ops = pytest.importorskip("rwkvpeft.ops.block.triton_ops", exc_type=ImportError)
    needs = replace(ON_CPU, device_type="cuda", dtype=torch.float64)
    assert triton_ops.TRITON.supports.objections(needs)


def test_a_trial_finds_a_wrong_operator():
    wrong = replace(PLAIN, squared_relu=lambda x: PLAIN.squared_relu(x) * 1.01)
    assert objection(wrong, ON_CPU, "cpu") == "squared_relu is off by 1e-02"


def test_a_trial_tells_of_a_program_that_fails():
    def fail(x):
        raise RuntimeError("no compiler")

    assert "no compiler" in objection(replace(PLAIN, gate_value=lambda *_: fail(None)), ON_CPU, "cpu")
