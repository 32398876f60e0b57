"""--pre_ffn and --head_qk through the command lines."""

from __future__ import annotations

import pytest
import torch

from rwkvpeft.cli.evaluate import main as evaluate
from rwkvpeft.cli.generate import main as generate
from rwkvpeft.cli.plan import main as plan
from rwkvpeft.cli.train import main
from rwkvpeft.models.shape import read_shape

EXTRAS = "--my_testing x060 --n_layer 2 --n_embd 32 --head_size 16 --vocab_size 256 --pre_ffn 1 --head_qk 8"


@pytest.fixture
def scratch(binidx_prefix, tmp_path, capsys):
    """Train a tiny v6 with both from nothing; later words win. Returns code, output, errors."""

    def run(*words):
        common = f"--data_file {binidx_prefix} --proj_dir {tmp_path}/out --accelerator cpu --tokenizer bytes"
        short = "--ctx_len 24 --micro_bsz 2 --epoch_steps 2 --epoch_count 1 --random_seed 1"
        code = main([*common.split(), *EXTRAS.split(), *short.split(), *(str(word) for word in words)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_a_model_with_both_is_trained_from_nothing_evaluated_and_reported(scratch, jsonl_file, tmp_path, capsys):
    code, _, errors = scratch("--val_split", 2)
    assert code == 0, errors
    trained = torch.load(tmp_path / "out" / "rwkv-0.pth", weights_only=True)
    shape = read_shape(trained)
    assert (shape.pre_ffn, shape.head_qk) == (1, 8)
    assert trained["head_q.weight"].any()
    model = str(tmp_path / "out" / "rwkv-0.pth")
    assert evaluate(["--model", model, "--data_file", str(jsonl_file), "--ctx_len", "24", "--device", "cpu"]) == 0
    capsys.readouterr()
    assert generate(["--model", model, "--prompt", "User:", "--device", "cpu"]) == 2
    assert "headQK" in capsys.readouterr().err


def test_an_adapter_is_trained_on_a_model_with_both(scratch, tmp_path):
    assert scratch()[0] == 0
    base = tmp_path / "out" / "rwkv-0.pth"
    again = ("--load_model", base, "--proj_dir", tmp_path / "lora")
    code, _, errors = scratch(*again, "--peft", "lora", "--quant", "int8")
    assert code == 0, errors
    assert "blocks.0.ffnPre.key.lora_A" in torch.load(tmp_path / "lora" / "rwkv-0.pth", weights_only=True)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--infctx", "--chunk_ctx", "8"], "head_qk"),
        (["--my_testing", "x070"], "v7"),
        (["--n_layer", "1"], "second block"),
        (["--head_qk", "-1"], "head_qk"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(scratch, tmp_path, words, complaint):
    code, _, errors = scratch(*words)
    assert code == 2
    assert complaint in errors
    assert not (tmp_path / "out").exists()


def test_answers_do_not_go_on_from_a_state_in_a_model_with_head_qk(scratch, train, tmp_path):
    assert scratch()[0] == 0
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "Two?", "chosen": "Yes.", "rejected": "No."}\n')
    words = ("--load_model", tmp_path / "out" / "rwkv-0.pth", "--proj_dir", tmp_path / "dpo", "--data_file", pairs)
    code, _, errors = train(*words, "--peft", "lora", "--objective", "dpo")
    assert code == 2
    assert "--objective dpo is not possible with headQK" in errors
    assert not (tmp_path / "dpo").exists()


@pytest.mark.parametrize("flag", ["--pre_ffn", "--head_qk"])
def test_what_is_typed_must_be_what_the_file_has(train, flag):
    code, _, errors = train(flag, "1")
    assert code == 2
    assert f"{flag} 1 does not fit" in errors
    assert train(flag, "0")[0] == 0


def test_a_run_with_both_is_planned(capsys):
    assert plan([*EXTRAS.split(), "--ctx_len", "24", "--micro_bsz", "1", "--accelerator", "cpu"]) == 0
    assert "RWKV x060, 2 layers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--dropout", "1"], "--dropout is out of range"),
        (["--label_smoothing", "-0.1"], "--label_smoothing is out of range"),
        (["--neftune_alpha", "-1"], "--neftune_alpha is too small"),
        (["--log_parts", "-1"], "--log_parts is too small"),
        (["--weight_decay_final", "0.1"], "--weight_decay_final has no effect without --weight_decay"),
    ],
)
def test_a_regulariser_out_of_its_range_is_refused(train, words, complaint):
    code, _, errors = train(*words)
    assert code == 2
    assert complaint in errors
