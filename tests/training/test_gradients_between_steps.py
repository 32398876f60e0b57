"""What a step leaves behind."""

from __future__ import annotations

from rwkvpeft.models.backbone import Rwkv


def test_gradients_do_not_stay_through_the_next_forward_pass(train, monkeypatch):
    seen = []

    def hidden(model, *args, **kwargs):
        seen.append(sum(parameter.grad is not None for parameter in model.parameters()))
        return original(model, *args, **kwargs)

    original = Rwkv.hidden
    monkeypatch.setattr(Rwkv, "hidden", hidden)
    train(epoch_steps=4, epoch_count=1, accumulate_grad_batches=2)
    assert seen[0] == seen[2] == 0
    assert seen[1] > 0
    assert seen[3] > 0
