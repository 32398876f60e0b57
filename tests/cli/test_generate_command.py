"""python -m rwkvpeft.generate."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
import torch

from rwkvpeft.checkpoints.files import save_tensors
from rwkvpeft.cli import generate
from rwkvpeft.cli.generate import main
from rwkvpeft.models.shape import new_shape
from rwkvpeft.registry import MODELS, find


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(1)
    shape = new_shape("x070", n_layer=1, n_embd=16, vocab_size=256, head_size=8)
    path = tmp_path_factory.mktemp("model") / "m.pth"
    save_tensors(path, find(MODELS, "x070", flag="").initial_weights(shape))
    return str(path)


def run(model: str, *words: str) -> int:
    return main(["--model", model, "--device", "cpu", "--max_tokens", "12", *words])


def test_a_seed_gives_the_same_text_again(model, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        assert run(model, "--prompt", "Hello", "--seed", seed, "--top_p", "1") == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].strip()


def test_a_dash_reads_the_prompt_from_standard_input(model, capsys, monkeypatch):
    run(model, "--prompt", "Hello", "--temperature", "0")
    expected = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello"))
    assert run(model, "--prompt", "-", "--temperature", "0") == 0
    assert capsys.readouterr().out == expected


def test_a_dialogue_ends_with_quit_or_the_end_of_input(model, capsys, monkeypatch):
    for text in ("hello\n/reset\nagain\n/quit\nnever\n", "hello\nagain"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        assert run(model, "--chat") == 0
        assert capsys.readouterr().out.count("Assistant:") == 2


def test_ctrl_c_ends_the_answer_and_not_the_dialogue(capsys):
    closed = []

    def answer():
        try:
            yield "begun"
            raise KeyboardInterrupt
        finally:
            closed.append(True)

    generate._show(answer())
    assert capsys.readouterr().out == "begun\n\n"
    assert closed == [True]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--prompt"),
        (["--prompt", "x", "--chat"], "--prompt"),
        (["--prompt", "x", "--max_tokens", "0"], "--max_tokens"),
        (["--prompt", "x", "--top_p", "7"], "--top_p"),
        (["--prompt", "x", "--adapter", "nowhere.pth"], "nowhere.pth"),
        (["--prompt", "x", "--tokenizer", "world"], "--tokenizer"),
        (["--prompt", "x", "--op", "warp"], "--op"),
        (["--prompt", "x", "--device", "toaster"], "--device"),
    ],
)
def test_a_mistake_gives_one_message_and_exit_code_2(model, capsys, words, message):
    assert run(model, *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_the_module_runs_and_its_help_does_not_import_torch():
    code = "import sys; from rwkvpeft.cli.generate import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
    done = subprocess.run([sys.executable, "-m", "rwkvpeft.generate"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--model" in done.stderr
