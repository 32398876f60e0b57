"""``python -m rwkvpeft.generate --batch``: a file of questions answered, or made into pairs of preferences."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rwkvpeft.cli.answer_progress import AnswerProgress
from rwkvpeft.cli.out_of_memory import is_out_of_memory
from rwkvpeft.errors import UserError

if TYPE_CHECKING:
    from rwkvpeft.cli.answer_rows import AnswerRows, PairRows
    from rwkvpeft.data.questions import Question
    from rwkvpeft.generation.answer_file import AnswerFile
    from rwkvpeft.generation.batched import Answer, Request
    from rwkvpeft.generation.sampling import SamplingConfig
    from rwkvpeft.generation.stopping import StopTexts
    from rwkvpeft.generation.tuned import TunedModel

_BATCH_SIZE = 32
_ANSWER_KEY = "answer"


def add_batch_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that ``generate_batch`` reads."""
    group = parser.add_argument_group("batch", "many prompts at once; can be stopped and started again")
    group.add_argument("--batch", metavar="FILE", help="answer the questions of a .jsonl (prompt, messages, ...), .csv "
                       "or .parquet file, or the lines of any other")
    group.add_argument("--output", metavar="FILE", help="the answers, a .jsonl file; an unfinished one is gone on with")
    group.add_argument("--n", type=int, metavar="N", help="answers to each question (default: 1)")
    group.add_argument("--batch_size", type=int, metavar="N", help="answers written side by side; memory grows with it "
                       f"alone (default: {_BATCH_SIZE})")
    group.add_argument("--answer_key", metavar="NAME", help=f"field of the answer (default: {_ANSWER_KEY})")
    group.add_argument("--rejected", action="store_true", help="make pairs of preferences: each record has a prompt "
                       "and its chosen answer, the model's own is the rejected one; --output may be a .csv file too")


def check_batch_flags(flags: argparse.Namespace) -> None:
    """Fill in what was not given. Raises: UserError for flags that do not go together."""
    names = ("output", "n", "batch_size", "answer_key")
    given = [f"--{name}" for name in names if getattr(flags, name) is not None]
    given += ["--rejected"] if flags.rejected else []
    if flags.batch is None:
        if given:
            raise UserError("these flags have no effect without --batch", found=given, fix="leave them out")
        return
    if flags.output is None:
        raise UserError("--batch needs --output", expected="a .jsonl file for the answers", fix="--output out.jsonl")
    kinds = (".jsonl", ".csv") if flags.rejected else (".jsonl",)
    if Path(flags.output).suffix.lower() not in kinds:
        also = "" if flags.rejected else "; .csv goes with --rejected"
        raise UserError(f"--output must be a {' or '.join(kinds)} file", found=f"{flags.output}{also}")
    if flags.rejected and flags.answer_key is not None:
        raise UserError('--answer_key does not go with --rejected, which writes "rejected"', fix="leave it out")
    for name in ("n", "batch_size"):
        if getattr(flags, name) is not None and getattr(flags, name) < 1:
            raise UserError(f"--{name} is out of range", found=getattr(flags, name), expected="1 or more")
    if (flags.n or 1) > 1 and (flags.temperature == 0 or flags.top_k == 1):
        raise UserError("--n asks for answers that differ, and the likeliest tokens are always the same",
                        found=f"--n {flags.n}, --temperature {flags.temperature}, --top_k {flags.top_k}",
                        fix="--temperature 1")
    flags.n = 1 if flags.n is None else flags.n
    flags.batch_size = _BATCH_SIZE if flags.batch_size is None else flags.batch_size
    flags.answer_key = flags.answer_key or _ANSWER_KEY


