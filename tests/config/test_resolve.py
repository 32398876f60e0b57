import dataclasses

import pytest

from rwkvpeft.config.parse import parse_train
from rwkvpeft.config.resolve import Machine, resolve
from rwkvpeft.config.settings_file import write_settings
from rwkvpeft.errors import UserError

CPU = Machine("cpu", has_bf16=True)
BASE = {"load_model": "a.pth", "data_file": "data"}


def resolved(**given):
    return resolve({**BASE, **given}, CPU)[0]


def test_state_tuning_has_its_own_rates_and_context():
    config = resolved(peft="state")
    assert (config.schedule.lr_init, config.schedule.lr_final, config.schedule.warmup_steps) == (1.0, 0.01, 10)
    assert config.data.ctx_len == 512


@pytest.mark.parametrize("method", ["none", "lora", "pissa", "miss", "bat"])
def test_other_methods_have_upstreams_rates(method):
    config = resolved(peft=method)
    assert (config.schedule.lr_init, config.schedule.lr_final, config.schedule.warmup_steps) == (6e-4, 1e-5, -1)
    assert config.data.ctx_len == 1024


def test_a_given_rate_is_kept():
    assert resolved(peft="state", lr_init=0.5).schedule.lr_init == 0.5


def test_a_small_rate_for_state_tuning_is_remarked_on():
    _, remarks = resolve({**BASE, "peft": "state", "lr_init": 2e-5}, CPU)
    assert any("small for state tuning" in remark for remark in remarks)


def test_adapters_are_written_unmerged():
    assert resolved(peft="lora").method.merge == 0


@pytest.mark.parametrize(
    ("machine", "precision"),
    [(CPU, "fp32"), (Machine("cuda", has_bf16=True), "bf16"), (Machine("cuda", has_bf16=False), "fp32")],
)
def test_precision_follows_the_machine(machine, precision):
    assert resolve(BASE, machine)[0].runtime.precision == precision


def test_a_fresh_seed_is_drawn_and_told():
    config, remarks = resolve(BASE, CPU)
    assert config.runtime.random_seed >= 0
    assert any(str(config.runtime.random_seed) in remark for remark in remarks)


def test_a_run_taken_up_again_keeps_its_seed():
    config, _ = resolve({**BASE, "random_seed": -1}, CPU, earlier_seed=5)
    assert config.runtime.random_seed == 5


def test_zero_means_that_the_file_tells():
    assert resolved(vocab_size=0, dim_ffn=0).model.vocab_size is None


def test_a_jsonl_file_is_known_by_its_name():
    assert resolved(data_file="data.jsonl").data.data_type == "jsonl"
    assert resolved(data_file="data.bin").data.data_file == "data"


def test_op_fla_is_a_habit_of_state_tuning_and_strict_elsewhere():
    state = resolved(peft="state", op="fla").runtime
    assert (state.op, state.fla) == ("auto", True)
    assert resolved(peft="lora", op="fla").runtime.op == "fla"


@pytest.mark.parametrize(
    "given",
    [
        {"dataload": "only", "micro_bsz": 2},
        {"epoch_count": 0},
        {"lr_init": 0.0},
        {"lr_init": -1.0},
        {"ctx_len": 0},
        {"lr_schedule": "exp", "lr_final": 0.0},
        {"magic_prime": 113},
        {"loss_mask": "se", "mask_id": {"mask0": "a"}},
        {"peft_config": {"r": 8}},
        {"train_parts": ["emb"]},
        {"peft": "state", "train_parts": ["emb"]},
        {"peft": "lroa"},
        {"peft": "lora+miss"},
        {"quant": "nf4"},
        {"peft": "lora", "quant_double": True},
        {"peft": "lora", "quant": "int8", "quant_double": True},
        {"peft": "lora", "quant_head": True},
        {"peft": "lora", "quant": "nf4", "quant_head": True, "train_parts": ["head"]},
        {"peft": "lora", "layer_profile": "profile.csv"},
        {"layer_profile": "profile.csv", "peft_config": {"r": 8}},
        {"peft": "pissa", "adapter_init": "init_pissa.pth"},
        {"peft": "lora", "adapter": "a.pth", "adapter_init": "init_pissa.pth"},
        {"prefetch_factor": 2},
        {"load_model": ""},
        {"load_model": "0"},
        {"data_file": ""},
    ],
)
def test_settings_that_exclude_each_other_are_refused(given):
    with pytest.raises(UserError):
        resolved(**given)


@pytest.mark.parametrize(
    "given",
    [
        {"peft": "lora", "quant": "4bit", "quant_double": True, "quant_head": True, "merge": 1},
        {"peft": "state", "quant": "fp8"},
        {"peft": "pissa", "train_parts": ["ln", "head"], "quant": "int8"},
        {"layer_profile": "profile.csv", "quant": "nf4", "adapter": "a.pth"},
        {"peft": "pissa", "adapter": "a.pth", "adapter_init": "init_pissa.pth"},
    ],
)
def test_settings_that_go_together_are_taken(given):
    assert resolved(**given)


def test_full_training_on_a_quantised_base_is_refused_with_the_reason():
    with pytest.raises(UserError, match="only frozen weights can be quantised"):
        resolved(quant="int8")


def test_states_beside_a_method_leave_it_its_own_rates():
    config, remarks = resolve({**BASE, "peft": "lora+state", "random_seed": 1}, CPU)
    assert (config.schedule.lr_init, config.schedule.lr_final, config.data.ctx_len) == (6e-4, 1e-5, 1024)
    assert remarks == []


def test_states_beside_a_layer_profile_leave_it_its_own_rates():
    assert resolved(peft="state", layer_profile="profile.csv").schedule.lr_init == 6e-4


def test_all_findings_come_in_one_message():
    with pytest.raises(UserError, match="3 settings need a change"):
        resolved(epoch_count=0, micro_bsz=0, beta1=1.0)


def test_one_document_a_row_means_one_row_a_batch():
    assert resolved(dataload="only").schedule.micro_bsz == 1


def test_what_a_run_writes_can_be_fed_back(tmp_path):
    config = resolved(peft="lora", peft_config={"r": 4, "lora_alpha": 1e-3}, train_parts=["ln"], adam_eps=1e-18)
    write_settings(tmp_path / "config.yaml", config)
    again, remarks = resolve(parse_train(["--config", str(tmp_path / "config.yaml")]), CPU)
    assert dataclasses.asdict(again) == dataclasses.asdict(config)
    assert remarks == []


@pytest.mark.parametrize("name", ["epoch_save", "save_steps", "step_save", "keep"])
def test_checkpoints_are_not_counted_below_none(name):
    with pytest.raises(UserError, match=f"--{name} is too small"):
        resolved(**{name: -1})
