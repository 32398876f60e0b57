"""What people who wait are told."""

from __future__ import annotations

from lightning_utilities.core.rank_zero import rank_zero_only

from rwkvpeft.data import progress as module
from rwkvpeft.data.progress import Progress, ProgressLines


def show(monkeypatch, capsys, *seconds, total=100):
    """What is told of work that reaches its parts at these seconds."""
    clock = iter([0.0, *seconds])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    with ProgressLines(is_terminal=False) as lines:
        for number in range(1, len(seconds) + 1):
            lines.show_slow(Progress("tokenise", total * number // len(seconds), total, 10 * number))
    return capsys.readouterr().err


def test_quick_work_is_not_told_of(monkeypatch, capsys):
    assert show(monkeypatch, capsys, 1.0, 2.0) == ""


def test_slow_work_is_told_of_every_few_seconds_and_at_its_end(monkeypatch, capsys):
    told = show(monkeypatch, capsys, 1.0, 6.0, 7.0, 12.0, 13.0).splitlines()
    assert [line.split(",")[0] for line in told] == ["tokenise: 40 %", "tokenise: 80 %", "tokenise: 100 %"]


def test_a_bar_reaches_its_end(capsys):
    with ProgressLines(is_terminal=True) as lines:
        lines.show_slow(Progress("tokenise", 50, 100, 10))
        lines.show_slow(Progress("tokenise", 100, 100, 20))
    assert "100%" in capsys.readouterr().err


def test_of_several_processes_only_the_first_shows_how_far_it_is(monkeypatch, capsys):
    monkeypatch.setattr(rank_zero_only, "rank", 1, raising=False)
    with ProgressLines(is_terminal=False) as progress:
        progress.show(Progress("tokenise", 5, 5, 10))
    assert capsys.readouterr().err == ""
