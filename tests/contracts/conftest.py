"""One small model of every version, adapters of sizes that suit it, and a record of what each combination did."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from rwkvpeft.adapters.base import Adapter
from rwkvpeft.adapters.build import build_adapter
from rwkvpeft.checkpoints.adapter import Recipe, save_adapter
from rwkvpeft.checkpoints.files import fingerprint, save_tensors
from rwkvpeft.checkpoints.load import load_model
from rwkvpeft.checkpoints.quantised import Quantiser
from rwkvpeft.data.batches import TokenBatch
from rwkvpeft.models.shape import new_shape
from rwkvpeft.objectives.language_modelling import LanguageModelling
from rwkvpeft.registry import ADAPTERS, MODELS, find

VOCABULARY = 40
SETTINGS = {
    "lora": {"r": 4},
    "dora": {"r": 4},
    "pissa": {"r": 4},
    "miss": {"r": 12},
    "bat": {"r": 16},
    "state": {"token_shift": True},
    "lora+state": {"r": 4, "state": {"token_shift": True}},
}
SETTINGS |= json.loads((Path(__file__).parents[1] / "tuners.json").read_text())
RATES = {"state": 0.3, "bat": 3e-3}


BASES = ("fp32", "bf16", "int8", "nf4", "fp4", "fp8")
QUANTISED_BY_A_LIBRARY = ("int8", "nf4", "fp4")


class Combination(NamedTuple):
    """A method of ``--peft``, a base (a dtype or a format of ``--quant``), a model version."""

    method: str
    base: str
    version: str

    @property
    def dtype(self) -> torch.dtype:
        """Of weights in the file and of activations."""
        return torch.bfloat16 if self.base == "bf16" else torch.float32

    @property
    def quant(self) -> str:
        """``--quant`` of the combination."""
        return "none" if self.base in ("fp32", "bf16") else self.base


class Tuned:
    """A model with an adapter on it, as a run builds it."""

    def __init__(
        self,
        combination: Combination,
        path: Path,
        tensors: dict[str, torch.Tensor] | None = None,
        dtype: torch.dtype | None = None,
    ):
        self.combination = combination
        self.path = path
        settings = SETTINGS.get(combination.method, {})
        built = build_adapter(combination.method, settings, [] if combination.method == "state" else ["ln"])
        assert built is not None
        self.adapter: Adapter = built
        start = None if tensors is None else self.adapter.take_constants(tensors)
        torch.manual_seed(5)
        self.model = load_model(
            path, dtype=dtype or combination.dtype, op="torch", quantiser=self.quantiser(), prepare=self.adapter.prepare
        )
        self.adapter.attach(self.model.eval())
        if start is not None:
            self.adapter.load(self.model, start)

    def quantiser(self) -> Quantiser | None:
        quant = self.combination.quant
        return None if quant == "none" else Quantiser(quant, keep=self.adapter.trains)

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.model(ids)[0].float()

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        labels = ids[:, 1:]
        batch = TokenBatch(ids[:, :-1], labels, torch.ones(labels.shape), torch.tensor(float(labels.numel())))
        return LanguageModelling()(self.model, batch).total

    def train(self, ids: torch.Tensor, steps: int) -> list[float]:
        """Plain gradient descent of Adam's kind, its moments new at each call. Returns the loss before each step."""
        trained = list(self.adapter.trained_tensors(self.model).values())
        optimizer = torch.optim.Adam(trained, lr=RATES.get(self.combination.method, 1e-2))
        losses = []
        for step in range(steps):
            optimizer.zero_grad()
            loss = self.loss(ids)
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
            self.adapter.after_step(self.model, step + 1, steps)
        return losses

    def save(self, path: Path) -> None:
        recipe = Recipe(
            method=self.adapter.name, config=self.adapter.settings(), train_parts=self.adapter.parts.names,
            base_fingerprint=fingerprint(self.path), quant=self.combination.quant,
        )
        save_adapter(path, self.adapter.file_tensors(self.model), recipe)


