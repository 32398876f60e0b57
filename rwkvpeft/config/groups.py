"""The settings every training run has, one frozen dataclass per theme.

Names and meanings are RWKV-PEFT's and RWKV-LM's where those have the flag. None as a default means: chosen from
the checkpoint, the method or the machine, as the help text says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rwkvpeft.config.flags import flag
from rwkvpeft.registry import ADAPTERS, BACKENDS, FORMATS, OPTIMIZERS

_PROGRAMS = ", ".join(dict.fromkeys(name for row in BACKENDS.values() for name in row))


@dataclass(frozen=True)
class ModelConfig:
    """The base model. Everything its file tells is read from the file; a given value is compared with it."""

    load_model: str = flag("", help="base checkpoint, a .pth file", metavar="FILE")
    my_testing: str | None = flag(None, help="model version; read from the file", choices=("x052", "x060", "x070"))
    n_layer: int | None = flag(None, help="number of blocks; read from the file")
    n_embd: int | None = flag(None, help="width of the residual stream; read from the file", unit="channels")
    vocab_size: int | None = flag(None, help="number of token ids; read from the file")
    dim_att: int | None = flag(None, help="width of the time mixing; read from the file", unit="channels")
    dim_ffn: int | None = flag(None, help="width of the channel mixing; read from the file", unit="channels")
    head_size_a: int | None = flag(
        None, help="channels per head; read from the file where it tells", alias="head_size", unit="channels"
    )
    head_size_divisor: int = flag(8, help="group norm after the time mixing uses eps = 1e-5 * divisor^2")


@dataclass(frozen=True)
class DataConfig:
    """What to train on, and how it becomes rows of tokens."""

    data_file: str = flag(
        "", help="training data: PREFIX of PREFIX.bin and PREFIX.idx, or a .jsonl file", metavar="FILE"
    )
    data_type: str = flag(
        "binidx", help="format of the data; a file named .jsonl is jsonl", choices=("binidx", "jsonl")
    )
    ctx_len: int | None = flag(None, help="tokens per row; by method: state 512, otherwise 1024", unit="tokens")
    dataload: str = flag(
        "pad",
        help="pad: one document a row; only: one document, unpadded (micro_bsz 1); get: windows of the whole stream",
        choices=("pad", "only", "get"),
    )
    loss_mask: str = flag(
        "none",
        help="what is trained: none and pad: all but padding; qa: assistant turns; se: between the --mask_id markers",
        choices=("none", "pad", "qa", "se"),
    )
    mask_id: dict[str, str] = flag(
        {"mask0": "0", "mask1": "1"}, help="the two marker texts of --loss_mask se", metavar="JSON"
    )
    data_shuffle: int = flag(1, help="1: seeded order without replacement; 0: the file's order", choices=("0", "1"))
    tokenizer: str = flag("world", help="world, bytes, utf-16le, or the path of a vocabulary file", metavar="NAME|FILE")
    text_key: str = flag("text", help="the jsonl field that holds a whole document", metavar="NAME")
    magic_prime: int = flag(0, help="with --dataload get: RWKV-LM's order of windows; 0: seeded random windows")
    num_workers: int = flag(0, help="processes that prepare batches; 0: the training process itself")
    persistent_workers: bool = flag(False, help="keep data workers alive between mini-epochs")
    prefetch_factor: int | None = flag(None, help="batches each data worker prepares ahead")
    preview: int = flag(0, help="print this many samples with the trained tokens marked, then exit", unit="samples")


@dataclass(frozen=True)
class ScheduleConfig:
    """How long to train and how the learning rate moves."""

    epoch_steps: int = flag(1000, help="batches per device in a mini-epoch; 0: one pass over the data", unit="batches")
    epoch_count: int = flag(500, help="mini-epochs to train")
    epoch_begin: int = flag(0, help="number of the first mini-epoch, for file names")
    micro_bsz: int = flag(12, help="rows per device and batch", unit="rows")
    accumulate_grad_batches: int = flag(1, help="batches per optimizer step", unit="batches")
    lr_init: float | None = flag(None, help="learning rate after warm-up; by method: state 1, otherwise 6e-4")
    lr_final: float | None = flag(None, help="learning rate at the end; by method: state 0.01, otherwise 1e-5")
    warmup_steps: int | None = flag(
        None, help="steps of warm-up; by method: state 10, otherwise none (-1)", unit="optimizer steps"
    )
    lr_schedule: str = flag(
        "cos", help="shape of the learning rate", choices=("cos", "cos_decay", "wsd", "exp", "linear")
    )
    my_exit: int = flag(99999999, help="stop after this mini-epoch")


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
    dropout: float = flag(0.0, help="dropout of each block's two updates")


@dataclass(frozen=True)
class RuntimeConfig:
    """The machine and how the work runs on it."""

    accelerator: str = flag("auto", help="where to train", choices=("auto", "gpu", "cpu"))
    devices: int = flag(1, help="devices on this machine")
    num_nodes: int = flag(1, help="machines that train together")
    strategy: str = flag("auto", help="how devices share the work")
    precision: str | None = flag(
        None,
        help="arithmetic; by machine: bf16 on a GPU that has it, otherwise fp32",
        choices=("fp32", "tf32", "bf16", "fp16"),
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
    resume: str = flag("auto", help="auto: go on from proj_dir/resume if it is there; none; or a folder", metavar="DIR")
    wandb: str = flag("", help="project name on Weights & Biases; empty: not used")


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
