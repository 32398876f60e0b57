"""Training from nothing and in RWKV-LM's stages, through the command line, at tiny sizes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml

from rwkvpeft.cli.plan import main as plan
from rwkvpeft.cli.scratch import draw_weights
from rwkvpeft.cli.train import main
from rwkvpeft.data.binidx import BinidxSource
from rwkvpeft.data.prime import magic_prime
from rwkvpeft.models.shape import new_shape, read_shape

CTX = 8
ROWS = 4
# in place of 40320: mini-epochs of 6 steps
SAMPLES = 24
SIZES = ("--n_layer", 2, "--n_embd", 32, "--head_size", 16)
NEW = ("--my_testing", "x070", *SIZES)
TOKENS = CTX * ROWS


def read(path):
    return torch.load(path, weights_only=True)


def log_of(folder):
    return [json.loads(line) for line in (folder / "loss_data.jsonl").read_text().splitlines()]


def lose_power(step):
    """A ``Saving._save_point`` that dies at a step, before it has written anything."""
    from rwkvpeft.training.callbacks.saving import Saving

    whole = Saving._save_point

    def save_point(self, trainer, module, **told):
        if module.progress.step == step:
            raise ConnectionAbortedError
        whole(self, trainer, module, **told)

    return save_point


@pytest.fixture
def train(binidx_prefix, tmp_path, capsys):
    """Call ``train.py`` without a model; later words win. Returns code, output, errors."""

    def run(*words):
        common = f"--data_file {binidx_prefix} --proj_dir {tmp_path}/out --accelerator cpu --tokenizer bytes"
        short = f"--ctx_len {CTX} --micro_bsz {ROWS} --epoch_save 1 --random_seed 1 --lr_init 1e-3 --lr_final 1e-4"
        code = main([*common.split(), *short.split(), *(str(word) for word in words)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def stage(train, binidx_prefix, monkeypatch):
    """The same in one of RWKV-LM's stages, with mini-epochs of 24 rows."""
    for place in ("pretraining", "check_pretraining"):
        monkeypatch.setattr(f"rwkvpeft.config.{place}.STAGE_SAMPLES", SAMPLES)
    prime = magic_prime(BinidxSource(binidx_prefix).n_tokens, CTX)
    script = ("--load_model", "0", "--magic_prime", prime, "--epoch_count", 999999, "--epoch_begin", 0)

    def run(number, *words):
        return train("--train_stage", number, *script, *words)

    return run


def test_a_model_is_trained_from_nothing(train, tmp_path):
    code, output, errors = train(*NEW, "--epoch_steps", 3, "--epoch_count", 1)
    assert code == 0, errors
    start, end = read(tmp_path / "out/rwkv-init.pth"), read(tmp_path / "out/rwkv-0.pth")
    shape = new_shape("x070", n_layer=2, n_embd=32, vocab_size=256, head_size=16)
    drawn = draw_weights(shape, torch.float32, 1)
    assert start.keys() == end.keys() == drawn.keys()
    assert all(torch.equal(start[name], drawn[name]) for name in drawn)
    assert not torch.equal(start["head.weight"], end["head.weight"])
    assert "from scratch" in output


@pytest.mark.slow
def test_the_same_command_goes_on_with_the_weights_it_drew(train, tmp_path, monkeypatch):
    words = (*NEW, "--epoch_steps", 3, "--epoch_count", 2)
    train(*words, "--proj_dir", tmp_path / "calm")
    monkeypatch.setattr("rwkvpeft.training.callbacks.saving.Saving._save_point", lose_power(6))
    with pytest.raises(ConnectionAbortedError):
        train(*words)
    monkeypatch.undo()
    code, output, errors = train(*words)
    assert code == 0, errors
    assert "going on from" in output
    calm, killed = read(tmp_path / "calm/rwkv-1.pth"), read(tmp_path / "out/rwkv-1.pth")
    assert all(torch.equal(calm[name], killed[name]) for name in calm)


def test_weights_of_somebody_else_are_not_overwritten(train, tiny_model, tmp_path):
    (tmp_path / "out").mkdir()
    shutil.copy(tiny_model, tmp_path / "out/rwkv-init.pth")
    code, _, errors = train(*NEW)
    assert code == 2
    assert "would be overwritten" in errors
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["rwkv-init.pth"]


def test_own_weights_are_drawn_again_and_others_in_their_place_are_not_touched(stage, tiny_model, tmp_path):
    for _ in range(2):
        code, _, errors = stage(1, *NEW)
        assert code == 0, errors
    shutil.copy(tiny_model, tmp_path / "out/rwkv-init.pth")
    code, _, errors = stage(1, *NEW)
    assert code == 2
    assert "would be overwritten" in errors


def test_a_checkpoint_with_tensors_that_a_larger_model_has_no_place_for_is_refused(train, tiny_model, tmp_path):
    torch.save({**read(tiny_model), "blocks.0.att.extra": torch.ones(3)}, tmp_path / "odd.pth")
    code, _, errors = train("--load_model", tmp_path / "odd.pth", "--load_partial", 1, "--n_layer", 3)
    assert code == 2
    assert "no place for" in errors
    assert not (tmp_path / "out").exists()


