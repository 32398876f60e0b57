"""What of a training run may be refused, done before anything is written or computed."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from rwkvpeft.adapters.base import Adapter
from rwkvpeft.checkpoints.adapter import Recipe
from rwkvpeft.cli import assemble, watch
from rwkvpeft.cli.assemble import Base
from rwkvpeft.cli.scratch import Beginning
from rwkvpeft.config.groups import TrainConfig
from rwkvpeft.data.datamodule import TrainingData
from rwkvpeft.data.rows import RowDataset
from rwkvpeft.objectives.reward_functions import load_rewards
from rwkvpeft.training.callbacks.watching import Watched
from rwkvpeft.training.devices import find_device
from rwkvpeft.training.essentials import check_essentials, essential_settings
from rwkvpeft.training.module import RunPlan
from rwkvpeft.training.optimizers.contract import find_optimizer
from rwkvpeft.training.plan import run_plan
from rwkvpeft.training.resume import find_point
from rwkvpeft.training.strategies.build import build_sharing
from rwkvpeft.training.teacher import taught_rows


class Opened(NamedTuple):
    """The method and the data of a run, which go together.

    ``start`` are the adapter's first values where a file gives them; ``longest`` the settings with rows as long as the
    longest of the data, for what memory they need, and ``crowded`` the tokens of each sequence of the packed row that
    takes most, as ``RowDataset.crowded_row``.
    """

    adapter: Adapter | None
    start: dict[str, Tensor] | None
    rows: RowDataset
    held_out: RowDataset | None
    longest: TrainConfig
    crowded: tuple[int, ...]


class Prepared(NamedTuple):
    """The rest of what a run needs beside its model.

    ``identity`` tells its settings, files and resume point from those of another run.
    """

    data: TrainingData
    watched: Watched
    recipe: Recipe
    plan: RunPlan
    identity: dict[str, Any]


def open_run(config: TrainConfig, base: Base) -> Opened:
    """Make the adapter and open the data.

    Raises: UserError if the machine, the memory, the base, the adapter's file or the data do not suit the settings.
    """
    adapter = assemble.make_adapter(config.method, base.shape)
    # a mistake in their names is told before anything large is read
    load_rewards(config.rewards.reward)
    assemble.check_merge(base, config.method, adapter)
    assemble.check_whole_rows(base, config)
    start = assemble.read_start(base, config.method, adapter)
    find_optimizer(config.optimizer.optim).check(find_device(config.runtime))
    build_sharing(config)
    if config.objective.reads == "tokens":
        assemble.check_fits(base, config)
    rows, held_out = watch.open_training_data(config, base.shape.vocab_size)
    rows = taught_rows(config, base.shape, rows)
    longest, crowded = config, rows.crowded_row
    if config.objective.reads == "prompts":
        crowded = (*crowded, *(config.rewards.answer_tokens,) * config.rewards.group_size)
    if config.rows_vary:
        longest = assemble.with_longest_row(config, max(rows.longest_row, sum(crowded)))
        assemble.check_fits(base, longest)
    return Opened(adapter, start, rows, held_out, longest, crowded)


def prepare(config: TrainConfig, beginning: Beginning, opened: Opened) -> Prepared:
    """Open what the run is watched with, and compare its settings with those of the run it goes on with, if any.

    Raises: UserError if held-out data or prompts cannot be read, or the settings are others.
    """
    base, adapter = beginning.base, opened.adapter
    answers = not base.shape.head_qk
    watched = watch.make_watched(config, opened.held_out, base.shape.vocab_size, adapter, answers=answers)
    data = TrainingData(opened.rows, schedule=config.schedule, data=config.data, seed=config.runtime.random_seed,
                        repeats=config.rewards.policy_steps)
    recipe = assemble.make_recipe(base, config, adapter)
    plan = run_plan(config, data.steps_for(config.runtime.devices * config.runtime.num_nodes), beginning.begun)
    # broken points are told where the run goes on
    point = find_point(config.output, lambda line: None)
    essentials = essential_settings(config, recipe, plan)
    if point is not None:
        check_essentials(point, essentials, config)
        if adapter is not None:
            adapter.take_constants(point.constants())
    identity = essentials | {"resume point": None if point is None else point.path.name}
    return Prepared(data, watched, recipe, plan, identity)
