"""``python train.py``: read the settings, check everything that can be checked, train, say what to do next."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rwkvpeft.cli.guard import guarded
from rwkvpeft.cli.out_of_memory import Attempts
from rwkvpeft.cli.together import Alone, find_launch, join_others, leaves_it_to_the_first
from rwkvpeft.config.groups import TrainConfig
from rwkvpeft.config.parse import build_groups, parse_train
from rwkvpeft.config.resolve import Machine, resolve
from rwkvpeft.config.settings_file import write_settings
from rwkvpeft.registry import ADAPTER_SETTINGS, find
from rwkvpeft.training.point_order import RECORD, newest_first

if TYPE_CHECKING:
    from rwkvpeft.cli.prepare import Opened, Prepared
    from rwkvpeft.cli.scratch import Beginning
    from rwkvpeft.config.launcher import Launch
    from rwkvpeft.training.peers import Peers


def main(argv: Sequence[str] | None = None) -> int:
    """Run the training command. Returns the exit code: 0, 2 after a user's mistake, 130 after a second Ctrl-C.

    A process that ends because another one of the run has died ends with 75, from wherever it is.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _train(words), debug="--debug" in words)


def _train(argv: list[str]) -> int:
    given = parse_train(argv, _method_settings)
    return guarded(lambda: _train_together(given, argv), debug=bool(given.get("debug")))


def _train_together(given: dict[str, Any], argv: list[str]) -> int:
    launch, told = find_launch(given)
    if leaves_it_to_the_first(launch, given):
        return 0
    if given.get("check"):
        return _check_data(given)
    with join_others(launch, given) as peers:
        # mistakes that all processes would find are told once
        peers.wait()
        config, remarks = resolve(given, _machine(given), earlier_seed=_earlier_seed(given, launch), files_too=True)
        return _run_within_memory(peers, peers.follow(config), [*told, *remarks], argv)


def _check_data(given: dict[str, Any]) -> int:
    """Report on the data alone; 2 where a line of them cannot be trained on."""
    config, _ = resolve(given, Machine("cpu", has_bf16=True), files_too=True, planned=True)
    from rwkvpeft.data.check_records import check_training_data
    from rwkvpeft.data.check_report import render, write_picture
    from rwkvpeft.data.progress import ProgressLines

    with ProgressLines(sys.stderr.isatty()) as progress:
        found = check_training_data(config, progress.show_slow)
    print(render(found))
    picture = Path(config.output.proj_dir) / "data_lengths.png"
    if len(found.lengths()) and write_picture(found, picture):
        print(f"the lengths are drawn in {picture}")
    return 0 if found.is_fine else 2


def _run_within_memory(peers: Peers | Alone, config: TrainConfig, remarks: list[str], argv: list[str]) -> int:
    attempts = Attempts(config, _say)
    attempts.run(lambda settings: _run(peers, config, settings, attempts, remarks, argv))
    return 0


def _run(
    peers: Peers | Alone,
    asked: TrainConfig,
    settings: TrainConfig,
    attempts: Attempts,
    remarks: list[str],
    argv: list[str],
) -> None:
    # the libraries take seconds to import: mistakes found so far have been told without them
    from rwkvpeft.cli.fit_to_memory import fit_to_memory
    from rwkvpeft.cli.prepare import open_run, prepare
    from rwkvpeft.cli.scratch import find_beginning
    from rwkvpeft.data.preview import preview
    from rwkvpeft.data.text import data_tokenizer

    beginning = find_beginning(settings, _say, first_process=_is_first_process())
    config = beginning.config
    if beginning.new is not None and config.schedule.train_stage == 1:
        for line in remarks:
            _say(line)
        beginning.new.write(config, _say)
        _say("go on with --train_stage 2 or 3")
        return
    opened = open_run(config, beginning.base)
    if config.data.preview:
        print(preview(opened.rows, config.data.preview, data_tokenizer(config.data), color=sys.stdout.isatty()))
        return
    config, opened, more = fit_to_memory(config, beginning.base, opened)
    attempts.tried(config.schedule.micro_bsz)
    beginning = beginning._replace(config=config)
    prepared = prepare(config, beginning, opened)
    _fit(peers, asked, beginning, opened, prepared, [*remarks, *more], argv)


