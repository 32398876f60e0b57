"""The scripts of the methods: each one's command line, with a python that writes down what it is called with."""

import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from rwkvpeft.adapters.build import build_adapter
from rwkvpeft.checkpoints.files import load_tensors, save_tensors
from rwkvpeft.cli.merge import main as merge
from rwkvpeft.config.methods import members
from rwkvpeft.config.parse import parse_train
from rwkvpeft.config.resolve import Machine, resolve
from rwkvpeft.registry import ADAPTERS

ROOT = Path(__file__).resolve().parents[2]
TRAIN = {
    "run_full.sh": "none",
    "run_lora.sh": "lora",
    "run_dora.sh": "dora",
    "run_pissa.sh": "pissa",
    "miss.sh": "miss",
    "run_disha.sh": "disha",
    "run_bone.sh": "bone",
    "run_bat.sh": "bat",
    "run_lora_state.sh": "lora+state",
    "run_quant.sh": "lora",
    "run_qlora.sh": "lora",
    "run_qpissa.sh": "pissa",
    "run_profile.sh": "none",
    "run_adalora.sh": "adalora",
    "run_infctx.sh": "lora",
    "run_packed.sh": "lora",
    "demo-state-tuning.sh": "state",
}
MERGE = {
    "merge_lora.sh": "lora_checkpoint",
    "merge_pissa.sh": "pissa_checkpoint",
    "merge_disha.sh": "peft_checkpoint",
    "merge_bone.sh": "peft_checkpoint",
    "demo-state-merge.sh": "state_checkpoint",
}
PREFERENCES = {"run_dpo.sh": "dpo", "run_orpo.sh": "orpo"}
LINEAR = "blocks.0.att.key"


