"""RWKV-LM-RLHF's flags."""

from __future__ import annotations

import pytest

from rwkvpeft.config.parse import parse_train
from rwkvpeft.config.upstream_objectives import FLAGS
from rwkvpeft.errors import UserError


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        ("--dpo 1 --dpo_beta 0.02 --dpo_alpha 0.1", {"objective": "dpo", "beta": 0.02, "sft_share": 0.1}),
        ("--orpo 1 --orpo_alpha 0.006", {"objective": "orpo", "beta": 0.006}),
        ("--simpo 1 --simpo_beta 2 --simpo_gamma 0.5", {"objective": "simpo", "beta": 2.0, "simpo_gamma": 0.5}),
        ("--wpo 1 --wpo_beta 0.1 --wpo_alpha 0.3", {"objective": "wpo", "beta": 0.1, "sft_share": 0.3}),
        (
            "--distillation 1 --temperature 2 --alpha 0.5 --smoothing 0.01 --top_k 100",
            {"objective": "distill", "distill_temperature": 2.0, "distill_alpha": 0.5, "label_smoothing": 0.01,
             "distill_top_k": 100},
        ),
        (
            "--grpo 1 --grpo_gen_count 4 --grpo_gen_length 64 --grpo_gen_topp 0.7 --grpo_kl_beta 0.1",
            {"objective": "grpo", "group_size": 4, "answer_tokens": 64, "answer_top_p": 0.7, "kl_beta": 0.1},
        ),
        ("--dpo 1 --rlhf_max_corpus_len 512", {"objective": "dpo", "ctx_len": 512}),
    ],
)
def test_a_command_of_upstream_means_our_objective(words, fields):
    assert parse_train(words.split()) == fields


def test_a_field_of_ours_wins_over_upstreams_flag():
    assert parse_train(["--dpo", "1", "--dpo_beta", "0.02", "--beta", "0.3"]) == {"objective": "dpo", "beta": 0.3}


@pytest.mark.parametrize("words", ["--dpo 1 --orpo 1", "--dpo 1 --objective kto"])
def test_two_objectives_at_once_are_refused(words):
    with pytest.raises(UserError, match="two objectives"):
        parse_train(words.split())


def test_a_setting_of_an_objective_that_is_not_asked_for_is_refused():
    with pytest.raises(UserError, match="--simpo_alpha has no effect"):
        parse_train(["--dpo", "1", "--simpo_alpha", "0.3"])


@pytest.mark.parametrize("name", [name for name, known in FLAGS.items() if known.translated and known.default == "0"])
def test_a_switch_that_is_off_says_nothing(name):
    assert parse_train([f"--{name}", "0"]) == {}


def test_a_pickled_training_file_is_refused_with_the_reason():
    with pytest.raises(UserError, match="pickled"):
        parse_train(["--dpo", "1", "--rlhf_train_file", "pairs.save"])
