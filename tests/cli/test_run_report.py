"""The report, from the files of a run."""

from __future__ import annotations

import json
from dataclasses import replace

from rwkvpeft.cli.report import evaluation_lines
from rwkvpeft.cli.run_report import report_line, write_report
from rwkvpeft.config.groups import (
    DataConfig,
    EvaluationConfig,
    MethodConfig,
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    RuntimeConfig,
    ScheduleConfig,
    TrainConfig,
)
from rwkvpeft.config.objective import ObjectiveConfig
from rwkvpeft.training.fit import FitResult
from rwkvpeft.training.history import History


def config_of(tmp_path):
    return TrainConfig(
        ModelConfig(), DataConfig(ctx_len=77), ScheduleConfig(), OptimizerConfig(), MethodConfig(), RuntimeConfig(),
        OutputConfig(proj_dir=str(tmp_path / "run")),
        evaluation=EvaluationConfig(general_data_file="general.txt"),
    )


def history_of(*losses, general=None):
    history = History()
    for step, loss in enumerate(losses):
        history.add(step=step, epoch=0, val_loss=loss, general_loss=general and general[step], t_cost=1.0)
    return history


def test_a_run_without_a_step_has_a_report(tmp_path):
    path = write_report(config_of(tmp_path), FitResult(0, None, True), beginning=["data: a | b"], ending=["stopped"])
    text = path.read_text()
    assert "Interrupted after step 0" in text
    assert "No step was taken." in text
    assert "    data: a | b" in text


def test_settings_that_differ_from_their_defaults_come_first(tmp_path):
    text = write_report(config_of(tmp_path), FitResult(1, 1.0, False), beginning=[], ending=[]).read_text()
    assert "| `--ctx_len` | 77 | None |" in text.partition("<details>")[0]
    assert "| `--micro_bsz` | 12 |" in text.partition("<details>")[2]


def test_an_answer_cannot_break_out_of_its_cell(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    samples = [
        {"step": step, "prompt": "Why?", "answer": "a | b\n</details> & c", "expected": "d"} for step in (0, 5)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    text = write_report(config_of(tmp_path), FitResult(5, 1.0, False), beginning=[], ending=[]).read_text()
    assert "| base | a \\| b<br>&lt;/details> &amp; c |\n| step 5 |" in text
    assert "| expected | d |" in text


def test_a_last_evaluation_above_the_best_is_called_overfitting_with_its_beginning(tmp_path):
    lines = evaluation_lines(config_of(tmp_path), history_of(3.0, 2.0, 1.5, 1.75))
    assert "base 3.0000, best 1.5000 after step 2" in lines[0]
    assert lines[1].startswith("note: overfitting since step 2: the last held-out loss is 0.2500 nats above")


def test_a_model_that_never_beats_the_base_is_named(tmp_path):
    lines = evaluation_lines(config_of(tmp_path), history_of(1.0, 2.0))
    assert "no trained model predicts the held-out data better" in lines[-1]


def test_the_loss_of_an_objective_that_is_no_likelihood_is_not_called_one(tmp_path):
    config = replace(config_of(tmp_path), objective=ObjectiveConfig(objective="grpo"))
    assert "no trained model has a lower held-out loss" in evaluation_lines(config, history_of(1.0, 2.0))[-1]
    assert "nats" not in evaluation_lines(config, history_of(3.0, 1.5, 1.75))[1]


def test_what_was_forgotten_is_named(tmp_path):
    lines = evaluation_lines(config_of(tmp_path), history_of(None, None, general=[1.0, 1.25]))
    assert lines == ["warning: the model has forgotten: its loss on general.txt is 0.2500 nats above the base's"]


def test_a_report_that_cannot_be_written_fails_no_run(tmp_path):
    (tmp_path / "run" / "report.md").mkdir(parents=True)
    line = report_line(config_of(tmp_path), FitResult(1, 1.0, False), beginning=[], ending=[])
    assert "cannot write" in line
    assert "report.md" in line
