"""Preference pairs whose prompt is read once, beside prompts read with each answer; and what a reference costs.

    python benchmarks/shared_prompt.py                        v7 and v6, prompts of 32 to 1024 tokens, on a CPU
    python benchmarks/shared_prompt.py --prompts 256 --answers 64 --objective simpo --json shared.json
    python benchmarks/shared_prompt.py --reference            a reference by switched-off adapter, and by a second model

Each row is one step of --objective with LoRA on --pairs pairs: log-probabilities of the reference (if there is one),
forward and backward pass. ``once`` lets both answers go on from copies of the prompt's state, as train.py does;
``twice`` reads prompt and answer as one sequence, for each answer, all of them packed without padding. ``tokens`` is
how many times as many tokens the second reads. Seconds are those of the processor, the best of --rounds in turns;
memory is the peak of all tensors that the step makes, counted when they are made and let go. Loss and gradients of
both ways are compared in the same run: ``loss off`` is their relative difference, ``gradients off`` that of all
gradients as one vector.

--reference makes one DPO step in a process of its own for each kind of reference: ``none`` is SimPO's step, ``adapter
off`` what train.py does, ``second model`` holds a frozen copy. Both references must say the same, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from measuring import machine, print_table, write_json
from torch import Tensor

from rwkvpeft.adapters.base import Adapter
from rwkvpeft.adapters.build import build_adapter
from rwkvpeft.checkpoints.load import build_model, fill_model, operator_of
from rwkvpeft.cli.guard import guarded
from rwkvpeft.config.objective import PREFERENCES
from rwkvpeft.data.batches import PreferenceBatch
from rwkvpeft.memory.dry_run import Tally
from rwkvpeft.models.backbone import Rwkv
from rwkvpeft.models.recompute import LEVELS
from rwkvpeft.models.shape import new_shape
from rwkvpeft.objectives.base import Provided
from rwkvpeft.objectives.preference.base import USUAL, Preference
from rwkvpeft.objectives.preference.scores import reference_logprobs, score_answers
from rwkvpeft.ops.sequences import Sequences
from rwkvpeft.registry import BACKENDS, MODELS, OBJECTIVES, find

REFERENCES = ("none", "adapter off", "second model")


def base(options: argparse.Namespace, version: str) -> Rwkv:
    """A random model, the same each time."""
    torch.manual_seed(0)
    shape = new_shape(version, n_layer=options.n_layer, n_embd=options.n_embd, vocab_size=options.vocab_size)
    model = build_model(shape, find(BACKENDS[operator_of(shape)], "torch", flag="").run)
    weights = find(MODELS, version, flag="--versions").initial_weights(shape)
    fill_model(model, weights, device="cpu", dtype=torch.float32, source="random weights")
    return model.eval().requires_grad_(False)


def build(options: argparse.Namespace, version: str) -> tuple[Rwkv, Adapter]:
    """The same model with LoRA that has an effect."""
    model = base(options, version)
    adapter = build_adapter("lora", {"r": 16, "lora_dropout": 0}, ["time", "ln"])
    assert adapter is not None
    adapter.attach(model)
    with torch.no_grad():
        for parameter in trained(model):
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    model.recompute = LEVELS[options.grad_cp]
    return model.train(), adapter


def trained(model: Rwkv) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def read_once(options: argparse.Namespace, prompt: int, answer: int) -> PreferenceBatch:
    """Pairs of random tokens. The last token of a prompt begins each of its answers."""
    pairs = options.pairs
    prompts = torch.randint(1, options.vocab_size, (pairs, prompt))
    answers = torch.randint(1, options.vocab_size, (pairs, 2, answer))
    whole = torch.cat([prompts[:, None, -1:].expand(-1, 2, -1), answers], dim=2)
    return PreferenceBatch(
        shared_ids=prompts[:, :-1].reshape(1, -1),
        shared=Sequences([prompt - 1] * pairs),
        input_ids=whole[:, :, :-1].reshape(1, -1),
        labels=answers.reshape(1, -1),
        weights=torch.ones(1, answers.numel()),
        answers=Sequences([answer] * 2 * pairs),
        step_weight=torch.tensor([pairs, pairs * answer], dtype=torch.float64),
    )


def read_twice(batch: PreferenceBatch) -> PreferenceBatch:
    """The same pairs, with the prompt in front of each answer."""
    pairs = len(batch.shared.lengths)
    prompts = batch.shared_ids.view(pairs, 1, -1).expand(-1, 2, -1)

    def behind(front: Tensor, answers: Tensor) -> Tensor:
        return torch.cat([front, answers.view(pairs, 2, -1)], dim=2).reshape(1, -1)

    unscored = torch.zeros(prompts.shape)
    tokens = batch.shared.lengths[0] + batch.answers.lengths[0]
    return batch._replace(
        shared_ids=batch.shared_ids[:, :0],
        shared=Sequences([0] * pairs),
        input_ids=behind(prompts, batch.input_ids),
        labels=behind(unscored.long(), batch.labels),
        weights=behind(unscored, batch.weights),
        answers=Sequences([tokens] * 2 * pairs),
    )


def objective(name: str, adapter: Adapter | None) -> Preference:
    loss: Preference = find(OBJECTIVES, name, flag="--objective")(
        provided=Provided(rows="torch", adapter=adapter), **USUAL[name]._asdict()
    )
    return loss


def step(model: Rwkv, batch: PreferenceBatch, loss: Preference) -> Tensor:
    """One forward and backward pass; returns the loss."""
    model.zero_grad(set_to_none=True)
    found = loss(model, batch)
    found.total.backward()
    return found.total.detach()


def seconds(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of the processor of each, the best of some rounds in turns."""
    best = dict.fromkeys(runs, math.inf)
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - start)
    return best


