"""Which objectives go together with which settings."""

from __future__ import annotations

import pytest

from rwkvpeft.config.objective import PREFERENCES, ObjectiveConfig
from rwkvpeft.config.parse import parse_train
from rwkvpeft.config.reference import compares_with_start
from rwkvpeft.config.resolve import Machine, resolve
from rwkvpeft.errors import UserError
from rwkvpeft.registry import OBJECTIVES

CPU = Machine("cpu", has_bf16=True)


def settings(words):
    return resolve(parse_train(f"--load_model m.pth --data_file d.jsonl {words}".split()), CPU)[0]


def refusal(words):
    with pytest.raises(UserError) as caught:
        settings(words)
    return caught.value.render()


@pytest.mark.parametrize("name", PREFERENCES)
def test_infinite_context_is_refused_for_preferences_with_the_reason(name):
    found = refusal(f"--objective {name} --infctx")
    assert "preferences compare whole answers" in found
    assert "--grad_cp 1" in found


def test_infinite_context_is_refused_for_rewards_with_the_reason():
    assert "judged as a whole" in refusal("--objective grpo --reward r.py:f --infctx")


def test_prompts_can_be_looked_at_without_a_judge():
    assert "needs a function that judges" in refusal("--objective grpo")
    assert not settings("--objective grpo --preview 2").rewards.reward
    assert settings("--objective grpo --check").data.check


def test_infinite_context_goes_with_distillation():
    assert settings("--objective distill --teacher t.pth --infctx --chunk_ctx 64").long_context.infctx


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        ("--beta 0.3", "--beta"),
        ("--objective simpo --reference start", "--reference"),
        ("--objective dpo --simpo_gamma 2", "--simpo_gamma"),
        ("--objective dpo --kto_desirable 2", "--kto_desirable"),
        ("--objective orpo --flip_share 0.1", "--flip_share"),
        ("--objective dpo --teacher t.pth", "--teacher"),
        ("--objective dpo --group_size 4", "--group_size"),
        ("--teacher t.pth", "--teacher"),
    ],
)
def test_a_setting_that_the_objective_does_not_read_is_refused(words, flag):
    assert f"{flag} has no effect" in refusal(words)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--objective dpo --beta 0", "--beta must be above 0"),
        ("--objective cpo --sft_share -1", "--sft_share is too small"),
        ("--objective dpo --flip_share 0.5", "--flip_share is out of range"),
        ("--objective kto --kto_undesirable -1", "--kto_undesirable is too small"),
        ("--objective dpo --reference base", "--reference base switches the adapter off"),
        ("--objective distill", "needs a teacher"),
        ("--objective distill --teacher t.pth --distill_alpha 2", "--distill_alpha is out of range"),
        ("--objective distill --teacher t.pth --distill_temperature 0", "--distill_temperature must be above 0"),
        ("--objective grpo", "needs a function that judges"),
        ("--objective grpo --reward r.py:f --group_size 1", "--group_size is too small"),
        ("--objective grpo --reward r.py:f --answer_temperature 0", "--answer_temperature must be above 0"),
        ("--objective grpo --reward r.py:f --kl_beta 0.1", "--kl_beta compares with the model"),
        ("--objective grpo --reward r.py:f --dropout 0.1", "--dropout makes other probabilities"),
        ("--objective grpo --reward r.py:f --strategy fsdp", "every device needs all weights"),
        ("--objective dpo --strategy deepspeed_stage_3", "stage 3 follows one alone"),
        ("--objective dpo --dataload pack", "makes rows its own way"),
        ("--objective dpo --loss_mask se", "goes by answers"),
        ("--objective dpo --label_smoothing 0.1", "--flip_share"),
        ("--objective dpo --neftune_alpha 5", "--neftune_alpha has no effect"),
        ("--objective dpo --data_file tokens", "holds tokens alone"),
    ],
)
def test_what_an_objective_cannot_honour_is_refused_with_the_reason(words, told):
    assert told in refusal(words)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_has_rates_of_its_own_or_the_usual_ones(name):
    needed = {"distill": "--teacher t.pth", "grpo": "--reward r.py:f"}.get(name, "")
    schedule = settings(f"--objective {name} {needed}").schedule
    expected = {"grpo": (1e-5, 1e-6), **dict.fromkeys(PREFERENCES, (5e-5, 5e-6))}.get(name, (6e-4, 1e-5))
    assert (schedule.lr_init, schedule.lr_final) == expected


def test_state_tuning_keeps_its_own_rates():
    assert settings("--objective dpo --peft state").schedule.lr_init == 1.0


@pytest.mark.parametrize(("name", "reads"), [("dpo", "pairs"), ("kto", "pairs"), ("grpo", "prompts"),
                                             ("distill", "tokens"), ("language_modelling", "tokens")])
def test_an_objective_tells_what_it_reads(name, reads):
    assert ObjectiveConfig(objective=name).reads == reads


@pytest.mark.parametrize("files", ["d.csv", "d.jsonl:3,e.parquet:1", "d.json"])
def test_preferences_are_read_from_any_file_of_records(files):
    assert settings(f"--objective dpo --data_file {files}").objective.reads == "pairs"


@pytest.mark.parametrize("files", ["d", "d.jsonl:3,e:1"])
def test_tokens_alone_are_no_preferences(files):
    assert "binidx holds tokens alone" in refusal(f"--objective dpo --data_file {files}")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--objective dpo --peft lora", False),
        ("--objective dpo", True),
        ("--objective kto --peft lora --adapter a.pth", True),
        ("--objective dpo --peft lora --adapter a.pth --reference base", False),
        ("--objective ipo --peft lora --reference start", True),
        ("--objective wpo --peft lora --strategy fsdp", True),
        ("--objective simpo", False),
    ],
)
def test_the_start_is_compared_with_where_it_is_not_the_base_or_nothing_can_be_switched_off(words, expected):
    assert compares_with_start(settings(words)) is expected


def test_an_adapter_cannot_be_switched_off_in_split_weights():
    assert "split weights" in refusal("--objective dpo --peft lora --reference base --strategy fsdp")