@pytest.fixture
def command_line(tmp_path):
    """Run a script in an environment that counts as installed; returns the words of the last python command."""
    fake = tmp_path / "venv" / "bin" / "python"
    fake.parent.mkdir(parents=True)
    fake.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > "{tmp_path}/words"\n')
    fake.chmod(0o755)
    sums = subprocess.run(["cksum", "pyproject.toml", "constraints.txt"], cwd=ROOT, capture_output=True, check=True)
    (tmp_path / "venv" / "installed-fake").write_bytes(sums.stdout)

    def run(script, *words, **settings):
        if script == "run_adalora.sh" and find_spec("peft") is None:
            pytest.skip("peft is not installed")
        environment = {"PATH": "/usr/bin:/bin", "VENV": str(tmp_path / "venv"), "extras": "fake", **settings}
        command = ["bash", str(ROOT / "scripts" / script), *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return (tmp_path / "words").read_text().splitlines()[1:]

    return run


def resolved(words):
    return resolve(parse_train(words), Machine("cpu", has_bf16=False))[0]


def test_every_script_of_a_method_is_tested_here():
    others = {"pretrain.sh", "quickstart.sh", "setup.sh", "method.sh", "preference.sh", "test.sh"}
    tested = {*TRAIN, *MERGE, *PREFERENCES, "run_grpo.sh", "run_distill.sh", *others}
    assert {path.name for path in (ROOT / "scripts").glob("*.sh")} == tested


@pytest.mark.parametrize(("script", "method"), TRAIN.items())
def test_a_scripts_settings_are_those_of_its_method(script, method, command_line):
    config = resolved(command_line(script))
    assert config.method.peft == method
    if members(method) and set(members(method)) <= set(ADAPTERS):
        build_adapter(method, config.method.peft_config)
    assert (ROOT / config.model.load_model).is_file()
    assert not config.method.layer_profile or (ROOT / config.method.layer_profile).is_file()


@pytest.mark.parametrize("script", TRAIN)
def test_a_script_takes_another_model_and_data(script, command_line):
    config = resolved(command_line(script, load_model="m.pth", data_file="d", n_layer="24", tokenizer="world"))
    assert (config.model.load_model, config.data.data_file) == ("m.pth", "d")
    assert (config.model.n_layer, config.data.tokenizer) == (24, "world")


@pytest.mark.parametrize(("script", "objective"), PREFERENCES.items())
def test_a_script_of_preferences_trains_its_objective_on_pairs_made_by_rule(script, objective, command_line):
    config = resolved(command_line(script))
    assert (config.objective.objective, config.method.peft) == (objective, "lora")
    assert config.data.data_file == "out/preferences/pairs.jsonl"
    assert config.evaluation.val_data_file == "out/preferences/pairs_heldout.jsonl"


@pytest.mark.parametrize("script", PREFERENCES)
def test_a_script_of_preferences_takes_another_model_method_and_pairs(script, command_line):
    settings = {"load_model": "m.pth", "data_file": "p.jsonl", "peft": "state", "tokenizer": "world", "lr_init": "1"}
    config = resolved(command_line(script, **settings))
    assert (config.model.load_model, config.data.data_file, config.method.peft) == ("m.pth", "p.jsonl", "state")
    assert (config.data.tokenizer, config.schedule.lr_init) == ("world", 1)
    assert not config.evaluation.val_data_file


def test_the_scripts_of_preferences_take_the_weights_of_their_terms(command_line):
    dpo = resolved(command_line("run_dpo.sh", "kto", beta="0.3", dpo_alpha="0.2")).objective
    assert (dpo.objective, dpo.beta, dpo.sft_share) == ("kto", 0.3, 0.2)
    orpo = resolved(command_line("run_orpo.sh", orpo_alpha="0.4", sft_share="0.5")).objective
    assert (orpo.beta, orpo.sft_share) == (0.4, 0.5)


def test_the_script_of_distillation_teaches_a_new_small_model_what_was_stored(command_line):
    config = resolved(command_line("run_distill.sh", teacher="t.pth", alpha="0.7", temperature="3"))
    assert config.objective.objective == "distill"
    settings = config.distillation
    assert (settings.teacher, settings.distill_alpha, settings.distill_temperature) == ("out/teacher", 0.7, 3)
    assert (config.model.load_model, config.model.n_layer, config.model.n_embd) == ("", 2, 64)


def test_the_script_of_rewards_judges_held_out_problems(command_line, tmp_path):
    (tmp_path / "val_data.jsonl").write_text('{"metrics": {"reward": 0.5, "kl": 1}}\n{"metrics": {"reward": 1e+0}}\n')
    settings = {"proj_dir": str(tmp_path), "reward": "a.py:f b.py:g=0.5", "group_size": "4"}
    config = resolved(command_line("run_grpo.sh", "--advantage", "rloo", **settings))
    assert (config.objective.objective, config.rewards.advantage, config.rewards.group_size) == ("grpo", "rloo", 4)
    assert config.rewards.reward == ["a.py:f", "b.py:g=0.5"]
    assert config.data.data_file == "out/arithmetic/train.jsonl"
    assert config.evaluation.val_data_file == "out/arithmetic/heldout.jsonl"


def test_the_pre_training_script_ends_by_tokens_in_stage_3(command_line, tmp_path):
    config = resolved(command_line("pretrain.sh", data_file="d", magic_prime="5", proj_dir=str(tmp_path / "out")))
    assert (config.schedule.train_stage, config.data.dataload, config.data.magic_prime) == (3, "get", 5)
    assert config.schedule.epoch_steps * config.schedule.micro_bsz == 40320
    assert config.schedule.my_exit_tokens == 400000


def test_the_script_for_long_rows_trains_in_chunks_with_exact_gradients(command_line):
    long = resolved(command_line("run_infctx.sh", chunk_ctx="32")).long_context
    assert (long.infctx, long.chunk_ctx, long.infctx_grad) == (True, 32, "exact")


def test_the_script_for_packed_rows_packs(command_line):
    assert resolved(command_line("run_packed.sh")).data.dataload == "pack"


def test_the_quantised_scripts_quantise(command_line):
    assert resolved(command_line("run_quant.sh", "int8", "miss")).method.quant == "int8"
    assert resolved(command_line("run_quant.sh", quant_flags="--quant_double --quant_head")).method.quant_head
    assert resolved(command_line("run_qlora.sh")).method.quant_double
    assert resolved(command_line("run_qpissa.sh")).method.quant == "nf4"


@pytest.mark.parametrize(("script", "variable"), MERGE.items())
def test_a_merge_script_merges_what_its_training_script_writes(script, variable, command_line, tmp_path):
    base = load_tensors(ROOT / "scripts/data/base-v7-bytes.pth")
    lora = {"lora_A": torch.ones(1, 128), "lora_B": torch.ones(128, 1)}
    written = {
        "merge_lora.sh": {f"{LINEAR}.{name}": tensor for name, tensor in lora.items()},
        "merge_pissa.sh": {f"{LINEAR}.{name}": tensor for name, tensor in lora.items()},
        "demo-state-merge.sh": {f"blocks.{layer}.att.time_state": torch.ones(2, 64, 64) for layer in range(4)},
    }.get(script, {f"{LINEAR}.miss": torch.ones(4, 128)})
    save_tensors(tmp_path / "rwkv-4.pth", written)
    save_tensors(tmp_path / "init_pissa.pth", {f"{LINEAR}.init_{name}": tensor / 2 for name, tensor in lora.items()})
    output = tmp_path / "merged.pth"
    words = command_line(script, **{variable: str(tmp_path / "rwkv-4.pth"), "output": str(output)})
    assert merge([str(ROOT / word) if word.startswith("scripts/") else word for word in words]) == 0
    merged = load_tensors(output)
    assert len(merged) == len(base) + (4 if script == "demo-state-merge.sh" else 0)
