import pytest

from rwkvpeft.config.parse import parse_train
from rwkvpeft.config.upstream import FLAGS, LATER_VALUES
from rwkvpeft.errors import UserError


def words(name):
    known = FLAGS[name]
    return [f"--{name}"] if known.kind == "switch" and known.default == "false" else [f"--{name}", known.default]


@pytest.mark.parametrize("name", [name for name, known in FLAGS.items() if not known.translated])
def test_a_flag_without_effect_is_silent_at_its_default(name):
    if FLAGS[name].kind == "switch" and FLAGS[name].default == "false":
        return
    assert parse_train(words(name)) == {}


@pytest.mark.parametrize("name", [name for name, known in FLAGS.items() if not known.translated])
def test_a_flag_without_effect_is_refused_at_another_value(name):
    other = {"json": '{"r": 1}', "switch": "false" if FLAGS[name].default == "true" else "true"}
    with pytest.raises(UserError, match=f"--{name} has no effect here"):
        parse_train([f"--{name}", other.get(FLAGS[name].kind, "7")])


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, row in LATER_VALUES.items() for value in row])
def test_a_value_that_upstream_knows_is_said_to_be_missing(name, value):
    with pytest.raises(UserError, match=f"--{name} {value} is not available"):
        parse_train([f"--{name}", value])


@pytest.mark.parametrize("argv", [["--train_type", "state"], ["--train_type", "states"], ["--state_tune"]])
def test_the_older_ways_to_ask_for_state_tuning_mean_peft_state(argv):
    assert parse_train(argv) == {"peft": "state"}
    assert parse_train([*argv, "--peft", "none"]) == {"peft": "state"}


def test_two_methods_at_once_are_refused():
    with pytest.raises(UserError, match="two methods"):
        parse_train(["--train_type", "state", "--peft", "lora"])


def test_lora_config_becomes_the_settings_of_the_method():
    given = parse_train(
        ["--peft", "lora", "--lora_config", '{"lora_load":"a.pth","lora_r":32,"lora_alpha":64,"lora_dropout":0.0}']
    )
    assert given["peft_config"] == {"r": 32, "lora_alpha": 64, "lora_dropout": 0.0}
    assert given["adapter"] == "a.pth"


def test_lora_config_at_upstreams_default_says_nothing():
    default = '{"lora_load":"", "lora_r":8, "lora_alpha":32, "lora_dropout":0.01}'
    assert parse_train(["--peft", "none", "--lora_config", default]) == {"peft": "none"}


def test_an_unknown_key_of_lora_config_is_told():
    with pytest.raises(UserError, match="--lora_config has unknown keys"):
        parse_train(["--lora_config", '{"rank": 8}'])


def test_the_oldest_lora_flags_are_understood():
    given = parse_train(
        [
            "--lora",
            "--lora_r",
            "16",
            "--lora_alpha",
            "32",
            "--lora_dropout",
            "0.05",
            "--lora_parts",
            "att,ffn,ln",
            "--emb",
        ]
    )
    assert given == {
        "peft": "lora",
        "peft_config": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05},
        "train_parts": ["ln", "emb"],
    }


def test_other_names_mean_the_field():
    given = parse_train(["--rwkv_version", "x060", "--my_qa_mask", "1", "--dataset_get", "pad"])
    assert given == {"my_testing": "x060", "loss_mask": "qa", "dataload": "pad"}


def test_infctx_is_said_to_be_missing():
    with pytest.raises(UserError, match="infctx"):
        parse_train(["--train_type", "infctx"])
