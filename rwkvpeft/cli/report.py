"""What a training run says before its first step and after its last."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from rwkvpeft.config.groups import TrainConfig
from rwkvpeft.config.objective import PREFERENCES, WITH_REFERENCE
from rwkvpeft.config.reference import compares_with_start
from rwkvpeft.training.history import BEST

if TYPE_CHECKING:
    from rwkvpeft.cli.assemble import Base, Chosen
    from rwkvpeft.data.datamodule import TrainingData
    from rwkvpeft.memory import LevelChoice
    from rwkvpeft.models.backbone import Rwkv
    from rwkvpeft.training.callbacks.watching import Watched
    from rwkvpeft.training.fit import FitResult
    from rwkvpeft.training.history import History
    from rwkvpeft.training.module import RunPlan

# what a row of the data is called
_READS = {"tokens": "document", "pairs": "record", "prompts": "prompt"}
_METHODS = {"none": "every weight", "lora": "LoRA", "state": "initial memories"}


def start_lines(
    config: TrainConfig,
    base: Base,
    model: Rwkv,
    data: TrainingData,
    plan: RunPlan,
    chosen: Chosen,
    recompute: LevelChoice,
    *,
    origin: str = "",
    watched: Watched | None = None,
) -> list[str]:
    """One line for each thing a user may want to stop the run for. ``origin`` says what begins otherwise than usual."""
    runtime = config.runtime
    schedule = config.schedule
    return [
        *_model_lines(config, base, origin, model),
        *data.dataset.report().render().splitlines(),
        *(_watched_lines(config, watched) if watched else []),
        *_objective_lines(config),
        *_plan_lines(config, data, plan),
        f"learning rate: {schedule.lr_init:g} to {schedule.lr_final:g}, {_shape(config)}",
        f"machine: {runtime.devices * runtime.num_nodes} x {runtime.accelerator}, {runtime.precision}, "
        f"strategy {runtime.strategy}",
        f"operator: {chosen.wkv.report}",
        f"rest of a block: {chosen.rest}",
        *_chunk_lines(config),
        f"computed twice: {recompute.report}",
        f"output: {config.output.proj_dir}",
    ]


def _watched_lines(config: TrainConfig, watched: Watched) -> list[str]:
    steps = config.evaluation.val_steps
    often = f"every {'step' if steps == 1 else f'{steps:,} steps'}" if steps else "after each mini-epoch"
    lines = []
    for name, rows in (("held out", watched.held_out), ("general data", watched.general)):
        if rows is not None:
            found = rows.report()
            kind = _READS[config.objective.reads]
            counted = f"{found.documents:,} {kind}{'' if found.documents == 1 else 's'}"
            lines.append(f"{name}: {counted}, {found.tokens:,} tokens, evaluated {often}")
    return lines


def _shape(config: TrainConfig) -> str:
    schedule = config.schedule
    if not schedule.my_exit_tokens:
        return schedule.lr_schedule
    cosine = "cosine by tokens"
    return cosine if schedule.my_exit_tokens > 0 else f"mean of {schedule.lr_schedule} and {cosine}"


def _objective_lines(config: TrainConfig) -> list[str]:
    """What is learned, where it is not the next token; with the settings that decide most."""
    name = config.objective.objective
    if name in PREFERENCES:
        # it imports torch, as below
        from rwkvpeft.objectives.preference.base import USUAL

        asked, usual = config.objective, USUAL[name]
        beta = usual.beta if asked.beta is None else asked.beta
        share = usual.sft_share if asked.sft_share is None else asked.sft_share
        start = "the model as training finds it" if compares_with_start(config) else "the base, adapter switched off"
        compared = f", compared with {start}" if name in WITH_REFERENCE else ""
        return [f"objective: {name}, beta {beta:g}, share of plain tuning {share:g}{compared}"]
    if name == "distill":
        asked_of = config.distillation
        return [f"objective: distill from {asked_of.teacher}, weight {asked_of.distill_alpha:g}, temperature "
                f"{asked_of.distill_temperature:g}, the likeliest {asked_of.distill_top_k or 'all'} tokens"]
    if name == "grpo":
        rewards = config.rewards
        return [f"objective: grpo, {rewards.group_size} answers of at most {rewards.answer_tokens} tokens to each "
                f"prompt, judged by {', '.join(rewards.reward)}; advantage {rewards.advantage}"]
    return []


def _chunk_lines(config: TrainConfig) -> list[str]:
    long = config.long_context
    return [f"chunks: of {long.chunk_ctx:,} tokens, {long.infctx_grad} gradients"] if long.infctx else []


def _model_lines(config: TrainConfig, base: Base, origin: str, model: Rwkv) -> list[str]:
    # here and not above: it imports torch, which mistakes told before the run must not wait for
    from rwkvpeft.quantization.linear import QuantizedLinear

    shape = base.shape
    packed = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    total = sum(parameter.numel() for parameter in model.parameters())
    total += sum(module.in_features * module.out_features for module in packed)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    kind = _kind(config)
    method = config.method.layer_profile if kind == "profile" else _METHODS.get(kind, kind)
    if kind not in ("none", "state") and config.method.train_parts:
        method += f" and {', '.join(config.method.train_parts)}"
    stored = f"; {len(packed)} matrices frozen in {packed[0].format.label}" if packed else ""
    return [
        f"model: {base.path}, RWKV {shape.version}, {shape.n_layer} layers, width {shape.n_embd}, "
        f"{shape.vocab_size} token ids{f'; {origin}' if origin else ''}",
        f"trained: {method}, {_count(trained)} of {_count(total)} parameters{stored}",
    ]


def _plan_lines(config: TrainConfig, data: TrainingData, plan: RunPlan) -> list[str]:
    schedule = config.schedule
    devices = config.runtime.devices * config.runtime.num_nodes
    rows = schedule.micro_bsz * devices
    passes = plan.total_batches * rows / max(1, data.dataset.pass_rows)
    shared = f" on each of {devices} devices" if devices > 1 else ""
    lines = [
        f"plan: {plan.epoch_count} x {plan.epoch_steps:,} batches of {schedule.micro_bsz} rows{shared}, "
        f"{plan.total_steps:,} steps, {passes:.3g} passes over the data"
    ]
    if schedule.my_exit_tokens or schedule.train_stage:
        tokens = rows * (config.data.ctx_len or 1)
        done = f", of which {plan.begun * plan.epoch_steps * tokens:,} in earlier runs" if plan.begun else ""
        lines.append(
            f"tokens: {plan.epoch_steps * tokens:,} a mini-epoch, {plan.total_batches * tokens:,} to the end{done}"
        )
    return lines


def end_lines(config: TrainConfig, base: Base, result: FitResult) -> list[str]:
    """Where the result is and the commands that use it."""
    folder = Path(config.output.proj_dir)
    loss = "" if result.final_loss is None else f", loss {result.final_loss:.4f}"
    evaluated = evaluation_lines(config, result.history)
    if result.stopped_early:
        stopped = f"stopped after step {result.steps}{loss}; the same command goes on from {folder / 'resume'}"
        return [stopped, *evaluated]
    newest = _result(folder, result)
    early = ", early: the held-out loss no longer fell" if result.gave_up else ""
    lines = [f"done after step {result.steps}{loss}{early}", *evaluated]
    if newest is None:
        return lines
    lines.append(f"result    {newest}")
    model, quoted = base.path, _word(newest)
    if _kind(config) == "none" or config.method.merge:
        lines.append(f"try it    python -m rwkvpeft.generate --model {quoted} --prompt '...'")
        return lines
    option = "--state" if _kind(config) == "state" else "--adapter"
    lines.append(f"try it    python -m rwkvpeft.generate --model {_word(model)} {option} {quoted} --prompt '...'")
    if base.packed.quant != "none":
        # merging needs the weights that this file was made of
        model = "ORIGINAL.pth"
    lines.append(f"merge it  python merge.py --base_model {_word(model)} --checkpoint {quoted} --output MERGED.pth")
    return lines


def _word(path: object) -> str:
    """A path as a shell takes it, whatever is in its name."""
    return shlex.quote(str(path))


def evaluation_lines(config: TrainConfig, history: History) -> list[str]:
    """What the evaluations say about the run: the base, the best and the last, and what got worse."""
    lines = []
    base, best, newest = history.base, history.best, history.newest
    # the losses of preferences and rewards are no likelihoods of the data
    is_likelihood = config.objective.reads == "tokens"
    if best is not None and newest is not None:
        before = "" if base is None else f"base {_nats(base.val_loss)}, "
        lines.append(
            f"held-out loss: {before}best {_nats(best.val_loss)} after step {best.step} "
            f"({Path(config.output.proj_dir) / BEST}), last {_nats(newest.val_loss)}"
        )
        if history.is_overfitted:
            unit = "nats " if is_likelihood else ""
            lines.append(f"note: overfitting since step {best.step}: the last held-out loss is {history.excess:.4f} "
                         f"{unit}above the best")
        if base is not None and base.val_loss is not None and (best.val_loss or 0.0) >= base.val_loss:
            better = "predicts the held-out data better than" if is_likelihood else "has a lower held-out loss than"
            lines.append(f"warning: no trained model {better} the base")
    if history.forgotten() > config.evaluation.general_alarm:
        lines.append(f"warning: the model has forgotten: its loss on {config.evaluation.general_data_file} is "
                     f"{history.forgotten():.4f} nats above the base's")
    return lines


def _nats(loss: float | None) -> str:
    return "not a number" if loss is None else f"{loss:.4f}"


def _result(folder: Path, result: FitResult) -> Path | None:
    """The checkpoint to use: the best where the last is worse or was never written, otherwise the newest."""
    best = folder / BEST
    if result.history.best is not None and best.is_file() and (result.history.is_overfitted or result.gave_up):
        return best
    written = [path for path in folder.glob("rwkv-*.pth") if path != best]
    return max(written, key=lambda path: path.stat().st_mtime_ns, default=None)


def _kind(config: TrainConfig) -> str:
    """The method; beside a layer profile ``--peft`` names none."""
    return "profile" if config.method.layer_profile else config.method.peft


def _count(number: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,}"
