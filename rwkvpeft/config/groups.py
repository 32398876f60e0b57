"""The settings every training run has, one frozen dataclass per theme.

Names and meanings are RWKV-PEFT's and RWKV-LM's where those have the flag. None as a default means: chosen from
the checkpoint, the method or the machine, as the help text says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rwkvpeft.config.faults import FaultsConfig
from rwkvpeft.config.flags import flag
from rwkvpeft.config.objective import DistillationConfig, ObjectiveConfig, RewardConfig
from rwkvpeft.registry import ADAPTERS, BACKENDS, FORMATS, OPTIMIZERS, STRATEGIES

_PROGRAMS = ", ".join(dict.fromkeys(name for row in BACKENDS.values() for name in row))


@dataclass(frozen=True)
class ModelConfig:
    """The base model. Everything its file tells is read from the file; a given value is compared with it. Without a
    file a new model of the given sizes is trained from scratch."""

    load_model: str = flag("", help="base checkpoint, a .pth file; 0 or nothing: train from scratch", metavar="FILE")
    my_testing: str | None = flag(None, help="model version; read from the file", choices=("x052", "x060", "x070"))
    n_layer: int | None = flag(None, help="number of blocks; read from the file")
    n_embd: int | None = flag(None, help="width of the residual stream; read from the file", unit="channels")
    vocab_size: int | None = flag(None, help="number of token ids; read from the file, of a new model from --tokenizer")
    dim_att: int | None = flag(None, help="width of the time mixing; read from the file", unit="channels")
    dim_ffn: int | None = flag(None, help="width of the channel mixing; read from the file", unit="channels")
    head_size_a: int | None = flag(
        None, help="channels per head; read from the file where it tells", alias="head_size", unit="channels"
    )
    head_size_divisor: int = flag(8, help="group norm after the time mixing uses eps = 1e-5 * divisor^2")
    pre_ffn: int | None = flag(
        None,
        help="1: block 0 has a second channel mixing in place of the time mixing; v5 and v6; read from the file",
        choices=("0", "1"),
    )
    head_qk: int | None = flag(
        None, help="width of RWKV-LM's headQK, which lets the head copy earlier tokens; 0: none; read from the file"
    )
    load_partial: int = flag(
        0,
        help="1: grow: put --load_model into a new model of the typed, larger sizes and draw the rest of it",
        choices=("0", "1"),
    )


@dataclass(frozen=True)
class DataConfig:
    """What to train on, and how it becomes rows of tokens."""

    data_file: str = flag(
        "",
        help="training data: PREFIX of PREFIX.bin and PREFIX.idx, a .jsonl file, or what --data_type says; several "
        "with their shares as a.jsonl:3,b.jsonl:1, of which the first says how long a pass is",
        metavar="FILE",
    )
    data_type: str = flag(
        "binidx",
        help="format of the data; a file named .jsonl is jsonl; sft, and what is named .parquet or .csv: rows of a "
        "file, a folder or a dataset of Hugging Face; utf-8, utf-16le: a text, each character a token; numpy, uint16: "
        "tokens; dummy: sums, without a file",
        choices=("binidx", "jsonl", "sft", "utf-8", "utf-16le", "numpy", "uint16", "dummy"),
    )
    ctx_len: int | None = flag(None, help="tokens per row; by method: state 512, otherwise 1024", unit="tokens")
    dataload: str = flag(
        "pad",
        help="by --data_type: get for a text and tokens, otherwise pad. pad: one document a row; only: one document, "
        "unpadded (micro_bsz 1); get: windows of the whole stream; pack: several documents a row, none of which sees "
        "another",
        choices=("pad", "only", "get", "pack"),
    )
    loss_mask: str = flag(
        "none",
        help="what is trained: none and pad: all but padding; qa: assistant turns; last: the last of them; se: between "
        "the --mask_id markers",
        choices=("none", "pad", "qa", "last", "se"),
    )
    mask_think: bool = flag(False, help="do not train what stands between <think> and </think>")
    mask_id: dict[str, str] = flag(
        {"mask0": "0", "mask1": "1"}, help="the two marker texts of --loss_mask se", metavar="JSON"
    )
    data_shuffle: int = flag(1, help="1: seeded order without replacement; 0: the file's order", choices=("0", "1"))
    tokenizer: str = flag(
        "world",
        help="world, bytes, utf-16le, or the path of a vocabulary file; of utf-8, utf-16le and dummy vocab.json in "
        "proj_dir or beside the base",
        metavar="NAME|FILE",
    )
    text_key: str = flag("text", help="the jsonl field that holds a whole document", metavar="NAME")
    sft_field: list[str] = flag(
        [],
        help="with --data_type sft: the columns of prompt and answer, or that of the text; none: found as in jsonl",
        metavar="NAME",
    )
    sft_split: str = flag(
        "train", help="with --data_type sft: the split of the dataset, or rows of it as train[:1000]", metavar="NAME"
    )
    my_sample_len: int = flag(
        0, help="with --data_type uint16: length of the documents; 0: up to each token 0", unit="tokens"
    )
    length_buckets: bool = flag(
        False, help="with --dataload pad: rows of a batch have similar lengths, padded to the longest of them only"
    )
    magic_prime: int = flag(0, help="with --dataload get: RWKV-LM's order of windows; 0: seeded random windows")
    num_workers: int = flag(0, help="processes that prepare batches; 0: the training process itself")
    persistent_workers: bool = flag(False, help="keep data workers alive between mini-epochs")
    prefetch_factor: int | None = flag(None, help="batches each data worker prepares ahead")
    preview: int = flag(0, help="print this many samples with the trained tokens marked, then exit", unit="samples")
    check: bool = flag(False, help="report what the data hold and what is wrong with them, then exit")

    @property
    def rows_vary(self) -> bool:
        """Whether batches may be shorter than ``micro_bsz`` rows of ``ctx_len`` tokens."""
        return self.dataload in ("only", "pack") or self.length_buckets


@dataclass(frozen=True)
class ScheduleConfig:
    """How long to train and how the learning rate moves."""

    epoch_steps: int = flag(1000, help="batches per device in a mini-epoch; 0: one pass over the data", unit="batches")
    epoch_count: int = flag(500, help="mini-epochs to train")
    epoch_begin: int = flag(0, help="number of the first mini-epoch, for file names")
    micro_bsz: int = flag(
        12, help="rows per device and batch; auto:N: N, with --micro_split auto", unit="rows", metavar="N|auto"
    )
    micro_split: str = flag(
        "1",
        help="work through the rows of a batch in so many equal parts, one after another, which takes less memory and "
        "gives the same results, but for what dropout draws; auto: the fewest that are expected to fit",
        metavar="N|auto",
    )
    accumulate_grad_batches: int = flag(1, help="batches per optimizer step", unit="batches")
    lr_init: float | None = flag(
        None, help="learning rate after warm-up; by method: state 1; by objective: preferences 5e-5, grpo 1e-5; "
        "otherwise 6e-4"
    )
    lr_final: float | None = flag(
        None, help="learning rate at the end; by method: state 0.01; by objective: preferences 5e-6, grpo 1e-6; "
        "otherwise 1e-5"
    )
    warmup_steps: int | None = flag(
        None, help="steps of warm-up; by method: state 10, otherwise none (-1)", unit="optimizer steps"
    )
    lr_schedule: str = flag(
        "cos", help="shape of the learning rate", choices=("cos", "cos_decay", "wsd", "exp", "linear")
    )
    my_exit: int = flag(99999999, help="stop after this mini-epoch")
    my_exit_tokens: int = flag(
        0,
        help="end after this many tokens, which the cosine of the learning rate is then counted by, and write "
        "rwkv-final.pth; below 0: the rate is the mean of that cosine and of --lr_schedule; 0: by steps",
        unit="tokens",
    )
    train_stage: int = flag(
        0,
        help="RWKV-LM's stages; 1: write rwkv-init.pth and exit; 2, 3: go on in proj_dir, from its resume point or "
        "else its newest rwkv-N.pth, in mini-epochs of 40320 rows in the order of --magic_prime; 0: not staged",
        choices=("0", "1", "2", "3"),
        alias="my_pile_stage",
    )


@dataclass(frozen=True)
class OptimizerConfig:
    """The step the optimizer takes."""

    optim: str = flag(
        "none",
        help="none, adam, adamw: Adam, decoupled decay when --weight_decay > 0; adam8bit, adamw8bit: 8-bit moments; "
        "paged_ before any of these (paged_adam8bit): moments can leave a full GPU; lion, lion8bit: a tenth of Adam's "
        "rates fits; adafactor: hardly any moments; muon: Muon for matrices, Adam for the rest; schedule_free: AdamW "
        "at a constant rate, weights averaged",
        choices=OPTIMIZERS,
        metavar="NAME",
        alias="optimizer",
    )
    beta1: float = flag(0.9, help="decay of the first moment")
    beta2: float = flag(0.99, help="decay of the second moment")
    adam_eps: float = flag(1e-8, help="added to the root of the second moment")
    weight_decay: float = flag(0.0, help="decoupled weight decay of the large matrices")
    weight_decay_final: float = flag(-1.0, help="weight decay at the end, approached in a straight line; -1: the same")
    layerwise_lr: int = flag(1, help="1: upstream's learning-rate factors per parameter kind", choices=("0", "1"))
    grad_clip: float = flag(1.0, help="largest norm of all gradients together; 0: no clipping")
    logit_penalty: float = flag(1e-4, help="L2Wrap: strength of the pull on each position's largest logit; 0: none")


@dataclass(frozen=True)
class MethodConfig:
    """What is trained, and on top of what."""

    peft: str = flag(
        "none",
        help="none: every weight; "
        + ", ".join(ADAPTERS)
        + "; METHOD+state: METHOD and initial memories; or a method of Hugging Face peft, as adalora",
        metavar="METHOD",
    )
    peft_config: dict[str, Any] = flag(
        {}, help="the method's settings; --peft METHOD --help lists them", metavar="JSON"
    )
    layer_profile: str = flag(
        "",
        help="CSV or YAML file with each layer's method, rank and rates; --peft state adds the states",
        metavar="FILE",
    )
    quant: str = flag(
        "none",
        help="how the large frozen matrices are stored; 4bit: fp4, as upstream",
        choices=("none", *FORMATS),
    )
    quant_double: bool = flag(False, help="store the scales of nf4 and fp4 in 8 bits too")
    quant_head: bool = flag(False, help="quantise the head beside the blocks' matrices")
    adapter: str = flag(
        "", help="start from this adapter file or Hugging Face peft folder instead of new values", metavar="FILE"
    )
    adapter_init: str = flag(
        "", help="PiSSA's start values (init_pissa.pth), for an --adapter file that lacks them", metavar="FILE"
    )
    train_parts: list[str] = flag(
        ["time", "ln"],
        help="base parameters trained beside an adapter",
        metavar="PART",
        choices=("time", "ln", "emb", "head", "none"),
    )
    merge: int = flag(
        0, help="1: write merged models, the adapter beside them; 0: the adapter alone", choices=("0", "1")
    )
    dropout: float = flag(0.0, help="dropout of the embedded tokens and of each block, where RWKV-LM has it")
    label_smoothing: float = flag(0.0, help="share of each target that is spread over the whole vocabulary")
    neftune_alpha: float = flag(
        0.0, help="NEFTune: uniform noise on the embedded tokens, of size alpha / sqrt(tokens * channels); 0: none"
    )


@dataclass(frozen=True)
class RuntimeConfig:
    """The machine and how the work runs on it."""

    accelerator: str = flag("auto", help="where to train", choices=("auto", "gpu", "cpu"))
    devices: int = flag(1, help="devices on each machine; under torchrun, srun or deepspeed as many as it started")
    num_nodes: int = flag(
        1, help="machines that train together; by hand with NODE_RANK, MASTER_ADDR and MASTER_PORT in the environment"
    )
    strategy: str = flag(
        "auto",
        help="how devices share the work; auto: one device alone, several as ddp, each with a whole copy; "
        "deepspeed_stage_1: the optimizer is split, 2: gradients too, 3: weights too; _offload: the optimizer in main "
        "memory; fsdp: everything is split",
        choices=STRATEGIES,
        metavar="NAME",
    )
    ds_bucket_mb: int = flag(
        200, help="DeepSpeed: numbers that travel together, in millions, at most", unit="million numbers"
    )
    ds_config: str = flag("", help="DeepSpeed: a JSON file of further settings, which win over ours", metavar="FILE")
    precision: str | None = flag(
        None,
        help="arithmetic; by machine: bf16 on a GPU that has it, otherwise fp32",
        choices=("fp32", "tf32", "bf16", "fp16", "fp64"),
    )
    grad_cp: str = flag(
        "0",
        help="what of the activations is computed twice to save memory; 0: nothing; selective: all but large products "
        "and the recurrence; 1: whole blocks; auto: the first of these that fits. The results are the same",
        choices=("0", "selective", "1", "auto"),
    )
    op: str = flag(
        "auto",
        help="which program computes the WKV recurrence; auto: the fastest that can, measured on a GPU; any other: "
        f"that or an error ({_PROGRAMS})",
        metavar="NAME",
    )
    fla: bool = flag(False, help="take flash-linear-attention where it can run, otherwise what --op auto takes")
    fused_kernel: bool | None = flag(
        None, help="compute what a block needs beside its products in fused kernels: true: that or an error; false: in "
        "PyTorch; not given: on a GPU where they prove right"
    )
    cuda_graph: bool = flag(
        False,
        help="record a micro-batch as a CUDA graph and replay it for the others, which spares the launching of "
        "kernels, most of a small model's time; wants batches of one shape, one GPU, no dropout, not fp16. Not yet "
        "measured on a GPU, so not the default",
    )
    random_seed: int = flag(-1, help="seed of data order, initial values and dropout; -1: a new one, printed")
    debug: bool = flag(
        False, help="show the traceback of a user error, and why each program for the WKV recurrence is taken or not"
    )


@dataclass(frozen=True)
class OutputConfig:
    """Where results go and how a run is taken up again."""

    proj_dir: str = flag("out", help="folder for checkpoints and logs", metavar="DIR")
    epoch_save: int = flag(
        5, help="write a checkpoint every so many mini-epochs; the last is always written; 0: only that"
    )
    save_steps: int = flag(0, help="also save the resume point every so many optimizer steps; 0: each mini-epoch")
    step_save: int = flag(
        0, help="also write a checkpoint, rwkv-step-N.pth, every so many optimizer steps; 0: never", unit="steps"
    )
    keep: int = flag(0, help="keep only so many of the newest checkpoints; 0: all; rwkv-best.pth always stays")
    save_async: bool = flag(False, help="write checkpoints and resume points while training goes on")
    resume: str = flag("auto", help="auto: go on from proj_dir/resume if it is there; none; or a folder", metavar="DIR")
    wandb: str = flag("", help="project name on Weights & Biases; empty: not used")


@dataclass(frozen=True)
class LongContextConfig:
    """Rows longer than memory: they are worked through in chunks that hand on their state."""

    infctx: bool = flag(False, help="train rows of --ctx_len in chunks of --chunk_ctx; also --train_type infctx")
    chunk_ctx: int = flag(512, help="with --infctx: tokens of a chunk", unit="tokens")
    infctx_grad: str = flag(
        "truncated",
        help="truncated: gradients end at the borders of chunks; exact: those of one long pass, for about a third "
        "more time",
        choices=("truncated", "exact"),
    )
    infctx_offload: bool = flag(False, help="with --infctx_grad exact: keep the states between chunks in main memory")


@dataclass(frozen=True)
class EvaluationConfig:
    """How a run is watched: data it does not train on, and what it would say."""

    val_data_file: str = flag("", help="held-out data, of the kind of --data_file", metavar="FILE")
    val_split: float = flag(
        0.0, help="share of the documents of --data_file, or from 1 on their number, that is held out instead"
    )
    val_steps: int = flag(
        0, help="evaluate every so many optimizer steps, and before the first; 0: each mini-epoch", unit="steps"
    )
    early_stop: int = flag(0, help="end after so many evaluations without a better held-out loss; 0: never")
    general_data_file: str = flag(
        "",
        help="text of another kind, .jsonl, .txt or as --data_type says: an alarm is given when the model forgets it",
        metavar="FILE",
    )
    general_alarm: float = flag(0.05, help="rise of its loss that is an alarm", unit="nats a token")
    sample_prompts: str = flag(
        "", help="file of prompts, one JSON text or object a line, answered at each evaluation", metavar="FILE"
    )
    sample_tokens: int = flag(64, help="length of such an answer at most", unit="tokens")
    log_parts: int = flag(
        0, help="log norms of weights, gradients and steps for each part of the model every so many steps; 0: never",
        unit="steps",
    )
    report: bool = flag(True, help="write report.md with curves, answers and settings at the end of the run")


@dataclass(frozen=True)
class TrainConfig:
    """All of a run, resolved: what ``config.yaml`` holds."""

    model: ModelConfig
    data: DataConfig
    schedule: ScheduleConfig
    optimizer: OptimizerConfig
    method: MethodConfig
    runtime: RuntimeConfig
    output: OutputConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    distillation: DistillationConfig = DistillationConfig()
    rewards: RewardConfig = RewardConfig()
    long_context: LongContextConfig = LongContextConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    faults: FaultsConfig = FaultsConfig()

    @property
    def rows_vary(self) -> bool:
        """Whether batches may be shorter or longer than ``micro_bsz`` rows of ``ctx_len`` tokens."""
        return self.data.rows_vary or self.objective.reads != "tokens"

    @property
    def packs(self) -> bool:
        """Whether several sequences lie in one row of a batch."""
        return self.data.dataload == "pack" or self.objective.reads != "tokens"

    @property
    def tokens_at_once(self) -> int:
        """Tokens of a row whose activations are in memory together: all of them, or those of a chunk."""
        tokens = self.data.ctx_len or 1
        return min(tokens, self.long_context.chunk_ctx) if self.long_context.infctx else tokens
