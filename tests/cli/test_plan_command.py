"""python -m rwkvpeft.plan."""

from __future__ import annotations

import json
import re

import pytest

from rwkvpeft.cli.plan import main

SIZES = ["--my_testing", "x070", "--n_layer", "32", "--n_embd", "2560", "--vocab_size", "65536"]


@pytest.fixture
def plan(capsys, tmp_path):
    """Call the command. Returns code, output, errors."""

    def run(*words):
        code = main([*(str(word) for word in words), "--proj_dir", str(tmp_path)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_a_model_that_is_only_sizes_is_planned_for_a_gpu_that_is_not_here(plan):
    code, out, _ = plan(*SIZES, "--peft", "lora", "--quant", "nf4", "--grad_cp", 1, "--micro_bsz", 1, "--gpu_memory", 6)
    assert code == 0
    assert "2,953.3 M parameters" in out
    assert "base in nf4" in out
    assert "bf16" in out
    assert "it fits" in out
    assert "work: " in out
    assert "speed: unknown, for that device is not here" in out


def test_a_user_may_say_how_fast_a_device_is_that_is_not_here(plan):
    words = [*SIZES, "--micro_bsz", 1, "--epoch_steps", 100, "--epoch_count", 10, "--gpu_memory", 80]
    _, out, _ = plan(*words, "--tflops", 100)
    slow = re.search(r"speed: ([\d.]+) s a step or more, .* at 100 TFLOP/s, as --tflops says", out)
    _, out, _ = plan(*words, "--tflops", 200)
    fast = re.search(r"speed: ([\d.]+) s a step or more", out)
    assert float(slow[1]) == pytest.approx(2 * float(fast[1]), rel=0.1)


def test_the_time_of_a_step_here_is_estimated_from_what_it_computes(plan, tiny_model):
    _, out, _ = plan("--load_model", tiny_model, "--micro_bsz", 2, "--ctx_len", 64, "--accelerator", "cpu")
    assert re.search(r"work: [\d.]+ MFLOP in matrix products and [\d.]+ MB", out)
    assert re.search(r"speed: .* a step or more, .* timed here just now; waiting for data", out)


@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_stage_2", "fsdp"])
def test_many_devices_on_many_machines_are_planned_for_without_any(plan, strategy):
    words = ["--devices", 8, "--num_nodes", 2, "--strategy", strategy, "--micro_bsz", 1, "--gpu_memory", 24]
    code, out, _ = plan(*SIZES, *words, "--grad_cp", 1)
    assert code == 0
    assert f"memory on each of 16 devices, --strategy {strategy}, bf16" in out
    assert ("copies, buckets, gathered" in out) == (strategy != "ddp")


def test_an_offloading_strategy_says_what_each_machine_needs(plan):
    words = ["--devices", 8, "--strategy", "deepspeed_stage_3_offload", "--micro_bsz", 1, "--gpu_memory", 24]
    _, out, _ = plan(*SIZES, *words)
    # moments, the copy, gradients and what waits to be copied back: 20 bytes a number, on one machine
    assert re.search(r"main memory +59.0\d GB on each machine, for its 8 devices", out)


@pytest.mark.slow
def test_rows_are_cut_into_parts_that_fit(plan):
    words = [*SIZES, "--peft", "lora", "--grad_cp", "1", "--gpu_memory", 10, "--epoch_steps", 10]
    code, out, _ = plan(*words, "--micro_bsz", "auto:32")
    assert code == 0
    assert "10 batches of 32 rows" in out
    assert re.search(r"rows: 32 a batch, in \d+ parts of \d+, the fewest that fit", out)
    assert "it fits" in out


@pytest.mark.slow
def test_what_does_not_fit_is_told_with_ways_out(plan):
    code, out, _ = plan(*SIZES, "--gpu_memory", 24)
    assert code == 0
    assert "it cannot fit" in out
    assert "--peft lora" in out


def test_a_checkpoint_and_data_tell_sizes_and_steps(plan, tiny_model, binidx_prefix):
    words = f"--load_model {tiny_model} --data_file {binidx_prefix} --tokenizer bytes --accelerator cpu"
    code, out, _ = plan(*words.split(), "--peft", "miss", "--epoch_steps", 0, "--epoch_count", 3, "--micro_bsz", 5,
                        "--ctx_len", 48)
    assert code == 0
    # 12 documents in batches of 5
    assert "3 x 3 batches of 5 rows of 48 tokens, 9 steps, 2,160 tokens" in out


def test_documents_that_are_held_out_are_not_counted(plan, tiny_model, tmp_path):
    data = tmp_path / "lines.jsonl"
    data.write_text("".join(json.dumps({"text": f"line {number}"}) + "\n" for number in range(12)))
    words = f"--load_model {tiny_model} --data_file {data} --tokenizer bytes --ctx_len 8 --accelerator cpu"
    code, out, _ = plan(*words.split(), "--epoch_steps", 0, "--epoch_count", 3, "--micro_bsz", 2, "--val_split", 4)
    assert code == 0
    assert "3 x 4 batches of 2 rows" in out


def test_the_speed_is_what_an_earlier_run_in_the_folder_was_seen_to_do(plan, tmp_path):
    step = json.dumps({"step": 1, "tokens": 3000, "t_cost": 2.0})
    (tmp_path / "loss_data.jsonl").write_text(f"{step}\n{step}\n")
    _, out, _ = plan(*SIZES, "--gpu_memory", 80, "--micro_bsz", 1, "--epoch_steps", 100, "--epoch_count", 1)
    assert "1,500 tokens/s" in out
    assert "1.1 min for this run" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--peft", "lora"], "--my_testing"),
        ([*SIZES, "--gpu_memory", "much"], "--gpu_memory"),
        ([*SIZES, "--gpu_memory", "inf"], "--gpu_memory"),
        ([*SIZES, "--gpu_memory", "24", "--tflops", "0"], "--tflops"),
        ([*SIZES, "--peft", "bat", "--peft_config", '{"r": 63}', "--gpu_memory", "24"], "63"),
        (["--load_model", "nowhere.pth"], "nowhere.pth"),
    ],
)
def test_a_mistake_gives_one_message_and_exit_code_2(plan, words, message):
    code, _, errors = plan(*words)
    assert code == 2
    assert message in errors
    assert "Traceback" not in errors


def test_help_shows_the_flags_of_training(plan):
    code, out, _ = plan("--help")
    assert code == 0
    assert "--gpu_memory" in out
    assert "--grad_cp" in out


@pytest.mark.slow
def test_debugging_lists_every_program_for_the_recurrence(plan):
    code, out, _ = plan(*SIZES, "--accelerator", "cpu", "--debug")
    assert code == 0
    assert "operator: wkv7 by torch" in out
    assert "wkv7 by reference: one token at a time" in out


def test_the_levels_of_recomputing_are_told_beside_each_other(plan):
    words = [*SIZES, "--peft", "lora", "--micro_bsz", 2, "--gpu_memory", 16]
    code, out, _ = plan(*words, "--grad_cp", "auto")
    assert code == 0
    assert re.search(r"in all with --grad_cp 0 [\d.]+ GB, selective [\d.]+ GB, 1 [\d.]+ GB", out)
    assert "the fastest that fits into 16.0 GB" in out
    assert "it fits" in out
