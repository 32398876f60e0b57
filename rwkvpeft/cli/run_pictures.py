"""The pictures of ``report.md``. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rwkvpeft.atomic import write_whole
from rwkvpeft.training.callbacks.metrics import thinned

_GIB = 2**30


def draw_run(steps: list[dict[str, Any]], evaluations: list[dict[str, Any]], folder: Path) -> list[str]:
    """Draw what ``loss_data.jsonl`` and ``val_data.jsonl`` hold into ``folder``.

    Returns: the names of the pictures, without ``.png``.
    """
    loss = Figure(figsize=(8, 4.5), layout="constrained")
    axes = loss.add_subplot(xlabel="optimizer step", ylabel="nats a token", title="loss")
    _curve(axes, steps, "loss", label="training")
    for name, label in (("val_loss", "held out"), ("general_loss", "general")):
        points = [(line["step"], line[name]) for line in evaluations if line[name] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
    axes.legend()
    course = Figure(figsize=(8, 6), layout="constrained")
    panels = {
        "lr": ("learning rate", 1.0),
        "kt_s": ("tokens/s", 1000.0),
        "memory": ("most memory so far, GiB", 1 / _GIB),
    }
    there = [name for name in panels if any(step.get(name) is not None for step in steps)]
    for number, name in enumerate(there, start=1):
        title, factor = panels[name]
        _curve(course.add_subplot(len(there), 1, number, title=title), steps, name, factor)
    course.axes[-1].set_xlabel("optimizer step")
    figures = {"loss": loss, "course": course}
    for name, figure in figures.items():
        _write(figure, folder / f"{name}.png")
    return list(figures)


def _curve(axes: Axes, steps: list[dict[str, Any]], name: str, factor: float = 1.0, label: str = "") -> None:
    points = [(step["step"], step[name] * factor) for step in steps if step.get(name) is not None]
    axes.plot(*thinned(points), label=label)
    axes.grid(alpha=0.3)


def _write(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    write_whole(path, lambda partial: figure.savefig(partial, format="png", dpi=100))
