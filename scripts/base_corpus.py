"""The text the shipped base model was trained on: English that every Python installation carries.

Docstrings and comment blocks of the standard library, the help topics of pydoc and the licence file become documents;
first lines of docstrings also become short question/answer documents, so that the base has seen the chat layout. The
result depends on the Python version alone.
"""

from __future__ import annotations

import ast
import re
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__", "lib-dynload"}
QUESTIONS = (
    "What does {name} do?",
    "What is {name}?",
    "Can you tell me what {name} is for?",
    "How does {name} work?",
    "Please explain {name}.",
    "I want to know about {name}.",
)


def documents() -> Iterator[dict]:
    """Yield every document once as a record for ``make_data.py``, in a fixed order.

    A paragraph that occurred before is left out wherever it comes again.
    """
    seen: set[str] = set()
    for text in _texts():
        fresh = [paragraph for paragraph in _paragraphs(text) if paragraph not in seen]
        seen.update(fresh)
        if sum(map(len, fresh)) >= 60:
            yield {"text": "\n\n".join(fresh)}
    asked: set[str] = set()
    for name, answer in _first_lines():
        if answer not in asked:
            asked.add(answer)
            question = QUESTIONS[zlib.crc32(answer.encode()) % len(QUESTIONS)].format(name=name)
            yield {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _texts() -> Iterator[str]:
    from pydoc_data.topics import topics

    for topic in sorted(topics):
        yield topics[topic]
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.txt")):
        if not LEFT_OUT & set(path.relative_to(library).parts):
            yield path.read_text(encoding="utf-8", errors="replace")
    for source, tree in _modules(library):
        yield from (docstring for _, docstring in _docstrings(tree))
        yield from _comment_blocks(source)


def _modules(library: Path) -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(library.rglob("*.py")):
        if LEFT_OUT & set(path.relative_to(library).parts):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            yield source, ast.parse(source)
        except (UnicodeDecodeError, SyntaxError):
            # templates and samples of broken files that tools of the library keep for themselves
            continue


def _docstrings(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield getattr(node, "name", ""), docstring


def _comment_blocks(source: str) -> Iterator[str]:
    for block in re.findall(r"(?:^[ \t]*#.*\n){3,}", source, re.MULTILINE):
        yield re.sub(r"^[ \t]*#+ ?", "", block, flags=re.MULTILINE)


def _paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs of ``text`` that read as English rather than as code or a table, each on one line."""
    for raw in re.split(r"\n[ \t]*\n", text):
        paragraph = re.sub(r"[`*]+|:[a-z]+:(?=`)", "", " ".join(raw.split()))
        if _is_prose(paragraph):
            yield paragraph


def _is_prose(paragraph: str) -> bool:
    if not paragraph.isascii() or len(paragraph) < 40 or ">>>" in paragraph:
        return False
    words = re.findall(r"(?<![\w.])[A-Za-z][a-z]*(?![\w(])", paragraph)
    return sum(map(len, words)) > 0.68 * len(paragraph) and paragraph[-1] in ".:;,!?)\"'"


def _first_lines() -> Iterator[tuple[str, str]]:
    for _, tree in _modules(Path(sysconfig.get_path("stdlib"))):
        for name, docstring in _docstrings(tree):
            words = re.sub(r"(?<=[a-z])(?=[A-Z])|_+", " ", name).strip().lower()
            answer = re.sub(r"[`*]+", "", " ".join(re.split(r"\n[ \t]*\n", docstring)[0].split()))
            if words and 40 <= len(answer) <= 160 and _is_prose(answer):
                yield words, answer
