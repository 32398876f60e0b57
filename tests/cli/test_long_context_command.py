"""``--infctx`` on the command line: upstream's words for it, what is refused, and several devices."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from rwkvpeft.cli.plan import main as plan

ROOT = Path(__file__).resolve().parents[2]


def test_upstreams_words_for_it_train_in_chunks(train, tmp_path):
    code, output, errors = train("--train_type", "infctx", "--chunk_ctx", 16, "--peft", "lora")
    assert code == 0, errors
    assert "chunks: of 16 tokens, truncated gradients" in output
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["long_context"]["infctx"]


@pytest.mark.parametrize("dataload", ["only", "get"])
def test_exact_gradients_in_chunks_train_as_whole_rows_do(train, tmp_path, dataload):
    words = ("--peft", "lora", "--dataload", dataload, "--micro_bsz", 1, "--peft_config", '{"lora_dropout": 0}')
    found = []
    for name, long in (("whole", ()), ("chunks", ("--infctx", "--infctx_grad", "exact", "--chunk_ctx", 7))):
        code, _, errors = train(*words, *long, "--proj_dir", tmp_path / name)
        assert code == 0, errors
        found.append(torch.load(tmp_path / name / "rwkv-0.pth", weights_only=True))
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--chunk_ctx 64", "--chunk_ctx has no effect without --infctx"),
        ("--infctx_grad exact", "--infctx_grad has no effect without --infctx"),
        ("--infctx --chunk_ctx 0", "--chunk_ctx is too small"),
        ("--infctx --infctx_offload", "no state is kept"),
        ("--infctx --dataload pack", "cannot cut packed rows"),
        ("--infctx --cuda_graph", "cannot be recorded"),
        ("--infctx --head_qk 8 --peft none", "--head_qk"),
        ("--infctx --chunk_ctx 16 --peft state", "--infctx_grad exact"),
    ],
)
def test_what_cannot_be_honoured_is_refused(train, tmp_path, words, told):
    code, _, errors = train("--peft", "lora", *words.split())
    assert code == 2
    assert told in errors
    assert not (tmp_path / "out").exists()


def test_rows_of_one_chunk_are_allowed_and_remarked(train):
    code, output, errors = train("--infctx", "--peft", "state")
    assert code == 0, errors
    assert "each row is one chunk" in output


def test_states_beside_another_method_are_remarked_where_most_of_a_row_does_not_train_them(train):
    words = ("--infctx", "--chunk_ctx", 16, "--peft", "lora+state")
    told = "the initial states learn from each row's first chunk alone"
    assert told in train(*words)[1]
    assert told not in train(*words, "--infctx_grad", "exact", "--resume", "none")[1]


def test_a_plan_tells_of_the_chunks(capsys):
    sizes = "--my_testing x070 --n_layer 2 --n_embd 64 --vocab_size 300 --accelerator cpu --micro_bsz 1 --peft lora"
    assert plan([*sizes.split(), *["--ctx_len", "32", "--infctx", "--chunk_ctx", "16", "--infctx_grad", "exact"]]) == 0
    assert "in chunks of 16 with exact gradients" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_train_as_one(tiny_model, binidx_prefix, tmp_path):
    words = (
        f"--load_model {tiny_model} --data_file {binidx_prefix} --accelerator cpu --peft lora+state --tokenizer bytes "
        "--ctx_len 24 --epoch_steps 4 --epoch_count 1 --accumulate_grad_batches 2 --random_seed 3 --lr_init 1e-3 "
        "--train_type infctx --chunk_ctx 10 --infctx_grad exact"
    )
    found = []
    for devices, rows in ((1, 2), (2, 1)):
        folder = tmp_path / str(devices)
        own = ["--devices", str(devices), "--micro_bsz", str(rows), "--proj_dir", str(folder)]
        command = [sys.executable, str(ROOT / "train.py"), *words.split(), "--peft_config", '{"lora_dropout": 0}', *own]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
        assert done.returncode == 0, done.stderr
        found.append(torch.load(folder / "rwkv-0.pth", weights_only=True))
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-3, atol=1e-5, msg=name)