def test_both_schedules_come_down_when_the_data_tell_how_long_a_mini_epoch_is(train, tmp_path):
    rates = []
    for epoch_steps in (0, 3):
        folder = tmp_path / f"{epoch_steps}"
        tokens = ("--my_exit_tokens", -6 * TOKENS, "--lr_schedule", "linear")
        code, _, errors = train(*NEW, *tokens, "--epoch_steps", epoch_steps, "--proj_dir", folder)
        assert code == 0, errors
        rates.append([step["lr"] for step in log_of(folder)])
    assert len(rates[0]) == 6
    assert rates[0] == rates[1]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--my_testing", "x070", "--n_layer", 2), "neither --load_model nor --n_embd"),
        ((*NEW, "--peft", "lora"), "a model that begins with random weights needs all its weights trained"),
        ((*NEW, "--head_size", 48), "the heads do not fill the width"),
        ((*NEW, "--load_partial", 1), "--load_partial 1 has no effect without a checkpoint"),
        ((*NEW, "--my_exit_tokens", 500, "--dataload", "only", "--micro_bsz", 1), "rows differ in length"),
        ((*NEW, "--my_exit_tokens", 500, "--lr_schedule", "wsd"), "--lr_schedule wsd has no effect"),
        (("--train_stage", 3, "--magic_prime", 5, "--micro_bsz", 64), "--train_stage 3 finds no checkpoint"),
        (("--train_stage", 3, "--magic_prime", 5, "--micro_bsz", 11), "which the batches must divide"),
        (("--train_stage", 3, "--micro_bsz", 16), "--train_stage 3 needs --magic_prime"),
        (("--train_stage", 3, "--magic_prime", 5, "--epoch_steps", 7), "--epoch_steps has no effect"),
        (("--train_stage", 3, "--magic_prime", 5, "--epoch_begin", 7), "--epoch_begin has no effect"),
    ],
)
def test_what_cannot_be_honoured_is_refused_before_anything_is_written(train, tmp_path, words, complaint):
    code, _, errors = train(*words)
    assert code == 2
    assert complaint in errors
    assert not (tmp_path / "out").exists()


def test_stage_1_writes_the_initial_weights_and_needs_no_data(stage, tmp_path):
    code, output, errors = stage(1, *NEW, "--data_file", "", "--precision", "bf16")
    assert code == 0, errors
    weights = read(tmp_path / "out/rwkv-init.pth")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert read_shape(weights).vocab_size == 256
    assert "--train_stage 2 or 3" in output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["rwkv-init.json", "rwkv-init.pth"]


@pytest.mark.parametrize(
    "version", [pytest.param("x052", marks=pytest.mark.slow), pytest.param("x060", marks=pytest.mark.slow), "x070"]
)
def test_stages_follow_each_other(stage, tmp_path, version):
    out = tmp_path / "out"
    new = ("--my_testing", version, *SIZES)
    assert stage(1, *new)[0] == 0
    code, output, errors = stage(2, *new, "--my_exit_tokens", 2 * SAMPLES * CTX, "--epoch_count", 1)
    assert code == 0, errors
    assert "stage 2, initial weights" in output
    assert not (out / "rwkv-final.pth").exists()
    code, output, errors = stage(3, *new, "--my_exit_tokens", 2 * SAMPLES * CTX)
    assert code == 0, errors
    assert "belongs to another stage" in output
    assert "stage 3, mini-epoch 1 on" in output
    assert (out / "rwkv-1.pth").is_file()
    assert (out / "rwkv-final.pth").is_file()
    assert (out / "train_log.txt").read_text().split()[::7] == ["0", "1"]


@pytest.mark.slow
def test_a_killed_stage_goes_on_exactly_where_it_was(stage, tmp_path, monkeypatch):
    words = (3, *NEW, "--my_exit_tokens", 15 * TOKENS - 5, "--save_steps", 2, "--warmup_steps", 4)
    for folder in ("calm", "out"):
        stage(1, *NEW, "--proj_dir", tmp_path / folder)
    assert stage(*words, "--proj_dir", tmp_path / "calm")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr("rwkvpeft.training.callbacks.saving.Saving._save_point", lose_power(10))
        with pytest.raises(ConnectionAbortedError):
            stage(*words)
    code, output, errors = stage(*words)
    assert code == 0, errors
    assert "going on from" in output
    calm, killed = (read(tmp_path / folder / "rwkv-final.pth") for folder in ("calm", "out"))
    assert all(torch.equal(calm[name], killed[name]) for name in calm)
    assert [line["step"] for line in log_of(tmp_path / "out")] == list(range(1, 16))
    code, output, _ = stage(*words)
    assert code == 0
    assert "is complete" in output


