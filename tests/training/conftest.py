"""A tiny model, tiny data in memory, and a run of a few steps through the real Trainer."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch

from rwkvpeft.adapters.build import build_adapter
from rwkvpeft.checkpoints.adapter import Recipe
from rwkvpeft.checkpoints.files import fingerprint, save_tensors
from rwkvpeft.checkpoints.load import load_model
from rwkvpeft.config.groups import TrainConfig
from rwkvpeft.data.datamodule import TrainingData
from rwkvpeft.data.row import Row
from rwkvpeft.models.shape import new_shape
from rwkvpeft.registry import MODELS, find
from rwkvpeft.training.fit import fit

VOCABULARY = 13


class Rows:
    """Random rows, each with another number of trained tokens; sample p is row p modulo their number."""

    varies = False
    joining = "equal"
    collator = None

    def __init__(self, size=24, length=6):
        draw = np.random.default_rng(3)
        self.rows = []
        for index in range(size):
            tokens = draw.integers(VOCABULARY, size=length + 1)
            weights = (np.arange(length) < 1 + index % length).astype(np.float32)
            self.rows.append(Row(tokens[:-1], tokens[1:], weights))

    def __len__(self):
        return len(self.rows)

    @property
    def pass_rows(self):
        return len(self)

    def sample(self, position):
        return self.rows[position % len(self.rows)]

    def labels(self, position):
        return [f"row {position % len(self.rows)}"]

    def replaced(self):
        return []


DEFAULTS = {
    "epoch_steps": 4,
    "epoch_count": 2,
    "micro_bsz": 2,
    "lr_init": 1e-2,
    "lr_final": 1e-3,
    "warmup_steps": -1,
    "train_parts": ["none"],
    "accelerator": "cpu",
    "precision": "fp32",
    "random_seed": 5,
    "ctx_len": 6,
    "merge": 0,
}


def settings(**values):
    """A resolved ``TrainConfig`` from flat names."""
    values = {**DEFAULTS, **values}
    groups = {}
    for group in fields(TrainConfig):
        kind = TrainConfig.__dataclass_fields__[group.name].type
        cls = getattr(__import__("rwkvpeft.config.groups", fromlist=[kind]), kind)
        names = {item.name for item in fields(cls)}
        groups[group.name] = cls(**{name: values.pop(name) for name in list(values) if name in names})
    assert not values, values
    return TrainConfig(**groups)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A checkpoint of random weights, v7, two layers."""
    return random_checkpoint(tmp_path_factory.mktemp("base") / "base.pth", n_layer=2, n_embd=16)


@pytest.fixture(scope="session")
def wide_base(tmp_path_factory):
    """One layer, whose channel mixing has matrices of 4,096 numbers: enough for 8-bit moments."""
    return random_checkpoint(tmp_path_factory.mktemp("wide") / "base.pth", n_layer=1, n_embd=32)


def random_checkpoint(path, **sizes):
    torch.manual_seed(1)
    shape = new_shape("x070", vocab_size=VOCABULARY, head_size=8, **sizes)
    tensors = find(MODELS, "x070", flag="").initial_weights(shape)
    # initial checkpoints have zeros where a test wants something to move
    tensors = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in tensors.items()}
    save_tensors(path, tensors)
    return path


@pytest.fixture
def train(base, tmp_path):
    """Run ``fit`` on the tiny model; returns result, model and the reported lines."""

    def run(folder="run", rows=None, checkpoint=base, watched=None, **values):
        config = settings(load_model=str(checkpoint), proj_dir=str(tmp_path / folder), **values)
        adapter = build_adapter(config.method.peft, config.method.peft_config, config.method.train_parts)
        model = load_model(checkpoint, dtype=torch.float32)
        model.regularise(dropout=config.method.dropout, neftune_alpha=config.method.neftune_alpha)
        if adapter is not None:
            torch.manual_seed(config.runtime.random_seed)
            adapter.attach(model)
        data = TrainingData(
            rows or Rows(), schedule=config.schedule, data=config.data, seed=config.runtime.random_seed
        )
        recipe = Recipe(
            method=config.method.peft,
            config=adapter.settings() if adapter else {},
            base_fingerprint=fingerprint(checkpoint),
        )
        lines = []
        result = fit(model=model, adapter=adapter, data=data, config=config, recipe=recipe, report=lines.append,
                     watched=watched)
        return result, model, lines

    return run


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