def peak(model: Rwkv, batch: PreferenceBatch, loss: Preference) -> int:
    """Most bytes of tensors that a step has at once, beside weights and batch."""
    model.zero_grad(set_to_none=True)
    tensors = [part for part in batch if isinstance(part, Tensor)]
    with Tally([*model.parameters(), *model.buffers(), *tensors]) as tally:
        step(model, batch, loss)
    return max(moment.bytes for moment in tally.worst.values())


def gradients(model: Rwkv) -> Tensor:
    return torch.cat([parameter.grad.double().flatten() for parameter in trained(model) if parameter.grad is not None])


def measure(options: argparse.Namespace, version: str, prompt: int, answer: int) -> dict[str, Any]:
    """One row of the first table."""
    model, adapter = build(options, version)
    once = read_once(options, prompt, answer)
    batches = {"once": once, "twice": read_twice(once)}
    loss = objective(options.objective, adapter)
    losses, grads = {}, {}
    for name, batch in batches.items():
        losses[name], grads[name] = step(model, batch, loss), gradients(model)
    time_of = seconds({name: lambda b=batch: step(model, b, loss) for name, batch in batches.items()},  # type: ignore[misc]
                      options.rounds)
    bytes_of = {name: peak(model, batch, loss) for name, batch in batches.items()}
    return {
        "version": version, "prompt": prompt, "answer": answer,
        "tokens": batches["twice"].positions / once.positions,
        "once s": time_of["once"], "twice s": time_of["twice"], "time": time_of["twice"] / time_of["once"],
        "once MB": bytes_of["once"] / 1e6, "twice MB": bytes_of["twice"] / 1e6,
        "memory": bytes_of["twice"] / bytes_of["once"],
        "loss off": float((losses["twice"] - losses["once"]).abs() / losses["once"].abs()),
        "gradients off": float((grads["twice"] - grads["once"]).norm() / grads["once"].norm()),
    }


def with_second_model(second: Rwkv, batch: PreferenceBatch) -> PreferenceBatch:
    """The batch with what a frozen copy says of it."""
    with torch.no_grad():
        return batch._replace(reference=score_answers(second, batch, Provided(rows="torch")).logprobs)


def reference(options: argparse.Namespace, kind: str) -> dict[str, Any]:
    """One row of the second table."""
    model, adapter = build(options, options.versions[0])
    batch = read_once(options, options.prompts[0], options.answers[0])
    loss = objective("simpo" if kind == "none" else "dpo", adapter)
    models: list[Rwkv] = [model]
    equal = None
    if kind == "second model":
        models.append(base(options, options.versions[0]))
        own = reference_logprobs(model, batch, Provided(rows="torch", adapter=adapter))
        told = with_second_model(models[1], batch).reference
        equal = told is not None and torch.equal(own, told)
    held = [tensor for one in models for tensor in (*one.parameters(), *one.buffers())]

    def run() -> None:
        step(model, with_second_model(models[1], batch) if models[1:] else batch, loss)

    with Tally([*held, *(part for part in batch if isinstance(part, Tensor))]) as tally:
        run()
    alive = max(moment.bytes for moment in tally.worst.values())

    return {
        "reference": kind, "weights held MB": sum(tensor.nbytes for tensor in held) / 1e6, "step peak MB": alive / 1e6,
        "process peak MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
        "s": seconds({"": run}, options.rounds)[""], "says the same": None if equal is None else str(equal),
    }


def alone(kind: str) -> dict[str, Any]:
    """``reference`` in a process of its own."""
    done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--case", kind], capture_output=True, text=True,
                          check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", nargs="+", default=["x070", "x060"], choices=MODELS)
    parser.add_argument("--prompts", nargs="+", type=int, default=[32, 128, 512, 1024], help="tokens of a prompt")
    parser.add_argument("--answers", nargs="+", type=int, default=[32, 128], help="tokens of an answer")
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--objective", default="dpo", choices=PREFERENCES)
    parser.add_argument("--reference", action="store_true", help="compare kinds of references, for the first of all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--n_layer", type=int, default=4)
    parser.add_argument("--n_embd", type=int, default=128)
    parser.add_argument("--vocab_size", type=int, default=256)
    parser.add_argument("--grad_cp", default="0", choices=LEVELS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", default="", metavar="FILE")
    parser.add_argument("--case", choices=REFERENCES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.case:
        print(json.dumps(reference(options, options.case)))
        return
    if options.reference:
        rows = [alone(kind) for kind in REFERENCES]
    else:
        sizes = [(p, a) for p in options.prompts for a in options.answers]
        rows = [measure(options, version, *size) for version in options.versions for size in sizes]
    print_table(rows)
    write_json(options.json, {"settings": vars(options), "machine": machine(torch.device("cpu")), "rows": rows})


if __name__ == "__main__":
    sys.exit(guarded(main))
