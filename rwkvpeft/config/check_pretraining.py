"""Which settings go together when a model is trained from nothing, in RWKV-LM's stages, or up to a number of tokens."""

from __future__ import annotations

from rwkvpeft.config.findings import Findings
from rwkvpeft.config.groups import MethodConfig, ModelConfig, TrainConfig
from rwkvpeft.config.pretraining import STAGE_SAMPLES

_SIZES = ("my_testing", "n_layer", "n_embd")


def draws_weights(config: TrainConfig) -> bool:
    """Whether the run begins by drawing initial weights: all of a model, or what a smaller one lacks."""
    if config.schedule.train_stage >= 2:
        return False
    return config.schedule.train_stage == 1 or not config.model.load_model or bool(config.model.load_partial)


def check_pretraining(config: TrainConfig, findings: Findings, *, planned: bool = False) -> None:
    """Note every setting that cannot be honoured together with the run's beginning, stage or end.

    Args:
        planned: the run is only talked about; without a file, sizes stand for a model that is there already.
    """
    if draws_weights(config):
        _check_heads(config.model, findings)
        if not planned:
            _check_new_model(config, findings)
    elif config.schedule.train_stage >= 2:
        _check_method(f"--train_stage {config.schedule.train_stage}", config.method, findings)
    if config.schedule.train_stage:
        _check_stage(config, findings)
    if config.schedule.my_exit_tokens:
        _check_tokens(config, findings)


def _check_new_model(config: TrainConfig, findings: Findings) -> None:
    model = config.model
    _check_method("a model that begins with random weights", config.method, findings)
    if model.load_partial and not model.load_model:
        findings.add("--load_partial 1 has no effect without a checkpoint to take from", fix="--load_model FILE")
    findings.check(
        bool(model.load_partial) or not model.load_model,
        "--train_stage 1 draws new weights, so --load_model has no effect with --load_partial 0",
        found=model.load_model,
        fix="--load_partial 1 to grow that model, or leave --load_model out",
    )
    if not model.load_model:
        missing = [f"--{name}" for name in _SIZES if not getattr(model, name)]
        findings.check(
            not missing,
            "no base model is given, nor the sizes of a new one",
            found=f"neither --load_model nor {', '.join(missing)}",
            fix="--load_model FILE, or, to train from scratch, --my_testing x070 --n_layer 12 --n_embd 768",
        )
    findings.check(
        config.runtime.num_nodes == 1 or config.schedule.train_stage == 1,
        "several machines cannot draw the same initial weights at once",
        found=f"--num_nodes {config.runtime.num_nodes}",
        fix="--train_stage 1 on one of them, then --train_stage 3 on all, with a --proj_dir that all see",
    )


def _check_heads(model: ModelConfig, findings: Findings) -> None:
    head_size, width = model.head_size_a or 64, model.dim_att or model.n_embd or 0
    # values out of range are noted where ranges are checked; a file tells its own head size
    findings.check(
        bool(model.load_model) or min(head_size, width) < 0 or width % max(head_size, 1) == 0,
        "the heads do not fill the width of the time mixing",
        found=f"width {width}, heads of {head_size}",
        expected="--n_embd (or --dim_att) a multiple of --head_size_a",
    )


def _check_method(what: str, method: MethodConfig, findings: Findings) -> None:
    """An adapter fits what its base has learnt; beside random weights it learns nothing of use."""
    asked = f"--layer_profile {method.layer_profile}" if method.layer_profile else f"--peft {method.peft}"
    findings.check(
        method.peft == "none" and not method.layer_profile,
        f"{what} needs all its weights trained",
        found=asked,
        fix="--peft none, or --load_model FILE with a trained model",
    )


def _check_stage(config: TrainConfig, findings: Findings) -> None:
    schedule = config.schedule
    rows = schedule.micro_bsz * config.runtime.devices * config.runtime.num_nodes
    fitting = [size for size in range(1, STAGE_SAMPLES + 1) if STAGE_SAMPLES % size == 0]
    if rows > 0 and STAGE_SAMPLES % rows:
        findings.add(
            f"a mini-epoch of --train_stage {schedule.train_stage} has {STAGE_SAMPLES} rows, which the batches must "
            "divide",
            found=f"--micro_bsz {schedule.micro_bsz} on {rows // schedule.micro_bsz} devices",
            expected="micro_bsz * devices * num_nodes of "
            + " or ".join(str(size) for size in sorted(sorted(fitting, key=lambda size: abs(size - rows))[:2])),
        )
    elif schedule.epoch_steps * rows != STAGE_SAMPLES:
        findings.add(
            f"--epoch_steps has no effect with --train_stage {schedule.train_stage}: a mini-epoch has {STAGE_SAMPLES} "
            "rows",
            found=schedule.epoch_steps,
            fix="leave it out",
        )
    if schedule.train_stage == 1:
        return
    findings.check(
        config.data.magic_prime > 0,
        f"--train_stage {schedule.train_stage} needs --magic_prime, the order of the windows",
        fix="--magic_prime P, as make_data.py prints it for the data and --ctx_len",
    )
    findings.check(
        not config.model.load_model,
        f"--train_stage {schedule.train_stage} takes the newest rwkv-N.pth in --proj_dir, so --load_model has no "
        "effect",
        found=config.model.load_model,
        fix="name the file rwkv-init.pth in --proj_dir, or leave --train_stage out",
    )
    findings.check(
        not config.model.load_partial,
        f"--load_partial has no effect with --train_stage {schedule.train_stage}",
        fix="--train_stage 1 --load_model FILE --load_partial 1 first",
    )
    findings.check(
        schedule.epoch_begin == 0,
        f"--epoch_begin has no effect with --train_stage {schedule.train_stage}: the newest rwkv-N.pth tells it",
        found=schedule.epoch_begin,
        fix="leave it out",
    )


def _check_tokens(config: TrainConfig, findings: Findings) -> None:
    data, schedule = config.data, config.schedule
    findings.check(
        data.dataload != "only" and not data.length_buckets,
        "--my_exit_tokens counts --ctx_len tokens a row, and here rows differ in length",
        found="--length_buckets" if data.length_buckets else "--dataload only",
        fix="--epoch_count instead of --my_exit_tokens",
    )
    if schedule.my_exit_tokens > 0:
        findings.check(
            schedule.lr_schedule in ("cos", "cos_decay"),
            f"--lr_schedule {schedule.lr_schedule} has no effect with --my_exit_tokens, whose cosine is by tokens",
            fix="leave --lr_schedule out, or a negative --my_exit_tokens, which takes the mean of the two",
        )
