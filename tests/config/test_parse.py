import subprocess
import sys
from dataclasses import dataclass, field

import pytest

from rwkvpeft.config.parse import build_groups, parse_train
from rwkvpeft.errors import UserError
from rwkvpeft.registry import ADAPTER_SETTINGS, find


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch):
    # help breaks its lines where the terminal ends
    monkeypatch.setenv("COLUMNS", "120")


def message(argv):
    with pytest.raises(UserError) as caught:
        parse_train(argv)
    return caught.value.render()


def test_only_what_was_given_is_returned():
    assert parse_train(["--lr_init", "2e-5", "--micro_bsz", "4"]) == {"lr_init": 2e-5, "micro_bsz": 4}


def test_values_land_in_their_groups():
    config = build_groups({"lr_init": 1.0, "peft": "state"})
    assert config.schedule.lr_init == 1.0
    assert config.method.peft == "state"
    assert config.data.dataload == "pad"


def test_an_alias_means_the_field():
    assert parse_train(["--head_size", "8", "--optimizer", "adamw"]) == {"head_size_a": 8, "optim": "adamw"}


def test_negative_numbers_in_any_notation_are_values():
    given = parse_train(["--random_seed", "-1", "--weight_decay_final", "-1e0"])
    assert given == {"random_seed": -1, "weight_decay_final": -1.0}


@pytest.mark.parametrize("words", [["ln", "emb"], ["ln,emb"], ["ln emb"], ['["ln", "emb"]']])
def test_a_list_is_read_in_every_usual_spelling(words):
    assert parse_train(["--train_parts", *words])["train_parts"] == ["ln", "emb"]


@pytest.mark.parametrize("words", [[], ["none"]])
def test_an_empty_list_can_be_said(words):
    assert parse_train(["--train_parts", *words])["train_parts"] == []


def test_a_switch_takes_a_word_or_nothing():
    assert parse_train(["--fla"])["fla"] is True
    assert parse_train(["--fla", "false"])["fla"] is False


def test_an_unknown_flag_names_the_nearest():
    text = message(["--load_modle", "a.pth"])
    assert "unknown flag --load_modle" in text
    assert "--load_model" in text


def test_a_flag_is_never_completed():
    assert "unknown flag --micro" in message(["--micro", "4"])


def test_a_misplaced_backslash_is_explained():
    assert "last character of its line" in message(["--micro_bsz", "4", "\\"])


def test_an_unknown_choice_names_the_known_ones():
    text = message(["--loss_mask", "qq"])
    assert "none, pad, qa, last, se" in text


def test_all_mistakes_are_told_at_once():
    text = message(["--lr_init", "x", "--micro_bsz", "1.5", "--nosuch"])
    assert text.startswith("error: 3 settings need a change")


def test_a_flag_without_its_value_is_told():
    assert "--lr_init needs a value" in message(["--lr_init"])


def test_broken_json_names_the_column_and_how_to_quote():
    text = message(["--peft_config", '{"r":', "8}"])
    assert "column 6" in text
    assert "'{\"r\": 8}'" in text


def test_broken_json_is_shown_an_example_of_its_flag():
    assert """--mask_id '{"mask0":""" in message(["--mask_id", "[1"])
    assert '{"mask0":' in message(["--mask_id", "[1]"])


def test_a_number_must_be_finite():
    assert "a finite number" in message(["--lr_init", "nan"])


def test_the_command_line_wins_over_the_file(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("lr_init: 1e-5\nschedule:\n  micro_bsz: 3\n  lr_final: 1e-6\n")
    given = parse_train(["--config", str(path), "--micro_bsz", "4"])
    assert given == {"lr_init": 1e-5, "lr_final": 1e-6, "micro_bsz": 4}


def test_a_flag_of_the_command_line_wins_over_its_upstream_name_in_the_file(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("peft: lora\npeft_config: {r: 4}\n")
    given = parse_train(["--config", str(path), "--lora_config", '{"lora_r": 32}'])
    assert given["peft_config"] == {"r": 32}


def test_an_unknown_key_of_the_file_names_the_nearest(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("schedule:\n  micro_bzs: 3\n")
    text = message(["--config", str(path)])
    assert "schedule.micro_bzs" in text
    assert "micro_bsz" in text


def test_a_broken_file_is_told_with_its_line(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("a: 1\nb: [1, 2\nc: 3\n")
    assert f"{path}:3" in message(["--config", str(path)])


def test_a_missing_file_is_told(tmp_path):
    assert "cannot be read" in message(["--config", str(tmp_path / "none.yaml")])


def test_help_shows_every_flag_its_default_and_unit(capsys):
    with pytest.raises(SystemExit) as leaving:
        parse_train(["--help"])
    shown = capsys.readouterr().out
    assert leaving.value.code == 0
    assert "--micro_bsz" in shown
    assert "rows; default: 12" in shown
    assert "--my_pile_stage" in shown


def method_help(capsys, method, settings):
    with pytest.raises(SystemExit):
        parse_train(["--peft", method, "--help"], settings)
    return capsys.readouterr().out


def test_help_shows_the_settings_of_each_chosen_method(capsys):
    shown = method_help(capsys, "lora+state", lambda method: find(ADAPTER_SETTINGS, method, flag="--peft"))
    assert "use_rslora" in shown.split("--peft_config of --peft lora")[1]
    assert "token_shift" in shown.split("--peft_config of --peft state")[1]


def test_help_shows_the_settings_of_another_packages_dataclass(capsys, monkeypatch):
    @dataclass
    class Settings:
        rank: int = field(default=8, metadata={"help": "rank of the update.\n  " + "More about it. " * 100})
        inner: int = field(default=1, init=False, metadata={"help": "not for users"})
        plain: int = 3

    monkeypatch.setattr("rwkvpeft.config.methods.hugging_face_methods", lambda: ["adalora"])
    shown = method_help(capsys, "adalora", lambda method: Settings).split("--peft_config of --peft adalora")[1]
    assert "rank of the update. More about it." in shown
    assert "default: 8" in shown
    assert "plain" in shown
    assert "not for users" not in shown
    assert shown.count("More about it.") < 50


def test_help_for_a_method_that_is_none_names_the_nearest():
    with pytest.raises(UserError, match="--peft pissa"):
        parse_train(["--peft", "pisa", "--help"], lambda method: None)


@pytest.mark.parametrize("method", ["dora", "pissa", "miss", "bat+state"])
def test_help_for_a_method_does_not_import_torch(method):
    code = (
        "import sys; from rwkvpeft.cli.train import main\n"
        f"try: main(['--peft', '{method}', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "--peft_config of --peft" in done.stdout


def test_none_beside_other_words_is_refused():
    with pytest.raises(UserError, match="none alone"):
        parse_train(["--train_parts", "none", "time"])
