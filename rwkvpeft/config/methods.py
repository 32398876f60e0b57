"""The names ``--peft`` takes, told apart without importing what the methods need."""

from __future__ import annotations

import re
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

from rwkvpeft.config.findings import Findings
from rwkvpeft.registry import ADAPTERS

_PEFT_TYPE = re.compile(r'^ +[A-Z0-9_]+ = "([A-Z0-9_]+)"$', re.MULTILINE)


def members(method: str) -> list[str]:
    """The methods that ``--peft`` names: lora and state of lora+state; nothing for none."""
    return [name for part in method.split("+") if (name := part.strip()) not in ("", "none")]


def check_method(method: str, findings: Findings, *, flag: str = "--peft") -> None:
    """Note a combination that is none, and names neither ours nor in the installed Hugging Face peft.

    Whether a tuner of that package works on RWKV is for ``adapters.huggingface`` to say.
    """
    names = members(method)
    if "+" in method and (len(names) != 2 or names.count("state") != 1):
        findings.add(f"{flag} combines one method with state", found=method, expected="METHOD+state")
        return
    for name in names:
        if name not in ADAPTERS and name not in (theirs := hugging_face_methods()):
            # our names first: many of theirs are a letter away
            near = get_close_matches(name, ADAPTERS, 1, 0.75) or get_close_matches(name, [*ADAPTERS, *theirs], 1)
            fixes = [f"{flag} {near[0]}"] if near else []
            if not theirs:
                fixes.append("pip install 'rwkvpeft[peft]' for Hugging Face's methods")
            findings.add(
                f"{flag} does not know {name!r}",
                found=name,
                expected=["none", *ADAPTERS, "METHOD+state", "a method of Hugging Face peft"],
                fix=", or ".join(fixes) or None,
            )


def hugging_face_methods() -> list[str]:
    """Method names of the installed peft, read from its source: importing it takes seconds. Empty if it is missing."""
    package = find_spec("peft")
    if package is None or not package.submodule_search_locations:
        return []
    source = Path(next(iter(package.submodule_search_locations))) / "utils" / "peft_types.py"
    _, _, types = source.read_text(encoding="utf-8").partition("class PeftType")
    return [name.lower() for name in _PEFT_TYPE.findall(types.partition("\nclass ")[0])]
