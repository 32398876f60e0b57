"""What a group of answers to one prompt costs, with the prompt read once and with the prompt read for each answer.

    python benchmarks/shared_group.py                         v7, groups of 2 to 16 answers, on a CPU
    python benchmarks/shared_group.py --versions x060 --prompt 512 --answer 128 --json group.json

A row is the learning half of one step of --objective grpo with LoRA: log-probabilities of the answers to one prompt,
forward and backward pass. Seconds are those of the processor, the best of --rounds in turns; memory is the peak of all
tensors that the step makes. ``gradients off`` is the relative difference of all gradients as one vector.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measuring import machine, print_table, write_json
from shared_prompt import build, gradients, seconds
from torch import Tensor

from rwkvpeft.cli.guard import guarded
from rwkvpeft.memory.dry_run import Tally
from rwkvpeft.models.backbone import Rwkv
from rwkvpeft.models.recompute import LEVELS
from rwkvpeft.objectives.answers import read_answers
from rwkvpeft.objectives.base import Provided
from rwkvpeft.objectives.label_logprobs import label_logprobs
from rwkvpeft.ops.sequences import Sequences

PROVIDED = Provided(rows="torch")


def once(model: Rwkv, prompt: Tensor, answers: Tensor) -> Tensor:
    """Log-probabilities of ``answers`` (G, T) behind ``prompt`` (S,), which is read once."""
    count, tokens = answers.shape
    inputs = torch.cat([prompt[-1:].expand(count, 1), answers[:, :-1]], 1)
    shared = Sequences([len(prompt) - 1])
    hidden = read_answers(model, prompt[None, :-1], shared, inputs.reshape(1, -1), Sequences([tokens] * count))
    return label_logprobs(model, hidden, answers, torch.ones(answers.shape), PROVIDED).logprobs


def each(model: Rwkv, prompt: Tensor, answers: Tensor) -> Tensor:
    """The same, with the prompt in front of each answer."""
    count, tokens = answers.shape
    whole = torch.cat([prompt.expand(count, -1), answers], 1)
    hidden, _ = model.hidden(whole[:, :-1].reshape(1, -1), sequences=Sequences([whole.shape[1] - 1] * count))
    own = hidden.view(count, -1, hidden.shape[-1])[:, -tokens:]
    return label_logprobs(model, own, answers, torch.ones(answers.shape), PROVIDED).logprobs


def step(model: Rwkv, work: Callable[[], Tensor], worth: Tensor) -> None:
    """Forward and backward pass; ``worth`` is what each token counts."""
    model.zero_grad(set_to_none=True)
    (work() * worth).sum().backward()


def measure(options: argparse.Namespace, version: str, group: int) -> dict[str, Any]:
    """One row of the table."""
    model, _ = build(options, version)
    prompt = torch.randint(1, options.vocab_size, (options.prompt,))
    answers = torch.randint(1, options.vocab_size, (group, options.answer))
    worth = torch.randn(group, 1).expand(-1, options.answer).flatten() / answers.numel()
    ways = {way.__name__: partial(step, model, partial(way, model, prompt, answers), worth) for way in (once, each)}
    grads, bytes_of = {}, {}
    for name, run in ways.items():
        run()
        grads[name] = gradients(model)
        model.zero_grad(set_to_none=True)
        with Tally([*model.parameters(), *model.buffers(), prompt, answers]) as tally:
            run()
        bytes_of[name] = max(moment.bytes for moment in tally.worst.values())
    time_of = seconds(ways, options.rounds)
    return {
        "version": version, "answers": group,
        "tokens": group * (options.prompt + options.answer) / (options.prompt + group * options.answer),
        "once s": time_of["once"], "each s": time_of["each"], "time": time_of["each"] / time_of["once"],
        "once MB": bytes_of["once"] / 1e6, "each MB": bytes_of["each"] / 1e6,
        "memory": bytes_of["each"] / bytes_of["once"],
        "gradients off": float((grads["each"] - grads["once"]).norm() / grads["once"].norm()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", nargs="+", default=["x070"])
    parser.add_argument("--groups", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prompt")
    parser.add_argument("--answer", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--n_layer", type=int, default=4)
    parser.add_argument("--n_embd", type=int, default=128)
    parser.add_argument("--vocab_size", type=int, default=256)
    parser.add_argument("--grad_cp", default="0", choices=LEVELS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", default="", metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [measure(options, version, group) for version in options.versions for group in options.groups]
    print_table(rows)
    write_json(options.json, {"settings": vars(options), "machine": machine(torch.device("cpu")), "rows": rows})


if __name__ == "__main__":
    sys.exit(guarded(main))
