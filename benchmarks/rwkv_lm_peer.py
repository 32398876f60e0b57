"""RWKV-LM's own trainer on a CPU: its model, initial weights, data order, groups and schedule, from a checkout of it.

Nothing of it is here. Its code is imported where it lies; its CUDA programs are replaced by plain PyTorch: the
recurrences token by token, and for what v7 fuses the formulas it stands for. Its Lightning loop is for an old release,
so the few lines around its callback, loss and optimizer are ours: backward, clip, step. DeepSpeed's FusedAdam is
PyTorch's Adam, or AdamW with weight decay, which compute the same.

Run as a program by ``against_rwkv_lm.py``, with the settings as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FOLDERS = {"x052": "RWKV-v5", "x060": "RWKV-v5", "x070": "RWKV-v7/train_temp"}


def train(settings: dict[str, Any]) -> list[float]:
    """Draw initial weights, save them as ``init``, train for ``steps`` and return each step's loss."""
    torch.set_num_threads(settings["threads"])
    if settings["precision"] == "fp64":
        torch.set_default_dtype(torch.float64)
    args = _arguments(settings)
    upstream, data, trainer = _import(Path(settings["checkout"]) / FOLDERS[args.my_testing], args)
    torch.manual_seed(settings["seed"])
    model = upstream.RWKV(args)
    weights = model.generate_init_weight()
    torch.save(weights, settings["init"])
    model.load_state_dict(weights)
    running = SimpleNamespace(
        global_step=0, is_global_zero=False, strategy=SimpleNamespace(), optimizers=[], current_epoch=0
    )
    # the property of Lightning asks for a Trainer of its own
    model._trainer = running
    optimizer = model.configure_optimizers()
    running.optimizers = [optimizer]
    callback, losses = trainer.train_callback(args), []
    for step in range(settings["steps"]):
        running.global_step = step
        rows = [data[step * args.micro_bsz + row] for row in range(args.micro_bsz)]
        batch = tuple(torch.stack(column) for column in zip(*rows, strict=True))
        callback.on_train_batch_start(running, model, batch, step)
        loss = model.training_step(batch, step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        optimizer.step()
        losses.append(loss.item())
        print(f"RWKV-LM step {step + 1}: {loss.item():.4f}", file=sys.stderr, flush=True)
    return losses


def _arguments(settings: dict[str, Any]) -> SimpleNamespace:
    """The names its code reads, with its training script's defaults where the comparison says nothing."""
    given = {name: settings[name] for name in (
        "my_testing", "n_layer", "n_embd", "ctx_len", "micro_bsz", "vocab_size", "head_size", "data_file",
        "magic_prime", "my_exit_tokens", "lr_init", "lr_final", "warmup_steps", "weight_decay", "adam_eps", "proj_dir",
    )}
    batches = 40320 // settings["micro_bsz"]
    return SimpleNamespace(
        **given, dim_att=settings["n_embd"], dim_ffn=settings["n_embd"] * 7 // 2 // 32 * 32,
        head_size_a=given["head_size"], head_size_divisor=8, pre_ffn=0, head_qk=0, dropout=0, tiny_att_dim=0,
        tiny_att_layer=-999, my_pos_emb=0, layerwise_lr=1, weight_decay_final=-1, my_qa_mask=0, my_pile_version=1,
        my_pile_stage=3, my_pile_shift=0, my_pile_edecay=0, my_random_steps=0, train_type="", train_stage=3,
        data_type="binidx", betas=(0.9, 0.99), grad_clip=1.0, grad_cp=0, real_bsz=settings["micro_bsz"],
        epoch_steps=batches, epoch_begin=0, epoch_count=settings["magic_prime"] // 40320, accelerator="cpu",
        precision="fp32", strategy="auto", load_model="",
    )


def _import(folder: Path, args: SimpleNamespace) -> tuple[Any, Any, Any]:
    """Its model, its data set ready to be read, and its trainer's callbacks."""
    environment = {
        "RWKV_JIT_ON": "0", "RWKV_MY_TESTING": args.my_testing, "RWKV_KERNEL": "", "RWKV_HEAD_SIZE": args.head_size,
        "RWKV_HEAD_SIZE_A": args.head_size, "RWKV_CTXLEN": args.ctx_len, "RWKV_HEAD_L2WRAP_CE_CHUNK": 0,
        "RWKV_FLOAT_MODE": "fp32", "RWKV_TRAIN_TYPE": "",
    }
    os.environ |= {name: str(value) for name, value in environment.items()}
    sys.path.insert(0, str(folder))
    _without_kernels()
    from src import dataset, model, trainer  # type: ignore[import-not-found]

    _replace_kernels(model, args.head_size)
    data = dataset.MyDataset(args)
    data.global_rank, data.real_epoch, data.world_size = 0, 0, 1
    return model, data, trainer


def _without_kernels() -> None:
    """Let its modules be imported without a compiler: what they build is replaced afterwards."""
    import torch.utils.cpp_extension

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    def as_it_is(function: Any) -> Any:
        return function

    torch.utils.cpp_extension.load = nothing
    torch.library.register_autograd = nothing
    torch.jit.script = as_it_is


def _replace_kernels(model: ModuleType, head_size: int) -> None:
    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, head_size))

    def wkv5(B: int, T: int, C: int, H: int, r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
        return _diagonal(*map(heads, (r, k, v)), torch.exp(-torch.exp(w)), u).flatten(2)

    def wkv6(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
        return _diagonal(*map(heads, (r, k, v)), torch.exp(-torch.exp(heads(w))), u).flatten(2)

    def wkv7(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return _delta(*map(heads, (r, w, k, v, a, b))).flatten(2)

    def six_mixes(x: Tensor, *shares: Tensor) -> tuple[Tensor, ...]:
        towards = _before(x) - x
        return tuple(x + towards * share for share in shares)

    def keys(k: Tensor, k_k: Tensor, a: Tensor, k_a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        removal = F.normalize(heads(k * k_k), dim=-1).flatten(2)
        return k * (1 + (a - 1) * k_a), -removal, removal * a

    def end_of_time_mixing(
        x: Tensor, r: Tensor, k: Tensor, v: Tensor, r_k: Tensor, weight: Tensor, bias: Tensor, g: Tensor
    ) -> Tensor:
        count = x.shape[-1] // head_size
        normed = F.group_norm(x.flatten(0, 1), count, weight, bias, eps=64e-5).view_as(x)
        bonus = (heads(r) * heads(k) * r_k).sum(-1, keepdim=True) * heads(v)
        return (normed + bonus.flatten(2)) * g

    class ChannelMixing:
        @staticmethod
        def apply(x: Tensor, x_k: Tensor, key: Tensor, value: Tensor) -> Tensor:
            mixed = x + (_before(x) - x) * x_k
            return F.relu(mixed @ key.T).square() @ value.T

    replaced = {
        "RUN_CUDA_RWKV5": wkv5,
        "RUN_CUDA_RWKV6": wkv6,
        "RWKV7_CLAMPW_CUDA": wkv7,
        "tmix_mix6_bf16_v5": six_mixes,
        "tmix_a_gate_bf16": lambda a0, a12: torch.sigmoid(a0 + a12),
        "tmix_vres_gate_bf16_v3": lambda v, first, v0, v12: v + (first - v) * torch.sigmoid(v0 + v12),
        "tmix_kk_pre_bf16_v5": keys,
        "tmix_lnx_rkvres_xg_bf16_v1": end_of_time_mixing,
        "_CmixLayerV2Fn": ChannelMixing,
        "l2wrap_cross_entropy": _PenalisedLoss.apply,
    }
    for name, program in replaced.items():
        if hasattr(model, name):
            setattr(model, name, program)
    model.FusedAdam = _adam  # type: ignore[attr-defined]


def _adam(groups: Any, *, adam_w_mode: bool, bias_correction: bool, amsgrad: bool, **settings: Any) -> Any:
    return (torch.optim.AdamW if adam_w_mode else torch.optim.Adam)(groups, **settings)


class _PenalisedLoss(torch.autograd.Function):
    """Cross entropy with L2Wrap, which for v7 is a kernel."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(logits, targets)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, targets = ctx.saved_tensors
        rows = targets.numel()
        slope = torch.softmax(logits, -1)
        slope.scatter_add_(-1, targets.unsqueeze(-1), torch.full_like(targets, -1, dtype=slope.dtype).unsqueeze(-1))
        largest, where = logits.max(-1, keepdim=True)
        slope.scatter_add_(-1, where, 1e-4 * largest)
        return grad * slope / rows, None


def _before(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 1, -1))


def _diagonal(r: Tensor, k: Tensor, v: Tensor, decay: Tensor, u: Tensor) -> Tensor:
    """v5 and v6, one token after the other; state [value, key]; ``decay`` (H, N) or (B, T, H, N)."""
    state, read = v.new_zeros(*v.shape[:1], *v.shape[2:], v.shape[-1]), []
    for t in range(v.shape[1]):
        written = v[:, t].unsqueeze(-1) * k[:, t].unsqueeze(-2)
        read.append(((state + u.unsqueeze(-2) * written) * r[:, t].unsqueeze(-2)).sum(-1))
        kept = decay if decay.dim() == 2 else decay[:, t]
        state = state * kept.unsqueeze(-2) + written
    return torch.stack(read, 1)


def _delta(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """v7, one token after the other; state [value, key]."""
    decay = torch.exp(-torch.exp(-F.softplus(-w) - 0.5))
    state, read = v.new_zeros(*v.shape[:1], *v.shape[2:], v.shape[-1]), []
    for t in range(v.shape[1]):
        removed = (state * a[:, t].unsqueeze(-2)).sum(-1, keepdim=True)
        state = state * decay[:, t].unsqueeze(-2) + removed * b[:, t].unsqueeze(-2)
        state = state + v[:, t].unsqueeze(-1) * k[:, t].unsqueeze(-2)
        read.append((state * r[:, t].unsqueeze(-2)).sum(-1))
    return torch.stack(read, 1)


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    Path(asked["losses"]).write_text(json.dumps(train(asked)), encoding="utf-8")
