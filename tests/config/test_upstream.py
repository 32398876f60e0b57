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
        parse_train(["--lora", "--peft", "miss"])


def test_state_tuning_beside_a_method_combines_the_two():
    assert parse_train(["--train_type", "state", "--peft", "lora"]) == {"peft": "lora+state"}


def test_lora_config_becomes_the_settings_of_the_method():
    given = parse_train(
        ["--peft", "lora", "--lora_config", '{"lora_load":"a.pth","lora_r":32,"lora_alpha":64,"lora_dropout":0.0}']
    )
    assert given["peft_config"] == {"r": 32, "lora_alpha": 64, "lora_dropout": 0.0}
    assert given["adapter"] == "a.pth"


OF_OTHER_METHODS = {
    "lora_config": '{"lora_load":"", "lora_r":8, "lora_alpha":32, "lora_dropout":0.01}',
    "pissa_config": '{"pissa_load":"", "pissa_init":"", "pissa_r":8, "svd_niter":4}',
    "miss_config": '{"mode":"mode", "load":"", "r":64}',
    "disha_config": '{"mode":"mode", "load":"", "r":64}',
    "bone_config": '{"bone_load":"", "bone_r":64}',
}


@pytest.mark.parametrize(("name", "default"), OF_OTHER_METHODS.items())
def test_the_untouched_settings_of_another_method_say_nothing(name, default):
    assert parse_train(["--peft", "state", f"--{name}", default]) == {"peft": "state"}


@pytest.mark.parametrize(("name", "default"), OF_OTHER_METHODS.items())
def test_the_chosen_settings_of_another_method_are_refused(name, default):
    with pytest.raises(UserError, match=f"--{name} has no effect with --peft state"):
        parse_train(["--peft", "state", f"--{name}", default.replace("8", "16").replace("64", "32")])


def test_pissa_config_becomes_the_settings_the_adapter_and_its_start_values():
    config = '{"pissa_load":"a.pth","pissa_init":"init_pissa.pth","pissa_r":32,"svd_niter":4}'
    assert parse_train(["--peft", "pissa", "--pissa_config", config]) == {
        "peft": "pissa",
        "peft_config": {"r": 32, "svd_niter": 4},
        "adapter": "a.pth",
        "adapter_init": "init_pissa.pth",
    }


@pytest.mark.parametrize(
    ("method", "flag", "config"),
    [
        ("miss", "miss_config", '{"mode":"bone","load":"a.pth","r":32}'),
        ("disha", "disha_config", '{"mode":"bone","load":"a.pth","r":32}'),
        ("bone", "bone_config", '{"bone_mode":"bone","bone_load":"a.pth","bone_r":32}'),
    ],
)
def test_the_settings_of_miss_are_understood_under_each_of_its_names(method, flag, config):
    given = parse_train(["--peft", method, f"--{flag}", config])
    assert given == {"peft": method, "peft_config": {"r": 32}, "adapter": "a.pth"}


@pytest.mark.parametrize(
    ("method", "flag", "config"),
    [
        ("disha", "disha_config", '{"mode":"bat","load":"","r":32}'),
        ("bone", "bone_config", '{"bone_mode":"bat","bone_load":"","bone_r":32}'),
    ],
)
def test_the_mode_bat_is_the_method_bat(method, flag, config):
    assert parse_train(["--peft", method, f"--{flag}", config]) == {"peft": "bat", "peft_config": {"r": 32}}


def test_an_unknown_mode_is_refused():
    with pytest.raises(UserError, match="bone, bat"):
        parse_train(["--peft", "disha", "--disha_config", '{"mode":"bats","r":8}'])


def test_a_key_of_peft_config_wins_over_upstreams_settings():
    given = parse_train(
        ["--peft", "pissa", "--peft_config", '{"r": 4}', "--pissa_config", '{"pissa_r":32,"svd_niter":8}']
    )
    assert given["peft_config"] == {"r": 4, "svd_niter": 8}


def test_the_first_pissa_flags_are_understood():
    line = (
        "--lora_load rwkv-0 --lora --lora_r 64 --lora_alpha 128 --lora_dropout 0.01 --lora_parts=att,ffn,time,ln "
        "--PISSA --svd_niter 4 --quant nf4"
    )
    given = parse_train(line.split())
    assert given == {
        "peft": "pissa",
        "peft_config": {"r": 64, "svd_niter": 4},
        "adapter": "rwkv-0",
        "train_parts": ["time", "ln"],
        "quant": "nf4",
    }


def test_parts_that_leave_linears_out_are_refused():
    with pytest.raises(UserError, match="lora_parts without ffn"):
        parse_train(["--lora", "--lora_parts", "att,ln"])


def test_the_spelling_of_a_method_does_not_matter():
    assert parse_train(["--peft", "DiSHA"]) == {"peft": "disha"}


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


def test_the_train_type_infctx_is_a_switch():
    given = parse_train(["--train_type", "infctx", "--peft", "lora"])
    assert given == {"peft": "lora", "infctx": True}
