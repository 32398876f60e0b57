"""Mistakes that people make, each through the command they would make it with."""

import json
import shutil

import numpy as np
import pytest
import torch

from rwkvpeft.cli.merge import main as merge
from rwkvpeft.data.binidx import write_binidx


@pytest.fixture
def mistake(train, tmp_path):
    """Run the train command and demand one message, exit code 2, and an untouched output folder."""

    def run(*words):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "note.txt").write_text("mine")
        code, _, errors = train(*words)
        assert code == 2, errors
        assert errors.startswith("error: ")
        assert errors.count("error: ") == 1
        assert "Traceback" not in errors
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["note.txt"]
        return errors

    return run


def test_a_wrong_model_path(mistake, tiny_model):
    text = mistake("--load_model", str(tiny_model).replace("tiny", "tyni"))
    assert "--load_model names a file that does not exist" in text
    assert str(tiny_model) in text


def test_a_wrong_data_path(mistake, tmp_path):
    text = mistake("--data_file", tmp_path / "nothing")
    assert "nothing.bin" in text
    assert "nothing.idx" in text


def test_a_bin_without_its_idx(mistake, binidx_prefix, tmp_path):
    shutil.copy(f"{binidx_prefix}.bin", tmp_path / "half.bin")
    text = mistake("--data_file", tmp_path / "half")
    assert "no " + str(tmp_path / "half.idx") in text
    assert "half.bin" not in text


def test_a_truncated_bin(mistake, binidx_prefix, tmp_path):
    shutil.copy(f"{binidx_prefix}.idx", tmp_path / "cut.idx")
    whole = open(f"{binidx_prefix}.bin", "rb").read()  # noqa: SIM115
    (tmp_path / "cut.bin").write_bytes(whole[:-100])
    assert "cut short" in mistake("--data_file", tmp_path / "cut")


