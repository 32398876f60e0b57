"""train.py --objective distill."""

from __future__ import annotations

import shutil

import pytest
import torch

from rwkvpeft.cli.teacher import main as teach
from rwkvpeft.models.shape import new_shape
from rwkvpeft.registry import MODELS, find


def save(path, version, vocab_size=256):
    torch.manual_seed(3)
    shape = new_shape(version, n_layer=2, n_embd=48, vocab_size=vocab_size, head_size=16)
    weights = find(MODELS, version, flag="").initial_weights(shape)
    torch.save({name: value + 0.05 * torch.randn_like(value) for name, value in weights.items()}, path)
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A wider model than the student, and of another version."""
    return save(tmp_path_factory.mktemp("t") / "teacher.pth", "x060")


@pytest.fixture(scope="module")
def labels(teacher, binidx_prefix, tmp_path_factory):
    folder = tmp_path_factory.mktemp("labels") / "folder"
    common = f"--model {teacher} --data_file {binidx_prefix} --tokenizer bytes --device cpu --output {folder}"
    assert teach([*common.split(), "--top_k", "64", "--dtype", "fp32"]) == 0
    return folder


@pytest.mark.parametrize("dataload", ["pad", "pack"])
def test_stored_labels_train_as_the_live_teacher_does(train, teacher, labels, tmp_path, dataload):
    losses = []
    for source in (teacher, labels):
        words = ("--objective", "distill", "--teacher", source, "--dataload", dataload)
        code, _, err = train(*words, "--proj_dir", tmp_path / source.name)
        assert code == 0, err
        path = tmp_path / source.name / "rwkv-0.pth"
        losses.append(torch.load(path, weights_only=True)["blocks.0.att.key.weight"])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-4)


def test_infinite_context_learns_from_a_live_teacher_and_logs_its_figures(train, teacher, tmp_path):
    code, _, err = train("--objective", "distill", "--teacher", teacher, "--infctx", "1", "--chunk_ctx", "16")
    assert code == 0, err
    assert "divergence" in (tmp_path / "out" / "loss_data.jsonl").read_text()


@pytest.mark.parametrize("peft", ["lora", "state"])
def test_adapters_and_states_learn_from_stored_labels(train, labels, peft):
    config = ["--peft_config", '{"r": 4, "lora_alpha": 8, "lora_dropout": 0}'] if peft == "lora" else []
    code, _, err = train("--objective", "distill", "--teacher", labels, "--peft", peft, *config)
    assert code == 0, err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--dataload", "get"], "windows"),
        (["--distill_temperature", "3"], "--distill_temperature 3 is not stored"),
        (["--distill_alpha", "1.5"], "--distill_alpha is out of range"),
        (["--teacher", "nowhere"], "nowhere"),
        (["--objective", "language_modelling"], "--teacher has no effect"),
    ],
)
def test_mistakes_are_refused(train, labels, words, said):
    code, _, err = train("--objective", "distill", "--teacher", labels, *words)
    assert code == 2
    assert said in err


def test_a_teacher_of_another_vocabulary_is_refused(train, tmp_path):
    code, _, err = train("--objective", "distill", "--teacher", save(tmp_path / "other.pth", "x070", 300))
    assert code == 2
    assert "another vocabulary" in err


def test_labels_of_other_data_are_refused(train, labels, jsonl_file, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(jsonl_file.read_text().replace("A dog does.", "A cat does."))
    code, _, err = train("--objective", "distill", "--teacher", labels, "--data_file", other)
    assert code == 2
    assert "not those of" in err


@pytest.mark.parametrize("words", [["--dataload", "pack"], ["--infctx", "1", "--chunk_ctx", "16"]])
@pytest.mark.parametrize("source", ["teacher", "labels"])
def test_a_run_that_goes_on_ends_with_the_same_weights(train, request, tmp_path, source, words):
    flags = ["--objective", "distill", "--teacher", request.getfixturevalue(source), "--epoch_steps", "3",
             "--save_steps", "1", *words]  # fmt: skip
    assert train(*flags)[0] == 0
    result = tmp_path / "out" / "rwkv-0.pth"
    expected = torch.load(result, weights_only=True)
    shutil.rmtree(tmp_path / "out" / "resume" / "step-00000003")
    result.unlink()
    code, out, err = train(*flags)
    assert code == 0, err
    assert "going on from" in out + err
    found = torch.load(result, weights_only=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_run_does_not_go_on_with_labels_of_another_teacher(train, labels, tmp_path):
    folder = tmp_path / "labels"
    shutil.copytree(labels, folder)
    flags = ["--objective", "distill", "--teacher", folder, "--epoch_steps", "2", "--save_steps", "1"]
    assert train(*flags)[0] == 0
    shutil.rmtree(tmp_path / "out" / "resume" / "step-00000002")
    index = folder / "index.json"
    index.write_text(index.read_text().replace('"teacher.pth"', '"another.pth"'))
    code, _, err = train(*flags)
    assert code == 2
    assert "teacher" in err


def test_a_run_without_a_teacher_does_not_look_for_labels_where_it_was_started(train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train("--peft", "lora")[0] == 0
    (tmp_path / "index.json").write_text("something else")
    code, _, err = train("--peft", "lora")
    assert code == 0, err