@pytest.fixture(scope="session")
def ids() -> torch.Tensor:
    """Two rows of tokens, alike enough to be learned in a few steps."""
    draw = torch.Generator().manual_seed(3)
    return torch.randint(0, 8, (2, 17), generator=draw)


@pytest.fixture(scope="session")
def base_file(tmp_path_factory):
    """The checkpoint of a version in a dtype: two layers of width 32, no weight zero."""
    folder = tmp_path_factory.mktemp("bases")

    def path_of(version, dtype):
        path = folder / f"{version}-{dtype}.pth".replace("torch.", "")
        if not path.exists():
            torch.manual_seed(1)
            shape = new_shape(version, n_layer=2, n_embd=32, vocab_size=VOCABULARY, head_size=16)
            weights = find(MODELS, version, flag="").initial_weights(shape)
            weights = {name: (tensor + 0.1 * torch.randn(tensor.shape)).to(dtype) for name, tensor in weights.items()}
            save_tensors(path, weights)
        return path

    return path_of


METHODS = [name for name in ADAPTERS if name not in ("bone", "disha")] + ["lora+state"]
# these take ten minutes on every base: on their own they are tested where they differ from each other
TUNERS = [name for name in SETTINGS if name not in METHODS]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every native method in every version, of Hugging Face's tuners a part; all of all for the support matrix.

    What a base is stored in concerns its linears, which no version makes of its own: v7 stands for the others there.
    """
    if "case" not in metafunc.fixturenames:
        return
    matrix = [Combination(*names) for names in product(METHODS, BASES, sorted(MODELS))]
    if metafunc.config.getoption("--support-report"):
        matrix += [Combination(*names) for names in product(TUNERS, BASES, sorted(MODELS))]
    else:
        matrix = [one for one in matrix if one.version == "x070" or one.base in ("fp32", "nf4")]
    cases = [pytest.param(combination, id="-".join(combination)) for combination in matrix]
    cases += [
        pytest.param(Combination(name, "nf4", "x070"), id=f"{name}-nf4-x070", marks=pytest.mark.slow)
        for name in TUNERS if not metafunc.config.getoption("--support-report")
    ]
    metafunc.parametrize("case", cases, indirect=True, scope="module")


@pytest.fixture(scope="session")
def tune():
    """Build a ``Tuned``."""
    return Tuned


class Case(NamedTuple):
    """A combination, its base, what it was before training, and what ten steps made of it."""

    combination: Combination
    path: Path
    before: torch.Tensor
    losses: list[float]
    tuned: Tuned
    file: Path


@pytest.fixture(scope="module")
def case(request, base_file, ids, tmp_path_factory):
    """A combination trained for ten steps and saved."""
    combination = request.param
    if combination.base in QUANTISED_BY_A_LIBRARY:
        pytest.importorskip("bitsandbytes")
    if combination.method in TUNERS:
        pytest.importorskip("peft")
    path = base_file(combination.version, combination.dtype)
    tuned = Tuned(combination, path)
    before = tuned.logits(ids)
    losses = tuned.train(ids, 10)
    file = tmp_path_factory.mktemp("adapters") / "rwkv-0.pth"
    tuned.save(file)
    return Case(combination, path, before, losses, tuned, file)


@pytest.fixture(autouse=True)
def _recorded(request):
    if "case" in request.fixturenames:
        request.node.user_properties.append(("combination", "-".join(request.getfixturevalue("case").combination)))


_outcomes: dict[str, dict[str, str]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Remember how each combination's tests ended."""
    combination = dict(report.user_properties).get("combination")
    if combination and (report.when == "call" or report.outcome != "passed"):
        _outcomes.setdefault(combination, {})[report.nodeid.split("::")[1].partition("[")[0]] = report.outcome


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the record where ``--support-report`` says."""
    path = session.config.getoption("--support-report", default=None)
    if path and _outcomes:
        Path(path).write_text(json.dumps(_outcomes, indent=1, sort_keys=True) + "\n", encoding="utf-8")
