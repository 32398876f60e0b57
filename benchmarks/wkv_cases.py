"""Inputs that break naive WKV kernels, each with the errors it excuses.

Letters: B batch, T tokens, H heads, N head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from measuring import relative_error
from torch import Tensor

from rwkvpeft.ops.contract import Needs, Wkv
from rwkvpeft.ops.sequences import Sequences
from rwkvpeft.ops.trial import limit_of, sample_operands

LENGTHS = (0, 1, 15, 16, 17, 63, 64, 65, 100, 1000)
_REPEATED = {"gradient of a": 6e-2, "gradient of b": 6e-2, "gradient of w": 1e-2}
_STATE_SEED = 5


@dataclass(frozen=True)
class Case:
    """One problem.

    Args:
        operands: as the operator takes them.
        state: before the first token, or None.
        frozen: the operands want no gradient.
        read: whether the loss looks at y; it always looks at the final state.
        pieces: into how many calls the tokens are cut, states carried.
        lengths: sequences of a packed row.
        limits: errors of this input alone, by result.
    """

    name: str
    operands: dict[str, Tensor]
    state: Tensor | None = None
    frozen: bool = False
    read: bool = True
    pieces: int = 1
    lengths: tuple[int, ...] = ()
    limits: Mapping[str, float] = field(default_factory=dict)

    def limit(self, name: str) -> float:
        """The largest error excused of the result ``name``."""
        return max(limit_of(name, self.operands["v"].dtype), self.limits.get(name, 0.0))


def results(run: Wkv, case: Case, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """y, the final state and every gradient of the case, computed in its own dtypes or in ``dtype``."""
    operands = {name: x.detach().to(dtype or x.dtype).requires_grad_(not case.frozen)
                for name, x in case.operands.items()}
    state = None if case.state is None else case.state.detach().to(dtype or case.state.dtype).requires_grad_()
    more = {"sequences": Sequences(case.lengths)} if case.lengths else {}
    # expanded states and slices of tokens come with strides of their own
    y, after = _in_pieces(run, operands, state, case.pieces, more)
    found = {"y": y, "final state": after}
    wanted = {name: x for name, x in {**operands, "state": state}.items() if x is not None and x.requires_grad}
    generator = torch.Generator(y.device).manual_seed(_STATE_SEED)
    weights = [torch.randn(x.shape, generator=generator, device=x.device) for x in (y, after)]
    # rounded alike for the program and for the truth
    weights[0] = weights[0].to(case.operands["v"].dtype) * case.read
    grads = torch.autograd.grad([y, after], list(wanted.values()),
                                [w.to(x) for w, x in zip(weights, (y, after), strict=True)], materialize_grads=True)
    return found | {f"gradient of {name}": grad for name, grad in zip(wanted, grads, strict=True)}


def errors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative error of every result."""
    return {name: relative_error(found[name], tensor) for name, tensor in expected.items()}


def few_cases(operator: str, device: torch.device) -> Iterator[Case]:
    """Three of them, small enough for Triton's interpreter: fp32, fp32 with both decays, a packed row."""
    needs = Needs(device.type, torch.float32, 64, training=True, batch=1, tokens=37, heads=1)
    torch.manual_seed(3)
    state = torch.randn(1, 1, 64, 64, device=device)
    operands = {name: x.detach() for name, x in sample_operands(operator, needs, device).items()}
    yield Case("T = 37", operands, state)
    mixed = {name: x.clone() for name, x in operands.items()}
    _DECAYS[operator == "wkv7"]["both by channel"](mixed)
    yield Case("both decays by channel", mixed, state)
    yield Case("packed row", operands, torch.randn(3, 1, 64, 64, device=device), lengths=(20, 0, 17))