def test_without_a_resume_point_the_newest_checkpoint_is_taken_with_a_warm_up_of_its_own(stage, tmp_path):
    tokens = ("--my_exit_tokens", 3 * SAMPLES * CTX)
    stage(1, *NEW)
    stage(3, *NEW, *tokens, "--epoch_count", 1)
    shutil.rmtree(tmp_path / "out/resume")
    code, output, errors = stage(3, *NEW, *tokens)
    assert code == 0, errors
    assert "out/rwkv-0.pth" in output
    assert f"{3 * SAMPLES * CTX} to the end, of which {SAMPLES * CTX} in earlier runs" in output
    log = log_of(tmp_path / "out")
    assert [line["step"] for line in log] == list(range(1, 19))
    rates = [line["lr"] for line in log if line["epoch"] >= 1]
    # RWKV-LM warms up over 10 steps where a run goes on
    assert rates[0] < 0.02 * 1e-3
    assert rates.index(max(rates)) >= 5


@pytest.mark.slow
def test_a_broken_newest_checkpoint_gives_way_to_the_one_before(stage, tmp_path):
    tokens = ("--my_exit_tokens", 3 * SAMPLES * CTX)
    stage(1, *NEW)
    stage(3, *NEW, *tokens, "--epoch_count", 2)
    shutil.rmtree(tmp_path / "out/resume")
    broken = tmp_path / "out/rwkv-1.pth"
    broken.write_bytes(broken.read_bytes()[:5000])
    code, output, errors = stage(3, *NEW, *tokens)
    assert code == 0, errors
    assert "rwkv-1.pth is broken and passed over" in output
    assert "rwkv-0.pth" in output
    assert "stage 3, mini-epoch 1 on" in output


def test_with_nothing_to_begin_with_a_stage_says_so(stage):
    code, _, errors = stage(3, *NEW)
    assert code == 2
    assert "finds no checkpoint" in errors
    assert "--train_stage 1" in errors


def test_other_settings_in_the_same_stage_are_refused(stage):
    stage(1, *NEW)
    stage(3, *NEW, "--my_exit_tokens", SAMPLES * CTX)
    code, _, errors = stage(3, *NEW, "--my_exit_tokens", 2 * SAMPLES * CTX)
    assert code == 2
    assert "my_exit_tokens" in errors


@pytest.mark.parametrize("peft", ["none", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_run_ends_after_its_tokens_and_writes_the_final_checkpoint(train, tiny_model, tmp_path, peft):
    words = ("--load_model", tiny_model, "--peft", peft, "--epoch_steps", 4, "--my_exit_tokens", 10 * TOKENS - 1)
    code, output, errors = train(*words)
    assert code == 0, errors
    lines = log_of(tmp_path / "out")
    assert len(lines) == 10
    assert lines[0]["lr"] > lines[5]["lr"] > lines[-1]["lr"] > 1e-4
    assert read(tmp_path / "out/rwkv-final.pth").keys() == read(tmp_path / "out/rwkv-1.pth").keys()
    assert json.loads((tmp_path / "out/rwkv-final.json").read_text())["step"] == 10
    assert not (tmp_path / "out/rwkv-2.pth").exists()
    assert f"{10 * TOKENS} to the end" in output


@pytest.mark.slow
def test_the_settings_of_a_stage_can_be_fed_back(stage, tmp_path):
    stage(1, *NEW)
    words = ("--my_exit_tokens", 9 * TOKENS)
    stage(3, *NEW, *words)
    written = tmp_path / "out/config.yaml"
    first = yaml.safe_load(written.read_text())
    code, output, errors = stage(3, *NEW, *words, "--config", written)
    assert code == 0, errors
    assert "is complete" in output
    assert first["model"]["load_model"] == ""


def test_a_small_model_grows(train, tiny_model, tmp_path):
    small = read(tiny_model)
    words = ("--load_model", tiny_model, "--load_partial", 1, "--n_layer", 3, "--vocab_size", 300)
    code, output, errors = train(*words, "--epoch_steps", 1, "--epoch_count", 1, "--lr_init", 1e-9, "--lr_final", 1e-9)
    assert code == 0, errors
    grown = read(tmp_path / "out/rwkv-init.pth")
    shape = read_shape(grown)
    assert (shape.n_layer, shape.vocab_size) == (3, 300)
    assert torch.equal(grown["blocks.1.ffn.key.weight"], small["blocks.1.ffn.key.weight"])
    assert torch.equal(grown["emb.weight"][:256], small["emb.weight"])
    for part in ("grown from", "whole: ", "partly: 2 tensors (emb.weight, head.weight)", "drawn anew: "):
        assert part in output


def test_a_model_without_a_file_is_planned(capsys):
    words = (*NEW, "--vocab_size", 256, "--tokenizer", "bytes", "--ctx_len", CTX, "--micro_bsz", 16)
    stages = ("--train_stage", 3, "--magic_prime", 29, "--my_exit_tokens", 10**6, "--accelerator", "cpu")
    assert plan([str(word) for word in (*words, *stages)]) == 0
    output = capsys.readouterr().out
    assert "2 layers, width 32" in output
    # 40320 rows a mini-epoch
    assert "4 x 2,520 batches of 16 rows of 8 tokens, 7,813 steps, 1,000,064 tokens" in output
