"""The examples of docs/preference_data.md come out as the page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rwkvpeft.config.groups import DataConfig
from rwkvpeft.data.pair_files import open_pairs
from rwkvpeft.data.preview import preview
from rwkvpeft.data.prompt_rows import open_prompts

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "preference_data.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```(json|csv)\n(.*?)\n```\n\n```text\n(.*?)\n```$", PAGE, re.DOTALL | re.MULTILINE)


def test_every_example_is_followed_by_what_becomes_of_it() -> None:
    assert len(EXAMPLES) == len(re.findall("^```(json|csv)$", PAGE, re.MULTILINE)) == 12


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_comes_out_as_the_page_says(number: int, tmp_path: Path) -> None:
    kind, record, expected = EXAMPLES[number]
    path = tmp_path / f"example.{'jsonl' if kind == 'json' else kind}"
    path.write_text(record, encoding="utf-8")
    config = DataConfig(data_file=str(path))
    sizes = {"ctx_len": 200, "vocab_size": 65536, "seed": 0}
    if expected.startswith("prompt:"):
        shown = preview(open_pairs(config, **sizes, answers=3 if '"label"' in record else 2), 1)
    else:
        shown = preview(open_prompts(config, **sizes), 1)
    assert shown.partition(" ---\n")[2].startswith(f"{expected}\n\n")
