"""Every adapter on every kind of frozen weight in every model version (``METHODS``, ``BASES`` in conftest.py).

README's support matrix is made of this run: ``scripts/support_matrix.py`` starts it and writes the table.
"""

from __future__ import annotations

import torch

from rwkvpeft.checkpoints.adapter import load_adapter
from rwkvpeft.checkpoints.load import load_model
from rwkvpeft.checkpoints.merge import merge_files
from rwkvpeft.data.batches import TokenBatch
from rwkvpeft.objectives.language_modelling import LanguageModelling
from rwkvpeft.objectives.long_context import LongContext


def close(combination, found, expected, *, fp32):
    """bf16 activations differ by rounding as soon as sums are made in another order."""
    scale = expected.abs().max()
    tolerance = 0.05 * scale if combination.base == "bf16" else fp32 * scale
    torch.testing.assert_close(found, expected, rtol=0, atol=float(tolerance))


def test_step_zero_leaves_the_output_unchanged(case, ids):
    """PiSSA cuts each weight in two before it is quantised, so that its untrained model is not quite the quantised
    base: there the start is compared with the base's own two halves, and in fp32 with the base itself."""
    with case.tuned.adapter.disabled(case.tuned.model):
        close(case.combination, case.before, case.tuned.logits(ids), fp32=2e-6)
    if case.combination.method != "pissa" or case.combination.quant == "none":
        base = load_model(case.path, dtype=case.combination.dtype, op="torch", quantiser=case.tuned.quantiser())
        close(case.combination, case.before, base(ids)[0].float().detach(), fp32=2e-5)


def test_only_the_adapters_tensors_get_gradients(case, ids):
    model = case.tuned.model
    model.zero_grad(set_to_none=True)
    case.tuned.loss(ids).backward()
    trained = {id(tensor) for tensor in case.tuned.adapter.trained_tensors(model).values()}
    assert {id(parameter) for parameter in model.parameters() if parameter.grad is not None} == trained
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}


def test_exact_gradients_in_chunks_are_those_of_the_whole_row(case, ids):
    model, labels = case.tuned.model, ids[:, 1:]
    batch = TokenBatch(ids[:, :-1], labels, torch.ones(labels.shape), torch.tensor(float(labels.numel())))
    found = []
    for objective in (LanguageModelling(1e-2), LongContext(LanguageModelling(1e-2), 5, exact=True)):
        model.zero_grad(set_to_none=True)
        objective(model, batch).total.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    close(case.combination, found[1], found[0], fp32=2e-5)


def test_ten_steps_lower_the_loss(case, ids):
    assert case.tuned.loss(ids).item() < case.losses[0] - 0.02


def test_a_saved_adapter_goes_on_exactly_as_the_one_in_memory(case, ids, tune):
    method = case.tuned.adapter
    again = tune(case.combination, case.path, method.rename(load_adapter(case.file)[0]))
    assert torch.equal(again.logits(ids), case.tuned.logits(ids))
    # on copies: other tests look at the trained model
    before = {name: tensor.detach().clone() for name, tensor in method.trained_tensors(case.tuned.model).items()}
    losses = again.train(ids, 3)
    assert case.tuned.train(ids, 3) == losses
    ours, theirs = (one.adapter.trained_tensors(one.model) for one in (case.tuned, again))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    method.load(case.tuned.model, before)


def test_merged_equals_unmerged(case, ids, tune, tmp_path):
    merge_files(case.path, case.file, tmp_path / "merged.pth")
    merged = load_model(tmp_path / "merged.pth", dtype=torch.float32, op="torch")
    # the sums of the merge are rounded to the file's dtype once: what is compared is computed in fp32
    unmerged = tune(case.combination, case.path, case.tuned.adapter.rename(load_adapter(case.file)[0]), torch.float32)
    expected = unmerged.logits(ids)
    close(case.combination, merged(ids)[0].detach(), expected, fp32=1e-4)
    assert (expected - case.before).abs().max() > 0.05 * expected.abs().max()


def test_the_adapter_can_be_switched_off_and_on(case, ids):
    tuned = case.tuned.logits(ids)
    with case.tuned.adapter.disabled(case.tuned.model):
        close(case.combination, case.tuned.logits(ids), case.before, fp32=2e-6)
    assert torch.equal(case.tuned.logits(ids), tuned)
