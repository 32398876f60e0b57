"""Continue a text, talk, or answer a file, with a model that may carry an adapter or a tuned state."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rwkvpeft.cli.generate_batch import add_batch_flags, check_batch_flags, generate_batch
from rwkvpeft.cli.guard import guarded
from rwkvpeft.cli.tuned_model import add_model_flags, load_from_flags
from rwkvpeft.errors import UserError

if TYPE_CHECKING:
    from rwkvpeft.generation.generate import TextGenerator
    from rwkvpeft.generation.sampling import SamplingConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    return guarded(lambda: _run(arguments), debug="--debug" in arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rwkvpeft.generate", description=__doc__, allow_abbrev=False,
        epilog="World models answer to a prompt such as $'User: Why is the sky blue?\\n\\nAssistant:'; "
        "--chat writes that layout itself.",
    )
    add_model_flags(parser)
    text = parser.add_argument_group("text")
    text.add_argument("--prompt", metavar="TEXT", help="text to continue; - reads standard input")
    text.add_argument("--chat", action="store_true", help="a dialogue: /reset forgets it, /quit or Ctrl-D ends it, "
                      "Ctrl-C ends an answer")
    text.add_argument("--max_tokens", type=int, default=256, help="longest continuation (default: %(default)s tokens)")
    text.add_argument("--stop", action="append", default=[], metavar="TEXT",
                      help="end before this text; can be given several times")
    add_batch_flags(parser)
    draw = parser.add_argument_group("sampling")
    draw.add_argument("--temperature", type=float, default=1.0,
                      help="above 1 more varied, 0 always the likeliest token (default: %(default)s)")
    draw.add_argument("--top_p", type=float, default=0.5,
                      help="draw from the likeliest tokens that together have this probability (default: %(default)s)")
    draw.add_argument("--top_k", type=int, default=0,
                      help="draw from at most so many tokens, 0: all (default: %(default)s)")
    draw.add_argument("--presence_penalty", type=float, default=0.0,
                      help="taken from the logit of each token drawn before (default: %(default)s; "
                      "0.4 against repetition)")
    draw.add_argument("--frequency_penalty", type=float, default=0.0,
                      help="taken again for every time it was drawn (default: %(default)s; 0.4 against repetition)")
    draw.add_argument("--penalty_decay", type=float, default=0.996,
                      help="how those counts fade per token (default: %(default)s)")
    draw.add_argument("--seed", type=int, default=-1, help="seed of the draw, -1: a new one (default: %(default)s)")
    return parser


def _run(arguments: list[str]) -> int:
    parser = _parser()
    flags = parser.parse_args(arguments)
    if (flags.prompt is not None) + flags.chat + (flags.batch is not None) != 1:
        raise UserError("one of --prompt, --chat and --batch is needed, and only one",
                        fix='--prompt "Once upon a time"')
    check_batch_flags(flags)
    if flags.max_tokens < 1:
        raise UserError("--max_tokens is out of range", found=flags.max_tokens, expected="1 or more")
    from rwkvpeft.generation.generate import TextGenerator
    from rwkvpeft.generation.sampling import Sampler, SamplingConfig

    sampling = SamplingConfig(
        temperature=flags.temperature, top_p=flags.top_p, top_k=flags.top_k, presence_penalty=flags.presence_penalty,
        frequency_penalty=flags.frequency_penalty, penalty_decay=flags.penalty_decay, seed=flags.seed,
    )
    if flags.batch is not None:
        return generate_batch(flags, sampling)
    tuned = load_from_flags(flags)
    generator = TextGenerator(tuned.model, tuned.tokenizer)
    if flags.chat:
        return _chat(generator, sampling, flags.max_tokens)
    prompt = sys.stdin.read() if flags.prompt == "-" else flags.prompt
    for piece in generator.stream(prompt, Sampler(sampling), max_tokens=flags.max_tokens, stop=flags.stop):
        print(piece, end="", flush=True)
    print()
    return 0


def _chat(generator: TextGenerator, sampling: SamplingConfig, max_tokens: int) -> int:
    from rwkvpeft.generation.chat import Chat

    chat = Chat(generator, sampling, max_tokens=max_tokens)
    print("/reset forgets the dialogue, /quit ends it, Ctrl-C ends an answer", file=sys.stderr)
    while (question := _question()) is not None:
        if question == "/reset":
            chat.reset()
        elif question:
            print("Assistant:", end="", flush=True)
            _show(chat.answer(question))
    return 0


def _question() -> str | None:
    """The next thing the user says; None when the dialogue is over."""
    try:
        text = input("User: ").strip()
    except EOFError:
        print()
        return None
    return None if text == "/quit" else text


def _show(pieces: Iterator[str]) -> None:
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        # what was said so far stays in the dialogue
        pass
    finally:
        close = getattr(pieces, "close", None)
        if close:
            close()
    print("\n")