def generate_batch(flags: argparse.Namespace, sampling: SamplingConfig) -> int:
    """Answer the questions of a file. Raises: UserError for a mistake in the file or the flags."""
    from rwkvpeft.cli.answer_rows import AnswerRows, PairRows
    from rwkvpeft.cli.tuned_model import load_from_flags
    from rwkvpeft.generation.answer_file import AnswerFile

    is_csv = Path(flags.output).suffix.lower() == ".csv"
    if Path(flags.output).resolve() == Path(flags.batch).resolve():
        raise UserError("--output would be written over the questions", found=flags.output, fix="another --output")
    rows = PairRows(is_csv) if flags.rejected else AnswerRows(flags.answer_key, flags.n)
    questions = _questions(flags.batch, rows)
    settings = _settings(flags, sampling, questions)
    answers = AnswerFile(flags.output, settings, rows.columns)
    total = len(questions) * flags.n
    if answers.next_number == total:
        print(f"{flags.output} is complete: {total:,} answers", file=sys.stderr)
        return 0
    if answers.next_number:
        print(f"{flags.output} has {answers.next_number:,} of {total:,} answers, going on behind them", file=sys.stderr)
    if flags.rejected and (flags.adapter or flags.state):
        print("the rejected answers will be those of the tuned model; without --adapter and --state they are the "
              "base's own", file=sys.stderr)
    job = _Job(flags, sampling, settings["seed"], questions, load_from_flags(flags))
    progress = AnswerProgress(total, answers.next_number)
    with answers, progress:
        try:
            job.run(answers, rows, progress)
        except KeyboardInterrupt:
            print(f"\n{answers.next_number:,} of {total:,} answers are in {flags.output}; the same command goes on "
                  "behind them", file=sys.stderr)
            raise
        except (RuntimeError, MemoryError) as reason:
            if not is_out_of_memory(reason):
                raise
            raise UserError("there is not enough memory for so many answers at once",
                            found=f"--batch_size {flags.batch_size}", fix="half of it: answers do not depend on it, "
                            "and those that are written stay") from reason
    print(_summary(flags, answers, job, rows, progress), file=sys.stderr)
    return 0