def cases(operator: str, device: torch.device, *, large: bool) -> Iterator[Case]:
    """All inputs for one operator, ``large`` ones with N = 64 and up to 1000 heads."""
    size = 64 if large else 16
    needs = Needs(device.type, torch.bfloat16, size, training=True, batch=2, tokens=100, heads=3)

    def draw(changes: Callable[[dict[str, Tensor]], object] | None = None, **sizes: object) -> dict[str, Tensor]:
        operands = {name: x.detach() for name, x in sample_operands(operator, replace(needs, **sizes), device).items()}
        if changes:
            changes(operands)
        return operands

    def state(batch: int = 2, heads: int = 3, scale: float = 1.0, n: int = size) -> Tensor:
        return torch.randn(batch, heads, n, n, device=device) * scale

    torch.manual_seed(3)
    for tokens in LENGTHS if large else LENGTHS[:-1]:
        yield Case(f"T = {tokens}", draw(tokens=tokens), state())
    for dtype in (torch.float32, torch.float16):
        yield Case(str(dtype).removeprefix("torch."), draw(dtype=dtype), state())
    for name, change in _DECAYS[operator == "wkv7"].items():
        yield Case(name, draw(change), state())
    yield Case("the same token again and again", draw(_repeat, tokens=512 if large else 128), state(),
               limits=dict.fromkeys(("y", "final state"), 8e-3) | _REPEATED)
    for scale in (0.0, 1e-20, 1e4):
        yield Case(f"keys times {scale:g}", draw(lambda x, s=scale: x["k"].mul_(s)), state())
    yield Case("state of size 1000", draw(), state(scale=1000 / size))
    yield Case("only the state is trained", draw(), state(), frozen=True)
    yield Case("only the final state is read", draw(), state(), read=False)
    yield Case("expanded state, strided operands", {n: _strided(x) for n, x in draw().items()},
               state(batch=1).expand(2, -1, -1, -1))
    yield Case("four calls, states carried", draw(tokens=256 if large else 64), state(), pieces=4)
    yield Case("B·H = 1, no state", draw(batch=1, heads=1, tokens=256 if large else 64))
    lengths = (5, 0, 64, 129) if large else (5, 0, 33)
    yield Case("packed row", draw(batch=1, tokens=sum(lengths)), state(batch=len(lengths)), lengths=lengths)
    if large:
        yield Case("B·H = 1000", draw(batch=25, heads=40, tokens=80), state(25, 40))
        yield Case("head size 128", draw(head_size=128), state(n=128))


def _in_pieces(
    run: Wkv, operands: dict[str, Tensor], state: Tensor | None, pieces: int, more: Mapping[str, Sequences]
) -> tuple[Tensor, Tensor]:
    if pieces == 1:
        return run(**operands, state=state, **more)
    read = []
    for part in range(pieces):
        own = {name: x.chunk(pieces, 1)[part] if x.dim() == 4 else x for name, x in operands.items()}
        y, state = run(**own, state=state)
        read.append(y)
    return torch.cat(read, 1), state


def _repeat(operands: dict[str, Tensor]) -> None:
    for name in ("k", "v", "a", "b"):
        if name in operands:
            operands[name] = operands[name][:, :1].expand_as(operands[name]).contiguous()
    if "b" in operands:
        # the gate nearly open, hardly any decay
        operands["b"] = (-0.999 * operands["a"].float()).to(operands["a"].dtype)
    operands["w"].fill_(-9.0)


def _strided(x: Tensor) -> Tensor:
    """The same numbers with the last two axes in another order in memory."""
    return x.mT.contiguous().mT


def _fill(value: float) -> Callable[[dict[str, Tensor]], object]:
    return lambda operands: operands["w"].fill_(value)


def _alternate(strong: float, weak: float) -> Callable[[dict[str, Tensor]], object]:
    def change(operands: dict[str, Tensor]) -> None:
        operands["w"][..., 0::2] = strong
        operands["w"][..., 1::2] = weak

    return change


_DECAYS = {
    True: {"strongest decay": _fill(30.0), "no decay": _fill(-30.0), "both by channel": _alternate(30.0, -30.0)},
    False: {"strong decay": _fill(5.0), "no decay": _fill(-20.0), "both by channel": _alternate(5.0, -8.0)},
}
"""By whether the operator is wkv7, whose w is a logit; the others' is the logarithm of minus the log decay."""