def _fit(
    peers: Peers | Alone,
    asked: TrainConfig,
    beginning: Beginning,
    opened: Opened,
    prepared: Prepared,
    remarks: list[str],
    argv: list[str],
) -> None:
    """Build the model, train it, and report. ``asked`` is written down: what it comes to, the next run finds again."""
    from rwkvpeft.cli import assemble, report
    from rwkvpeft.cli.objective import keeps_reference, provide
    from rwkvpeft.cli.run_report import report_line
    from rwkvpeft.data.text import keep_vocabulary
    from rwkvpeft.memory import with_level
    from rwkvpeft.training.essentials import other_results
    from rwkvpeft.training.fit import fit

    config, base, origin, new, begun = beginning
    data, watched, recipe, plan, identity = prepared
    adapter = opened.adapter
    # on a GPU this compiles and measures: after everything that may be refused at once
    chosen, more = assemble.choose_programs(base.shape, config)
    if new is not None:
        base = new.write(config, _say)
        recipe = assemble.make_recipe(base, config, adapter)
    peers.agree(identity | {"base model": recipe.base_fingerprint})
    peers.ready(argv)
    recompute = assemble.choose_recompute(base, opened.longest, chosen, opened.crowded)
    model = assemble.build_for_training(base, with_level(config, recompute.grad_cp), chosen, adapter, opened.start)
    lines = report.start_lines(config, base, model, data, plan, chosen, recompute, origin=origin, watched=watched)
    differs = other_results(config, model)
    if differs is not None and config.schedule.micro_bsz != asked.schedule.micro_bsz:
        lines.append(f"note: the results are not quite those of whole batches: {differs}")
    for line in [*remarks, *more, *lines]:
        _say(line)
    if _is_first_process():
        keep_vocabulary(config.data)
        assemble.write_constants(config, adapter, model)
        write_settings(Path(config.output.proj_dir) / "config.yaml", asked)
    provided = provide(config, opened.rows, opened.held_out, chosen.rows.program)
    also = [*peers.callbacks(), *keeps_reference(config, opened, identity, _say)]
    result = fit(model=model, adapter=adapter, data=data, config=config, recipe=recipe, report=_say,
                 provided=provided, watched=watched, begun=begun, also=also)
    ending = report.end_lines(config, base, result)
    if config.evaluation.report and _is_first_process():
        ending.append(report_line(config, result, beginning=lines, ending=ending))
    for line in ending:
        _say(line)


def _method_settings(method: str) -> type | None:
    name = method.partition("+")[0]
    if name in ADAPTER_SETTINGS:
        settings: type = find(ADAPTER_SETTINGS, name, flag="--peft")
        return settings
    from rwkvpeft.adapters.huggingface import method_settings

    return method_settings(name)


def _machine(given: dict[str, Any]) -> Machine:
    accelerator = given.get("accelerator", "auto")
    if accelerator == "cpu":
        return Machine("cpu", has_bf16=True)
    from rwkvpeft.cli.assemble import find_machine

    return find_machine(accelerator)


def _earlier_seed(given: dict[str, Any], launch: Launch) -> int | None:
    """The seed of the run that ``--resume`` takes up, so that its order of samples goes on.

    -1 for a process that takes the first one's.
    """
    if not launch.leads:
        return -1
    output = build_groups({name: given[name] for name in ("proj_dir", "resume") if name in given}).output
    if output.resume == "none":
        return None
    folder = Path(output.proj_dir) / "resume" if output.resume == "auto" else Path(output.resume)
    for point in (folder, *newest_first(folder)):
        try:
            seed = json.loads((point / RECORD).read_text(encoding="utf-8"))["essentials"]["random_seed"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            # a broken point is reported and passed over when the run is taken up
            continue
        if isinstance(seed, int):
            return seed
    return None


def _is_first_process() -> bool:
    from pytorch_lightning.utilities.rank_zero import rank_zero_only

    return bool(getattr(rank_zero_only, "rank", 0) == 0)


def _say(line: str) -> None:
    if _is_first_process():
        print(line)
