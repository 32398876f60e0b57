"""Speed of batched answers by the number of slots, and memory by the number of tokens.

    python benchmarks/generation.py                               6 layers of 256, 4,096 ids, fp32, on a CPU
    python benchmarks/generation.py --model base.pth --device cuda --precision bf16 --json generation.json
    python benchmarks/generation.py --lengths 16 1024             memory of answers of these lengths, not speed

``tokens/s`` are those drawn, prompts and drawing included: three answers for each slot to prompts of --prompt tokens,
half to one and a half times as long as --tokens, so that slots are given to new prompts one by one. Sizes take turns,
the fastest of --rounds counts, in seconds of the wall clock. ``gain`` is against one slot; ``one by one`` is a loop
over single texts, without slots. ``state`` is what the slots remember. ``peak`` is the most that all tensors took at
once beside the weights: on a CPU every tensor that PyTorch makes and lets go is counted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from measuring import fastest, machine, peak_bytes, print_table, write_json

from rwkvpeft.checkpoints.load import build_model, fill_model, load_model, operator_of
from rwkvpeft.cli.guard import guarded
from rwkvpeft.data.tokenizer import load_tokenizer
from rwkvpeft.generation.batched import Request, decode
from rwkvpeft.generation.generate import TextGenerator
from rwkvpeft.generation.prompt_states import read_prompts
from rwkvpeft.generation.sampling import Sampler, SamplingConfig
from rwkvpeft.generation.tuned import PRECISIONS
from rwkvpeft.memory.dry_run import Tally
from rwkvpeft.models.backbone import Rwkv
from rwkvpeft.models.shape import new_shape
from rwkvpeft.registry import BACKENDS, MODELS, find

SAMPLING = SamplingConfig(temperature=1.0, top_p=0.9, seed=0)
_SHARPER = 8


def open_model(options: argparse.Namespace) -> Rwkv:
    if options.model:
        return load_model(options.model, device=options.device, dtype=PRECISIONS[options.precision], op=options.op)
    torch.manual_seed(0)
    shape = new_shape(options.version, n_layer=options.n_layer, n_embd=options.n_embd, vocab_size=options.vocab_size)
    model = build_model(shape, find(BACKENDS[operator_of(shape)], options.op, flag="--op").run)
    weights = find(MODELS, options.version, flag="--version").initial_weights(shape)
    fill_model(model, weights, device=options.device, dtype=PRECISIONS[options.precision], source="random weights")
    with torch.no_grad():
        # a trained model is as sure of what follows: few tokens are likely
        model.head.weight.mul_(_SHARPER)
    return model.eval()


def requests(model: Rwkv, count: int, tokens: int) -> Iterator[Request]:
    generator = torch.Generator().manual_seed(0)
    for seed in range(count):
        prompt = torch.randint(1, model.shape.vocab_size, (tokens,), generator=generator)
        yield Request(prompt.tolist(), seed)


def length(number: int, tokens: int) -> int:
    """Tokens of an answer: half to one and a half times as many, evenly spread."""
    return max(1, tokens // 2 + 7919 * number % (tokens + 1))


def answer(model: Rwkv, options: argparse.Namespace, slots: int) -> None:
    """Answer three prompts for each slot."""

    def ends(number: int) -> Callable[[int], bool]:
        left = iter(range(length(number, options.tokens) - 1, -1, -1))
        return lambda token: next(left) == 0

    asked = requests(model, 3 * slots, options.prompt)
    for _ in decode(model, asked, SAMPLING, max_tokens=2 * options.tokens, batch_size=slots, end_token=None, stop=ends):
        pass


def drawn(options: argparse.Namespace, slots: int) -> int:
    """Tokens that ``answer`` draws."""
    return sum(length(number, options.tokens) for number in range(3 * slots))


def one_by_one(model: Rwkv, options: argparse.Namespace) -> None:
    """The same three answers as with one slot, each a text of its own."""
    generator = TextGenerator(model, load_tokenizer("bytes"))
    for number, request in enumerate(requests(model, 3, options.prompt)):
        sampler = Sampler(SAMPLING)
        logits, state = generator.read(request.tokens)
        for _ in range(length(number, options.tokens) - 1):
            logits, state = generator.read([sampler.draw(logits)], state)
        sampler.draw(logits)


def state_bytes(model: Rwkv) -> int:
    state = read_prompts(model, [[1]], tokens_at_once=1).state
    return sum(tensor.nbytes for block in state.blocks for tensor in block if tensor is not None)


def speed(model: Rwkv, options: argparse.Namespace) -> list[dict[str, Any]]:
    runs: dict[str, Callable[[], object]] = {"one by one": partial(one_by_one, model, options)}
    for slots in options.batch:
        runs[str(slots)] = partial(answer, model, options, slots)
    seconds = fastest(runs, options.device, options.rounds)
    sizes = {name: int(name) if name.isdigit() else 1 for name in runs}
    rates = {name: drawn(options, slots) / seconds[name] for name, slots in sizes.items()}
    first, each = rates[str(options.batch[0])], state_bytes(model) / 1e6
    return [{"slots": name, "tokens/s": rates[name], "gain": rates[name] / first, "state, MB": each * slots}
            for name, slots in sizes.items()]


def memory(model: Rwkv, options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for slots in options.batch:
        row: dict[str, Any] = {"slots": slots, "state, MB": state_bytes(model) * slots / 1e6}
        for tokens in options.lengths:
            row[f"peak of {tokens}, MB"] = peak(model, options, slots, tokens) / 1e6
        rows.append(row)
    return rows


def peak(model: Rwkv, options: argparse.Namespace, slots: int, tokens: int) -> int:
    def run() -> None:
        asked = requests(model, slots, options.prompt)
        for _ in decode(model, asked, SAMPLING, max_tokens=tokens, batch_size=slots, end_token=None):
            pass

    counted = peak_bytes(run, options.device)
    if counted is not None:
        return counted
    with Tally([*model.parameters(), *model.buffers()]) as tally:
        run()
    return max(moment.bytes for moment in tally.worst.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], help="slots")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer (%(default)s)")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt (%(default)s)")
    parser.add_argument("--lengths", type=int, nargs="+", help="measure the memory of answers of so many tokens")
    parser.add_argument("--model", help="a .pth file, instead of random weights")
    parser.add_argument("--version", default="x070", help="of random weights (%(default)s)")
    parser.add_argument("--n_layer", type=int, default=6, help="(%(default)s)")
    parser.add_argument("--n_embd", type=int, default=256, help="(%(default)s)")
    parser.add_argument("--vocab_size", type=int, default=4096, help="(%(default)s)")
    parser.add_argument("--precision", default="fp32", choices=PRECISIONS, help="(%(default)s)")
    parser.add_argument("--op", default="torch", help="backend (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (%(default)s)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--json", default="", help="write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = open_model(options)
    rows = memory(model, options) if options.lengths else speed(model, options)
    print_table(rows)
    write_json(options.json, {"machine": machine(options.device), "rows": rows})


if __name__ == "__main__":
    sys.exit(guarded(main))
