"""Whether rows can be worked through in chunks with the other settings of a run."""

from __future__ import annotations

from rwkvpeft.config.findings import Findings
from rwkvpeft.config.groups import LongContextConfig, TrainConfig
from rwkvpeft.config.methods import members


def check_long_context(config: TrainConfig, findings: Findings) -> None:
    """Note every setting that ``--infctx`` cannot honour, and its own settings where it is not given."""
    long = config.long_context
    findings.check(long.chunk_ctx > 0, "--chunk_ctx is too small", found=long.chunk_ctx, expected="1 or more")
    if not long.infctx:
        _check_unused(long, findings)
        return
    findings.check(
        long.infctx_grad == "exact" or not long.infctx_offload,
        "--infctx_offload has no effect: with truncated gradients no state is kept",
        fix="--infctx_grad exact --infctx_offload",
    )
    findings.check(
        config.data.dataload != "pack",
        "--infctx cannot cut packed rows: its chunks hand on one state for each row, not for each of its documents",
        found="--dataload pack",
        fix="--dataload pad, only or get; short documents need no --infctx",
    )
    findings.check(
        not config.runtime.cuda_graph,
        "--infctx steps cannot be recorded as a CUDA graph: each chunk is differentiated on its own",
        found="--cuda_graph",
        fix="leave one of the two out",
    )
    findings.check(
        not config.model.head_qk,
        "--infctx cannot serve --head_qk, which looks back at every token of a row: no state hands those on",
        found=config.model.head_qk,
        fix="--head_qk 0",
    )
    alone = config.method.peft == "state" and not config.method.layer_profile
    findings.check(
        not alone or long.infctx_grad == "exact" or (config.data.ctx_len or 0) <= long.chunk_ctx,
        "with truncated gradients nothing after a row's first chunk trains the initial states",
        found=f"--peft state --infctx_grad {long.infctx_grad}",
        fix="--infctx_grad exact",
    )


def _check_unused(long: LongContextConfig, findings: Findings) -> None:
    usual = LongContextConfig()
    for name in ("chunk_ctx", "infctx_grad", "infctx_offload"):
        value = getattr(long, name)
        findings.check(
            value == getattr(usual, name), f"--{name} has no effect without --infctx", found=value, fix="--infctx"
        )


def long_context_remarks(config: TrainConfig) -> list[str]:
    """What a user may not expect of settings that go together, one line each."""
    long = config.long_context
    if not long.infctx:
        return []
    if (config.data.ctx_len or 0) <= long.chunk_ctx:
        return [f"--infctx: each row is one chunk: --ctx_len {config.data.ctx_len}, --chunk_ctx {long.chunk_ctx}"]
    if long.infctx_grad == "truncated" and "state" in members(config.method.peft):
        return ["--infctx_grad truncated: the initial states learn from each row's first chunk alone, with exact "
                "gradients from whole rows"]
    return []
