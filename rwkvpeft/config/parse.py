"""The command line and ``--config`` files as values by field name, with every mistake of one pass in one message.

Nothing heavy is imported here, so that ``--help`` answers at once. Flags are read in two passes: first the selectors
(``--peft`` and its older spellings), then everything, so that ``--help`` shows the chosen method's settings too.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from rwkvpeft.config import upstream
from rwkvpeft.config.findings import Findings, nearest
from rwkvpeft.config.flags import FlagSpec, specs
from rwkvpeft.config.groups import TrainConfig
from rwkvpeft.config.help import HelpFormatter, help_text, method_lines, upstream_lines
from rwkvpeft.config.methods import check_method, members
from rwkvpeft.config.settings_file import read_flat
from rwkvpeft.config.splitting_batches import spelled_out
from rwkvpeft.config.upstream_methods import chosen_method
from rwkvpeft.config.values import from_words, from_yaml
from rwkvpeft.errors import UserError

_SELECTORS = ("peft", "train_type")


def group_types() -> dict[str, type]:
    """The settings dataclasses of a training run by the name of their group, in the order of ``--help``."""
    hints = get_type_hints(TrainConfig)
    return {item.name: hints[item.name] for item in fields(TrainConfig)}


@cache
def train_specs() -> dict[str, FlagSpec]:
    """Every flag of ours by field name."""
    return {spec.name: spec for group in group_types().values() for spec in specs(group)}


def parse_train(argv: Sequence[str], method_settings: Callable[[str], type | None] | None = None) -> dict[str, Any]:
    """Read a training command line.

    Args:
        argv: the words after the program's name.
        method_settings: gives the settings dataclass of a method, to show it in ``--help``.
    Returns: what was given, by field name, upstream's flags translated; the command line wins over ``--config``.
    Raises: UserError listing every mistake found; SystemExit(0) after ``--help``.
    """
    parser = _build_parser(_settings_to_show(argv, method_settings))
    known, extras = parser.parse_known_args(_bind_numbers(argv))
    given: dict[str, Any] = vars(known)
    config_words = given.pop("config", None)
    findings = Findings()
    typed = {name: _as_words(words) for name, words in spelled_out(given, findings).items()}
    command_line = _convert(typed, from_words, findings)
    from_file: dict[str, Any] = {}
    if config_words:
        path = Path(_as_words(config_words)[0])
        from_file = _convert(spelled_out(read_flat(path, group_types(), _spec_of), findings), from_yaml, findings)
    if not any("valid JSON" in error.what for error in findings.errors):
        _report_extras(extras, findings)
    method = chosen_method(command_line, findings) or chosen_method(from_file, findings)
    merged = {} if method is None else {"peft": method}
    for source in (from_file, command_line):
        merged |= upstream.translate(source, method, findings)
    findings.raise_any()
    return merged


def build_groups(values: Mapping[str, Any]) -> TrainConfig:
    """Put values by field name into their groups; fields without a value keep their default."""
    built = {
        name: group(**{spec.name: values[spec.name] for spec in specs(group) if spec.name in values})
        for name, group in group_types().items()
    }
    return TrainConfig(**built)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        name, _, complaint = message.removeprefix("argument ").partition(": ")
        if complaint.startswith("expected"):
            option = name.split("/")[0]
            raise UserError(f"{option} needs a value", fix=f"{option} VALUE")
        raise UserError(message)


def _build_parser(shown_settings: Mapping[str, type]) -> _Parser:
    parser = _Parser(
        prog="train.py",
        description="Fine-tune an RWKV v5.2, v6 or v7 language model.",
        usage="train.py [--load_model FILE] --data_file FILE [--peft METHOD] [--flag VALUE ...]",
        formatter_class=HelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        epilog=upstream_lines(),
    )
    parser.add_argument("--config", nargs=1, metavar="FILE", help="YAML file of these settings; the command line wins")
    for title, group in group_types().items():
        section = parser.add_argument_group(title, (group.__doc__ or "").split("\n")[0])
        for spec in specs(group):
            _add(section, spec, help_text(spec))
        if title == "method":
            for method, settings in shown_settings.items():
                parser.add_argument_group(f"--peft_config of --peft {method}", method_lines(settings))
    hidden = parser.add_argument_group()
    for name in upstream.FLAGS:
        _add(hidden, _upstream_spec(name), argparse.SUPPRESS)
    return parser


def _add(section: Any, spec: FlagSpec, help: str) -> None:
    options = [spec.option, f"--{spec.alias}"] if spec.alias else [spec.option]
    metavar = spec.metavar or ("{" + ",".join(spec.choices) + "}" if spec.choices else _PLACEHOLDERS[spec.kind])
    if spec.kind == "switch":
        section.add_argument(*options, dest=spec.name, nargs="?", const=[], metavar="true|false", help=help)
    else:
        nargs: int | str = "*" if spec.kind == "words" else 1
        section.add_argument(*options, dest=spec.name, nargs=nargs, metavar=metavar, help=help)


_PLACEHOLDERS = {"text": "TEXT", "whole": "N", "number": "X", "json": "JSON", "words": "WORD", "switch": ""}


def _settings_to_show(
    argv: Sequence[str], method_settings: Callable[[str], type | None] | None
) -> dict[str, type]:
    """The settings classes of the methods whose ``--help`` is asked for, by method."""
    if method_settings is None or not {"-h", "--help"} & set(argv):
        return {}
    selectors = _Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for name in _SELECTORS:
        selectors.add_argument(f"--{name}")
    chosen, _ = selectors.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    findings = Findings()
    method = chosen_method(vars(chosen), findings) or "none"
    check_method(method, findings)
    findings.raise_any()
    found = {name: method_settings(name) for name in members(method)}
    return {name: settings for name, settings in found.items() if settings is not None}


def _bind_numbers(argv: Sequence[str]) -> list[str]:
    # argparse takes -1 for a value but -1e-3 for a flag
    words: list[str] = []
    for word in argv:
        if words and re.fullmatch(r"--\w+", words[-1]) and re.fullmatch(r"-[\d.]+[eE][-+]?\d+", word):
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def _as_words(words: list[str] | str) -> list[str]:
    return [words] if isinstance(words, str) else words


def _upstream_spec(name: str) -> FlagSpec:
    flag = upstream.FLAGS[name]
    return FlagSpec(name, flag.kind, flag.default)


def _spec_of(name: str) -> FlagSpec | None:
    ours = train_specs()
    if name in ours:
        return ours[name]
    if name in upstream.FLAGS:
        return _upstream_spec(name)
    return next((spec for spec in ours.values() if spec.alias == name), None)


def _convert(raw: Mapping[str, Any], read: Callable[[FlagSpec, Any], Any], findings: Findings) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, item in raw.items():
        spec = _spec_of(name)
        assert spec is not None
        try:
            _refuse_later(spec, item)
            value = read(spec, item)
        except UserError as error:
            findings.errors.append(error)
            continue
        if name in upstream.FLAGS and not upstream.FLAGS[name].translated:
            upstream.refuse(name, value, findings)
        else:
            values[name] = value
    return values


def _refuse_later(spec: FlagSpec, item: Any) -> None:
    word = item[0] if isinstance(item, list) and len(item) == 1 else item
    reason = upstream.LATER_VALUES.get(spec.name, {}).get(str(word))
    if reason:
        raise UserError(f"{spec.option} {word} is {reason}", expected=list(spec.choices))


def _report_extras(extras: Sequence[str], findings: Findings) -> None:
    options = [
        name for spec in train_specs().values() for name in (spec.option, spec.alias and f"--{spec.alias}") if name
    ]
    options += ["--config", *(f"--{name}" for name in upstream.FLAGS)]
    after_unknown = False
    for word in extras:
        if word.startswith("-") and len(word) > 1 and not word[1].isdigit():
            name = word.partition("=")[0]
            near = nearest(name.replace("-", "_").replace("__", "--", 1), options)
            findings.add(f"unknown flag {name}", fix=near or "python train.py --help")
            after_unknown = "=" not in word
        elif after_unknown:
            after_unknown = False
        else:
            fix = (
                "a backslash must be the last character of its line"
                if word.strip() in ("", "\\")
                else ("put the value in quotes if it holds spaces")
            )
            findings.add("a word on the command line belongs to no flag", found=repr(word), fix=fix)
