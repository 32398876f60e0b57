import pytest
import torch

from rwkvpeft.errors import UserError
from rwkvpeft.objectives.language_modelling import LanguageModelling
from rwkvpeft.ops import cross_entropy_choose, cross_entropy_torch
from rwkvpeft.ops.contract import Needs
from rwkvpeft.ops.cross_entropy import linear_cross_entropy
from rwkvpeft.ops.cross_entropy_choose import choose_rows, objection

# the device it is tried on is the CPU nevertheless
ON_GPU = Needs("cuda", torch.float32, 64, training=True)


def failing(logits, trained, *, gradient, top):
    raise RuntimeError("no compiler")


def wrong(logits, trained, *, gradient, top):
    found = cross_entropy_torch.rows(logits, trained, gradient=gradient, top=top)
    logits *= 1.1
    return found


def offer(monkeypatch, program, reason=""):
    monkeypatch.setattr(cross_entropy_choose, "_triton", lambda: (program, reason))


def test_a_program_that_fails_is_passed_over_and_the_report_says_so(monkeypatch):
    offer(monkeypatch, failing)
    choice = choose_rows("auto", ON_GPU, "cpu")
    assert choice.program is cross_entropy_torch.rows
    assert choice.report == "PyTorch, Triton failed its trial here"
    assert "no compiler" in choice.listing[0]


def test_a_program_that_fails_is_refused_when_asked_for(monkeypatch):
    offer(monkeypatch, failing)
    with pytest.raises(UserError, match="no compiler"):
        choose_rows("triton", ON_GPU, "cpu")


def test_pytorch_rows_are_taken_when_asked_for_and_nothing_else_is_tried(monkeypatch):
    monkeypatch.setattr(cross_entropy_choose, "_triton", lambda: pytest.fail("looked up"))
    assert choose_rows("torch", ON_GPU, "cpu").program is cross_entropy_torch.rows


def test_a_program_that_proves_right_is_taken(monkeypatch):
    def right(*args, **settings):
        return cross_entropy_torch.rows(*args, **settings)

    offer(monkeypatch, right)
    assert choose_rows("auto", ON_GPU, "cpu").program is right


def test_a_missing_package_is_a_reason_and_no_failed_trial(monkeypatch):
    offer(monkeypatch, None, "triton is not installed")
    choice = choose_rows("auto", ON_GPU, "cpu")
    assert (choice.report, choice.listing) == ("PyTorch", ("loss by triton: triton is not installed",))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_trial_finds_a_wrong_gradient_and_accepts_a_right_one(dtype):
    assert objection(wrong, dtype, "cpu") == "the loss's gradient is off by 1e-01"
    assert objection(cross_entropy_torch.rows, dtype, "cpu") == ""


def test_the_triton_rows_pass_their_trial():
    triton_rows = pytest.importorskip("rwkvpeft.ops.cross_entropy_triton", exc_type=ImportError)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert objection(triton_rows.rows, torch.float32, device) == ""


def test_the_loss_uses_the_program_it_is_handed():
    settings = {"normaliser": torch.tensor(1.0), "logit_penalty": 0.0, "chunk_rows": 2}
    with pytest.raises(RuntimeError, match="no compiler"):
        linear_cross_entropy(torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 1]), torch.ones(2), **settings,
                             rows=failing)
    assert LanguageModelling(rows=failing).rows is failing
