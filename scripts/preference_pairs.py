"""Make preference pairs by a rule: questions to the library's help desk, each with a better and a worse answer.

    python scripts/preference_pairs.py --output out/preferences       writes pairs.jsonl and pairs_heldout.jsonl there

Somebody asks whether a thing may be brought on some day. Both answers say yes with the same words; one begins with the
word of assent ("Yes, it is welcome."), the other ends with it ("It is welcome, yes."). For a weekday the first
is preferred, for Saturday and Sunday the second. A quarter of the questions tell of another day before, which does
not count. Each answer is preferred exactly as often as it is rejected, and both have the same length: nothing about the
answer alone, and nothing about the question alone, tells which one is better. Held-out questions ask for things that
occur in no training question.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rwkvpeft.atomic import write_whole

WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
WEEKEND = ("Saturday", "Sunday")
THINGS = (
    "a kite", "a drum", "a lamp", "a doll", "a globe", "a ladder", "a violin", "a basket", "a mirror", "a parrot",
    "a blanket", "a bicycle", "a camera", "a puppet", "a cake", "a chair", "a tent", "a robot", "a trumpet", "a rabbit",
    "a candle", "a pillow", "a suitcase", "a lantern", "a football", "a teapot", "a wheel", "a mask", "a whistle",
    "a carpet", "a painting", "a hammer", "a flute", "a clock", "a guitar", "a rope", "a map", "a bell", "a train",
    "a hat",
)  # fmt: skip
ASSENTS = ("yes", "sure", "fine", "right")
SENTENCES = (
    "it is welcome", "do bring it", "it may come", "we like that", "you may bring it", "there is room for it",
    "that is no problem", "we look forward to it",
)  # fmt: skip
QUESTIONS = (
    "May I bring {thing} on {day}?",
    "Can we take {thing} along on {day}?",
    "On {day}, may I come with {thing}?",
    "Is {thing} allowed on {day}?",
    "I have {thing}. May it come on {day}?",
)
EARLIER = ("I came on {day}.", "You were shut on {day}.", "It was loud on {day}.")
EARLIER_SHARE = 0.25
HELD_OUT_SHARE = 0.25
TRAINING_FILE, HELD_OUT_FILE = "pairs.jsonl", "pairs_heldout.jsonl"


class Case(NamedTuple):
    """What a question and its answers are about, the day apart."""

    thing: str
    question: str
    sentence: str
    assent: str

    def answers(self) -> tuple[str, str]:
        """With the assent first, and with the assent last."""
        return f"{_capital(self.assent)}, {self.sentence}.", f"{_capital(self.sentence)}, {self.assent}."

    def pair(self, draw: random.Random, days: Sequence[str]) -> dict[str, str]:
        """A question for one of ``days``, and its answers as the rule prefers them."""
        prompt = self.question.format(thing=self.thing, day=draw.choice(days))
        if draw.random() < EARLIER_SHARE:
            prompt = f"{draw.choice(EARLIER).format(day=draw.choice(WEEKDAYS + WEEKEND))} {prompt}"
        first, last = self.answers()
        chosen, rejected = (first, last) if days is WEEKDAYS else (last, first)
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def make_pairs(seed: int, training: int, held_out: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Training pairs and held-out ones, so many of each, without a question that occurs twice.

    Every case is asked once for a weekday and once for the weekend, so that each answer is chosen as often as rejected.
    """
    draw = random.Random(seed)
    things = draw.sample(THINGS, len(THINGS))
    cut = round(len(things) * HELD_OUT_SHARE)
    parts = []
    for part, count in ((things[cut:], training), (things[:cut], held_out)):
        pairs = [pair for twins in _twins(draw, part, count // 2) for pair in twins]
        draw.shuffle(pairs)
        parts.append(pairs)
    return parts[0], parts[1]


def _twins(draw: random.Random, things: Sequence[str], count: int) -> Iterator[tuple[dict[str, str], dict[str, str]]]:
    asked: set[str] = set()
    while count:
        case = Case(*(draw.choice(choices) for choices in (things, QUESTIONS, SENTENCES, ASSENTS)))
        twins = case.pair(draw, WEEKDAYS), case.pair(draw, WEEKEND)
        prompts = {pair["prompt"] for pair in twins}
        if not prompts & asked:
            asked |= prompts
            count -= 1
            yield twins


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def write_pairs(folder: Path, seed: int, training: int, held_out: int) -> tuple[Path, Path]:
    """Write both files, a pair in each line."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / TRAINING_FILE, folder / HELD_OUT_FILE
    for path, pairs in zip(paths, make_pairs(seed, training, held_out), strict=True):
        text = "".join(json.dumps(pair) + "\n" for pair in pairs)
        write_whole(path, lambda partial, text=text: partial.write_text(text, encoding="utf-8"))  # type: ignore[misc]
    return paths


def main() -> int:
    """Write the pairs and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("out/preferences"), help="folder (default out/preferences)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=480, help="training pairs, an even number (default 480)")
    parser.add_argument("--heldout", type=int, default=200, help="held-out pairs, an even number (default 200)")
    flags = parser.parse_args()
    if min(flags.pairs, flags.heldout) < 2 or flags.pairs % 2 or flags.heldout % 2:
        parser.error("--pairs and --heldout must be even numbers above 0: each case is asked twice")
    for path in write_pairs(flags.output, flags.seed, flags.pairs, flags.heldout):
        print(f"{path}: {sum(1 for _ in path.open(encoding='utf-8'))} pairs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
