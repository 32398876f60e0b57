"""Batches of preferences made by hand, and models to read them."""

from __future__ import annotations

import pytest
import torch

from rwkvpeft.adapters.build import build_adapter
from rwkvpeft.checkpoints.load import build_model, fill_model, operator_of
from rwkvpeft.data.batches import PreferenceBatch
from rwkvpeft.models.shape import new_shape
from rwkvpeft.ops.sequences import Sequences, taking_sequences
from rwkvpeft.registry import BACKENDS, MODELS, find

VOCABULARY = 23
SETTINGS = {
    "lora": {"r": 2, "lora_dropout": 0},
    "state": {"token_shift": True},
    "lora+state": {"r": 2, "lora_dropout": 0, "state": {"token_shift": True}},
}


class Pairs:
    """Prompts and answers as lists of tokens, and the batch they make.

    Args:
        prompts: tokens of each, at least one.
        answers: of each prompt as many answers; an empty one is not there.
    """

    def __init__(self, prompts, answers):
        self.prompts, self.answers = prompts, answers

    @classmethod
    def drawn(cls, lengths, seed=0):
        """Random tokens of given lengths, (prompt, answer, ..) for each prompt."""
        draw = torch.Generator().manual_seed(seed)

        def tokens(count):
            return torch.randint(VOCABULARY, (count,), generator=draw).tolist()

        made = [[tokens(length) for length in row] for row in lengths]
        return cls([row[0] for row in made], [row[1:] for row in made])

    def batch(self, step_weight=(1.0, 1.0), reference=None):
        """Every answer token is scored; its last prompt token begins an answer."""
        flat = [(prompt, answer) for prompt, own in zip(self.prompts, self.answers, strict=True) for answer in own]
        inputs = [[prompt[-1], *answer[:-1]] if answer else [] for prompt, answer in flat]
        labels = [token for _, answer in flat for token in answer]
        return PreferenceBatch(
            shared_ids=torch.tensor([[token for prompt in self.prompts for token in prompt[:-1]]], dtype=torch.int64),
            shared=Sequences([len(prompt) - 1 for prompt in self.prompts]),
            input_ids=torch.tensor([[token for answer in inputs for token in answer]], dtype=torch.int64),
            labels=torch.tensor([labels], dtype=torch.int64),
            weights=torch.ones(1, len(labels)),
            answers=Sequences([len(answer) for answer in inputs]),
            step_weight=torch.tensor(step_weight, dtype=torch.float64),
            reference=reference,
        )

    def part(self, *numbers):
        """Some of the prompts with their answers."""
        return Pairs([self.prompts[number] for number in numbers], [self.answers[number] for number in numbers])


def make_model(version, *, dtype=torch.float64, peft="lora", parts=("time", "ln"), move=True):
    """A small model with weights of every kind off their start values, and its adapter.

    Args:
        move: whether the trained parameters have left their start.
    """
    torch.manual_seed(1)
    shape = new_shape(version, n_layer=2, n_embd=16, vocab_size=VOCABULARY, head_size=8)
    operator = operator_of(shape)
    model = build_model(shape, taking_sequences(operator, find(BACKENDS[operator], "torch", flag="--op")))
    weights = find(MODELS, version, flag="--my_testing").initial_weights(shape)
    weights = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in weights.items()}
    settings = {} if peft == "none" else dict(SETTINGS.get(peft, {"r": 4}))
    adapter = build_adapter(peft, settings, [] if peft == "state" else parts)
    fill_model(model, weights, device="cpu", dtype=dtype, source="test")
    if adapter is None:
        model.requires_grad_(True)
        return model.train(), None
    adapter.attach(model)
    for parameter in model.parameters():
        # trained ones are fp32: their gradients would be rounded
        parameter.data = parameter.data.to(dtype)
    if move:
        move_trained(model)
    return model.train(), adapter


def move_trained(model, size=0.1):
    """What a step of training does, at random."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn_like(parameter))


@pytest.fixture(scope="session")
def pairs():
    return Pairs


@pytest.fixture(scope="session")
def model_with():
    return make_model


@pytest.fixture(scope="session")
def moved():
    return move_trained