class _Job:
    """Answers what is still open, and writes the answers in the order of the questions."""

    def __init__(
        self, flags: argparse.Namespace, sampling: SamplingConfig, seed: int, questions: Sequence[Question],
        tuned: TunedModel,
    ) -> None:
        from rwkvpeft.generation.generate import TextGenerator

        self.cut = 0
        self._flags, self._sampling, self._seed = flags, sampling, seed
        self._questions = questions
        self._generator = TextGenerator(tuned.model, tuned.tokenizer)
        self._prompts = [self._encode(question) for question in questions]
        self._stops = _stops(tuned, flags.stop)

    def run(self, answers: AnswerFile, rows: AnswerRows | PairRows, progress: AnswerProgress) -> None:
        """Write a row for every answer that has none."""
        from rwkvpeft.generation.batched import decode

        first = answers.next_number
        found = decode(
            self._generator.model, self._requests(first), self._sampling, max_tokens=self._flags.max_tokens,
            batch_size=self._flags.batch_size, end_token=self._generator.end_token, report=progress.show,
            stop=lambda number: self._stops[self._question(first + number).layout](number),
        )
        for number, answer in _in_order(found):
            row = self._row(first + number, answer, rows)
            if row is None:
                answers.skip()
            else:
                answers.write(row)

    def _row(self, number: int, answer: Answer, rows: AnswerRows | PairRows) -> dict[str, Any] | None:
        from rwkvpeft.cli.answer_rows import Said

        question = self._question(number)
        self.cut += not answer.ended
        text = self._stops[question.layout].text(answer.tokens)
        # what separates a turn's text from its header and from the next turn is none of it
        text = text if question.layout == "text" else text.strip()
        said = Said(text, self._seed + number, answer.ended, len(answer.tokens), number % self._flags.n)
        return rows.row(question.record.value, said)

    def _question(self, number: int) -> Question:
        return self._questions[number // self._flags.n]

    def _requests(self, first: int) -> Iterator[Request]:
        from rwkvpeft.generation.batched import Request

        for number in range(first, len(self._questions) * self._flags.n):
            yield Request(self._prompts[number // self._flags.n], self._seed + number)

    def _encode(self, question: Question) -> array[int]:
        from rwkvpeft.data.pair_source import record_error

        try:
            return array("i", self._generator.encode(question.text))
        except UserError as reason:
            raise record_error(self._flags.batch, question.record, reason) from reason


def _questions(path: str, rows: AnswerRows | PairRows) -> list[Question]:
    from rwkvpeft.data.layouts import RecordError
    from rwkvpeft.data.pair_source import record_error
    from rwkvpeft.data.questions import read_questions

    questions = []
    for question in read_questions(path):
        try:
            rows.check(question.record.value)
        except RecordError as reason:
            raise record_error(path, question.record, reason) from reason
        questions.append(question)
    return questions


def _stops(tuned: TunedModel, texts: Sequence[str]) -> dict[str, StopTexts]:
    """What ends the answers in each layout: the next turn, and what the user says."""
    from rwkvpeft.data.template import INSTRUCTION, SEPARATOR
    from rwkvpeft.generation.chat import STOP
    from rwkvpeft.generation.stopping import StopTexts

    turns = {"chat": STOP, "instruction": (f"{SEPARATOR}{INSTRUCTION}:",), "text": ()}
    return {layout: StopTexts(tuned.tokenizer, [*next_turn, *texts]) for layout, next_turn in turns.items()}


def _settings(
    flags: argparse.Namespace, sampling: SamplingConfig, questions: Sequence[Question]
) -> dict[str, Any]:
    """All that the rows depend on. A seed nobody asked for is that of the rows that are there, or a new one."""
    from rwkvpeft.generation.answer_file import stored_settings
    from rwkvpeft.generation.sampling import new_seed

    digest = hashlib.blake2b(digest_size=16)
    for question in questions:
        digest.update(json.dumps([question.text, question.record.value], default=str).encode())
    own = {"batch": f"{Path(flags.batch).name}, {digest.hexdigest()}", "model": _file_name(flags.model),
           "adapter": _file_name(flags.adapter or flags.state)}
    names = ("tokenizer", "head_size_divisor", "max_tokens", "stop", "n", "answer_key", "rejected")
    settings = {**own, **{name: getattr(flags, name) for name in names}, **asdict(sampling)}
    if sampling.seed < 0:
        stored = stored_settings(flags.output).get("seed")
        settings["seed"] = stored if type(stored) is int else new_seed()
    return settings


def _file_name(path: str | None) -> str | None:
    """The name of a file or folder and what tells it from others of that name; what is not there is told later."""
    from rwkvpeft.cli.tuned_model import content_fingerprint

    if path is None or not Path(path).exists():
        return path
    return f"{Path(path).name}, {content_fingerprint(path)}"


def _in_order(found: Iterator[tuple[int, Answer]]) -> Iterator[tuple[int, Answer]]:
    """The answers by number; those that are ready too early wait."""
    ready: dict[int, Answer] = {}
    expected = 0
    for number, answer in found:
        ready[number] = answer
        while expected in ready:
            yield expected, ready.pop(expected)
            expected += 1


def _summary(
    flags: argparse.Namespace, answers: AnswerFile, job: _Job, rows: AnswerRows | PairRows, progress: AnswerProgress
) -> str:
    from rwkvpeft.cli.answer_rows import PairRows

    parts = [f"{flags.output}: {answers.next_number:,} answers", f"{progress.tokens_per_second:,.0f} tokens/s"]
    if job.cut:
        parts.append(f"{job.cut:,} cut at --max_tokens {flags.max_tokens}")
    if isinstance(rows, PairRows):
        parts += [f"{count:,} left out, {why}" for count, why in (
            (rows.same, "the answer is the chosen one"), (rows.empty, "the answer is empty")) if count]
    return "; ".join(parts)
