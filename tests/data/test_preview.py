import json

import pytest

from rwkvpeft.config.groups import DataConfig
from rwkvpeft.data.dataset import open_dataset
from rwkvpeft.data.preview import preview
from rwkvpeft.data.tokenizer import load_tokenizer


@pytest.fixture
def dataset(tmp_path):
    def opened(*texts, ctx_len=64, **change):
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        config = DataConfig(data_file=str(path), data_type="jsonl", tokenizer="bytes", data_shuffle=0, **change)
        return open_dataset(config, ctx_len=ctx_len, vocab_size=256, seed=1)

    return opened


def test_trained_tokens_stand_between_brackets(dataset):
    shown = preview(dataset("User: a\n\nAssistant: b", loss_mask="qa"), 1, load_tokenizer("bytes"))
    assert "User: a\n\nAssistant:⟦ b<end>⟧" in shown


def test_on_a_terminal_trained_tokens_are_green(dataset):
    shown = preview(dataset("User: a\n\nAssistant: b", loss_mask="qa"), 1, load_tokenizer("bytes"), color=True)
    assert "Assistant:\x1b[32m b<end>\x1b[0m" in shown
    assert "⟦" not in shown


def test_each_sample_has_its_counts_and_the_cut_is_told(dataset):
    shown = preview(dataset("abcdefgh", "xy", ctx_len=4), 2)
    assert "sample 0: document 0, 5 tokens, 4 trained, its end is cut off" in shown
    assert "sample 1: document 1, 3 tokens, 2 trained ---" in shown
    assert "a⟦bcde⟧" in shown


def test_padding_is_not_shown(dataset):
    shown = preview(dataset("xy", "unrelated"), 1)
    assert "x⟦y<end>⟧" in shown
    assert "unrelated" not in shown


def test_the_totals_stand_at_the_end(dataset):
    shown = preview(dataset("abcdefgh", "xy", ctx_len=4), 1)
    assert shown.endswith(dataset("abcdefgh", "xy", ctx_len=4).report().render())


def test_no_more_than_one_pass_is_shown(dataset):
    assert preview(dataset("ab", "cd"), 99).count("--- sample") == 2


def test_windows_are_shown_with_the_end_of_each_document(dataset):
    assert "a⟦b<end>cd<end>⟧" in preview(dataset("ab", "cd", ctx_len=5, dataload="get"), 1)