def test_an_empty_jsonl(mistake, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    assert "empty.jsonl" in mistake("--data_file", tmp_path / "empty.jsonl")


def test_bad_json_on_line_7(mistake, tmp_path):
    path = tmp_path / "bad.jsonl"
    lines = [json.dumps({"text": f"line {number}"}) for number in range(1, 10)]
    lines[6] = '{"text": "it says "no""}'
    path.write_text("\n".join(lines))
    text = mistake("--data_file", path)
    assert f"{path}:7" in text
    assert "it says" in text


def test_a_context_that_no_memory_holds(mistake):
    text = mistake("--peft", "none", "--ctx_len", "100000000", "--micro_bsz", "64")
    assert "memory" in text
    assert "--infctx" in text


def test_a_wrong_width(mistake, tiny_model):
    text = mistake("--n_embd", "2048", "--n_layer", "24")
    assert "2 settings need a change" in text
    assert "--n_embd 2048 does not fit" in text
    assert "which has 32" in text


def test_a_version_6_flag_with_a_version_7_file(mistake):
    text = mistake("--my_testing", "x060")
    assert "x060" in text
    assert "x070" in text


def test_an_adapter_of_another_base(mistake, train, tiny_model, tmp_path):
    train("--peft", "state", "--proj_dir", tmp_path / "first")
    other = torch.load(tiny_model, weights_only=True)
    other["emb.weight"] += 1
    torch.save(other, tmp_path / "other.pth")
    words = ["--peft", "state", "--load_model", tmp_path / "other.pth", "--adapter", tmp_path / "first/rwkv-0.pth"]
    text = mistake(*words)
    assert "is not the model this adapter was trained on" in text


def test_an_adapter_of_another_alpha(mistake, train, tmp_path):
    train("--peft", "lora", "--peft_config", '{"lora_alpha": 64}', "--proj_dir", tmp_path / "first")
    text = mistake("--peft", "lora", "--adapter", tmp_path / "first" / "rwkv-0.pth")
    assert "trained with another lora_alpha" in text
    assert "64" in text


def test_merging_into_another_base(train, tiny_model, tmp_path, capsys):
    train("--peft", "lora")
    other = torch.load(tiny_model, weights_only=True)
    other["emb.weight"] += 1
    torch.save(other, tmp_path / "other.pth")
    files = f"--base_model {tmp_path}/other.pth --checkpoint {tmp_path}/out/rwkv-0.pth --output {tmp_path}/merged.pth"
    code = merge(files.split())
    errors = capsys.readouterr().err
    assert code == 2
    assert "is not the model this adapter was trained on" in errors
    assert not (tmp_path / "merged.pth").exists()


def test_merging_pissa_without_its_start_values(train, tiny_model, tmp_path, capsys):
    train("--peft", "pissa")
    adapter = torch.load(tmp_path / "out/rwkv-0.pth", weights_only=True)
    bare = {name: tensor for name, tensor in adapter.items() if "init_lora" not in name}
    torch.save(bare, tmp_path / "bare.pth")
    files = f"--base_model {tiny_model} --checkpoint {tmp_path}/bare.pth --output {tmp_path}/merged.pth --type pissa"
    assert merge(files.split()) == 2
    assert "--lora_init" in capsys.readouterr().err
    assert not (tmp_path / "merged.pth").exists()


def test_a_token_beyond_the_vocabulary(mistake, tmp_path):
    write_binidx(tmp_path / "wide", [np.array([1, 2, 3, 0], dtype=np.uint16), np.array([7, 300, 0], dtype=np.uint16)])
    text = mistake("--data_file", tmp_path / "wide")
    assert "300" in text
    assert "0 to 255" in text


def test_an_output_folder_that_cannot_be_written(mistake, tmp_path):
    (tmp_path / "file").write_text("")
    assert "--proj_dir cannot be a folder" in mistake("--proj_dir", tmp_path / "file" / "out")


def test_an_unknown_value(mistake):
    text = mistake("--lr_schedule", "cosine")
    assert "--lr_schedule does not know 'cosine'" in text
    assert "--lr_schedule cos" in text


def test_a_value_in_capitals(mistake):
    assert "--objective dpo" in mistake("--objective", "DPO")


def test_an_unknown_flag(mistake):
    assert "--lr_init" in mistake("--lr_int", "1e-5")


def test_an_unknown_method(mistake):
    text = mistake("--peft", "lroa")
    assert "--peft does not know 'lroa'" in text
    assert "--peft lora" in text


def test_a_quantised_base_that_is_trained_itself(mistake):
    text = mistake("--peft", "none", "--quant", "nf4")
    assert "only frozen weights can be quantised" in text
    assert "--peft lora --quant nf4" in text


def test_an_unknown_format(mistake):
    assert "--quant nf4" in mistake("--peft", "lora", "--quant", "nf5")


def test_two_methods_of_which_none_is_state(mistake):
    assert "METHOD+state" in mistake("--peft", "lora+miss")


def test_a_layer_profile_that_is_not_there(mistake, tmp_path):
    assert "nothing.csv" in mistake("--layer_profile", tmp_path / "nothing.csv")


def test_a_rank_that_the_matrices_do_not_have(mistake):
    text = mistake("--peft", "pissa", "--peft_config", '{"r": 64}')
    assert "the r of pissa is larger than" in text


def test_settings_a_method_does_not_take(mistake):
    assert "rank" in mistake("--peft", "lora", "--peft_config", '{"rank": 8}')


def test_a_mask_that_leaves_nothing_to_train(mistake, tmp_path):
    path = tmp_path / "plain.jsonl"
    path.write_text('{"text": "no answers in here"}\n')
    assert "train" in mistake("--data_file", path, "--loss_mask", "qa")


def test_a_file_that_is_no_model(mistake, tmp_path):
    (tmp_path / "not.pth").write_text("hello")
    assert "not.pth cannot be read as a checkpoint" in mistake("--load_model", tmp_path / "not.pth")


def test_a_gpu_that_is_not_there(mistake):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "--accelerator cpu" in mistake("--accelerator", "gpu")


def test_a_document_that_no_memory_holds(mistake, tmp_path, monkeypatch):
    monkeypatch.setattr("rwkvpeft.memory.machine.total_memory", lambda device_type: 20_000_000)
    write_binidx(tmp_path / "long", [np.array([1, 2, 0]), np.array([1] * 50_000 + [0])])
    words = ["--data_file", tmp_path / "long", "--peft", "state", "--dataload", "only", "--micro_bsz", "1"]
    assert "cannot fit into memory" in mistake(*words, "--ctx_len", "1000000")


def test_other_settings_than_those_of_the_run_that_would_go_on(train, tmp_path):
    train("--peft", "state")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    code, _, errors = train("--peft", "state", "--lr_init", "0.5")
    assert code == 2
    assert "lr_init 0.5" in errors
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


def test_a_run_goes_on_only_on_the_base_it_began_with_quantised_as_it_was(train):
    run = ("--peft", "lora", "--epoch_count", "2")
    assert train(*run, "--my_exit", "0", "--quant", "fp8")[0] == 0
    code, _, errors = train(*run)
    assert code == 2, errors
    assert "quant none" in errors
    assert "quant fp8" in errors


def test_an_optimizer_that_this_machine_cannot_run(mistake):
    assert "--optim adam8bit" in mistake("--optim", "paged_adam8bit")


def test_a_folder_given_as_the_model_is_called_a_folder(train, tmp_path):
    code, _, errors = train("--load_model", tmp_path)
    assert code == 2
    assert "names a folder, not a file" in errors
