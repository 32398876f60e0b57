"""python -m rwkvpeft.generate --batch."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from rwkvpeft.adapters.build import build_adapter
from rwkvpeft.checkpoints.adapter import Recipe, save_adapter
from rwkvpeft.checkpoints.files import save_tensors
from rwkvpeft.checkpoints.load import load_model
from rwkvpeft.cli.generate import main
from rwkvpeft.cli.tuned_model import content_fingerprint
from rwkvpeft.data.pair_layouts import read_pair
from rwkvpeft.data.tables import read_table
from rwkvpeft.models.shape import new_shape
from rwkvpeft.registry import MODELS, find

RECORDS = [
    {"id": 1, "prompt": "What is red?", "chosen": "A colour."},
    {"id": 2, "prompt": [{"role": "user", "content": "Who barks?"}],
     "chosen": [{"role": "assistant", "content": "A dog."}]},
    {"id": 3, "prompt": "Why?", "chosen": "Because."},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(1)
    shape = new_shape("x070", n_layer=1, n_embd=16, vocab_size=256, head_size=8)
    weights = find(MODELS, "x070", flag="").initial_weights(shape)
    weights |= {name: torch.randn_like(weights[name]) for name in ("emb.weight", "head.weight")}
    path = tmp_path_factory.mktemp("model") / "m.pth"
    save_tensors(path, weights)
    return path


@pytest.fixture
def asked(tmp_path):
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


@pytest.fixture
def run(model, tmp_path, asked, capsys):
    """Call the command; returns code, rows of the output and what was said to standard error."""

    def call(*words, batch=asked, out="out.jsonl"):
        words = [str(word) for word in words]
        code = main(["--model", str(model), "--device", "cpu", "--batch", str(batch), "--output", str(tmp_path / out),
                     "--max_tokens", "12", "--seed", "5", "--top_p", "1", *words])
        return code, rows_of(tmp_path / out), capsys.readouterr().err

    return call


def open_pairs(path):
    return [read_pair(record.value, unpaired=False) for record in read_table(path)]


def rows_of(path):
    if not path.exists():
        return None
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file)) if path.suffix == ".csv" else [json.loads(line) for line in file]


def test_every_record_is_answered_in_order_with_its_own_fields(run):
    code, rows, _ = run()
    assert code == 0
    assert [{name: row[name] for name in ("id", "prompt", "chosen")} for row in rows] == RECORDS
    assert [row["seed"] for row in rows] == [5, 6, 7]
    assert all(set(row) == {"id", "prompt", "chosen", "answer", "seed", "ended", "tokens"} for row in rows)
    assert all(row["tokens"] == 12 or row["ended"] for row in rows)


def test_answers_do_not_depend_on_the_batch_size(run):
    assert run("--n", 4, "--batch_size", 1)[1] == run("--n", 4, "--batch_size", 5, out="other.jsonl")[1]


def test_an_answer_is_that_of_the_same_prompt_and_seed_alone(run, model, capsys):
    row = run()[1][2]
    main(["--model", str(model), "--device", "cpu", "--prompt", "User: Why?\n\nAssistant:", "--seed", str(row["seed"]),
          "--max_tokens", "12", "--top_p", "1"])
    assert capsys.readouterr().out.strip() == row["answer"]


def test_several_answers_to_a_question_are_numbered_and_differ(run):
    rows = run("--n", 3)[1]
    assert [(row["id"], row["sample"]) for row in rows] == [(i, j) for i in (1, 2, 3) for j in range(3)]
    assert len({row["answer"] for row in rows[:3]}) == 3
    assert len({row["seed"] for row in rows}) == 9


def test_lines_of_text_are_questions(run, tmp_path):
    (tmp_path / "asked.txt").write_text("What is red?\n\nWhy?\n")
    rows = run(batch=tmp_path / "asked.txt")[1]
    assert [row["prompt"] for row in rows] == ["What is red?", "Why?"]


def test_a_stop_text_ends_answers(run):
    whole = run("--max_tokens", 60)[1]
    letter = whole[0]["answer"][3]
    row = run("--max_tokens", 60, "--stop", letter, out="stopped.jsonl")[1][0]
    assert row["ended"]
    assert row["answer"] == whole[0]["answer"].partition(letter)[0].strip()


def test_an_adapter_changes_the_answers(run, model, tmp_path):
    tuned = load_model(model)
    adapter = build_adapter("lora", {})
    adapter.attach(tuned)
    trained = {name: tensor + torch.randn(tensor.shape) for name, tensor in adapter.trained_tensors(tuned).items()}
    save_adapter(tmp_path / "a.pth", trained, Recipe(method="lora", config=adapter.settings()))
    _, rows, said = run("--adapter", tmp_path / "a.pth", "--rejected", out="tuned.jsonl")
    assert rows != run("--rejected")[1]
    assert "--adapter" in said


@pytest.mark.parametrize("kept", [0, 1, 4, 8])
def test_a_run_that_was_stopped_goes_on_behind_its_complete_lines(run, tmp_path, kept):
    words = ("--n", 3, "--batch_size", 2)
    whole = run(*words, out="whole.jsonl")[1]
    run(*words)
    lines = (tmp_path / "out.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "out.jsonl").write_bytes(b"".join(lines[:kept]) + lines[kept][:9])
    # another number of slots gives the same answers
    code, rows, said = run("--n", 3, "--batch_size", 4)
    assert (code, rows) == (0, whole)
    assert ("going on" in said) == (kept > 0)


def test_without_a_seed_a_run_goes_on_with_the_one_it_drew(run, tmp_path):
    first = run("--seed", -1)[1]
    lines = (tmp_path / "out.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "out.jsonl").write_bytes(lines[0])
    assert run("--seed", -1)[1] == first


def test_a_complete_file_is_said_to_be_complete(run):
    run()
    code, _, said = run()
    assert code == 0
    assert "is complete" in said


@pytest.mark.parametrize("words", [["--temperature", "2"], ["--n", "2"], ["--seed", "9"], ["--stop", "x"]])
def test_answers_made_with_other_settings_are_not_gone_on_with(run, words):
    before = run()[1]
    code, rows, said = run(*words)
    assert (code, rows) == (2, before)
    assert "other settings" in said
    assert words[0].removeprefix("--") in said


def test_answers_to_other_questions_are_not_gone_on_with(run, asked):
    run()
    asked.write_text(asked.read_text().replace("Why?", "When?"))
    code, _, said = run()
    assert code == 2
    assert "batch" in said


@pytest.mark.slow
def test_ctrl_c_leaves_whole_answers_that_are_gone_on_with(run, model, asked, tmp_path):
    # long enough not to be over before the signal comes, on a machine that has other things to do
    words = ["--n", "80", "--batch_size", "2", "--max_tokens", "30"]
    command = [sys.executable, "-m", "rwkvpeft.generate", "--model", str(model), "--device", "cpu", "--batch",
               str(asked), "--output", str(tmp_path / "out.jsonl"), "--seed", "5", "--top_p", "1", *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while process.poll() is None and not (tmp_path / "out.jsonl").exists():
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    whole = run(*words, out="whole.jsonl")[1]
    assert process.returncode == 130
    assert "the same command goes on" in said
    assert "Traceback" not in said
    assert run(*words)[1] == whole


def test_pairs_are_made_of_chosen_answers_and_the_models_own(run):
    code, rows, _ = run("--rejected")
    assert code == 0
    assert [row["chosen"] for row in rows] == [record["chosen"] for record in RECORDS]
    assert all(set(row) == {"id", "prompt", "chosen", "rejected"} for row in rows)
    # in the form of the chosen answer
    assert isinstance(rows[0]["rejected"], str)
    assert rows[1]["rejected"][0]["role"] == "assistant"
    answers = run(out="answers.jsonl")[1]
    assert [rows[0]["rejected"], rows[1]["rejected"][0]["content"]] == [row["answer"] for row in answers[:2]]


def test_pairs_are_read_as_training_reads_them(run, tmp_path):
    whole = {"chosen": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}], "prompt": "a?"}
    records = [*RECORDS, whole, {"question": "c?", "chosen": {"role": "assistant", "content": "d"}, "rejected": "old"}]
    path = tmp_path / "chosen.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert run("--rejected", batch=path, out="pairs.jsonl")[0] == 0
    pairs = open_pairs(tmp_path / "pairs.jsonl")
    assert len(pairs) == 5
    assert {pair.rejected[-1].text for pair in pairs}.isdisjoint({"old", *(pair.chosen[-1].text for pair in pairs)})


def test_pairs_in_csv_have_the_columns_of_rwkv_lm_rlhf(run, tmp_path):
    (tmp_path / "asked.csv").write_text('prompt,chosen,reject\nWhat?,"This, ""that""",old\nWhy?,So.,\n')
    code, rows, _ = run("--rejected", batch=tmp_path / "asked.csv", out="pairs.csv")
    assert code == 0
    assert (tmp_path / "pairs.csv").read_text().startswith("prompt,chosen,reject\n")
    assert len(open_pairs(tmp_path / "pairs.csv")) == 2
    assert [(row["prompt"], row["chosen"]) for row in rows] == [("What?", 'This, "that"'), ("Why?", "So.")]
    assert rows[0]["reject"] not in ("old", "")


def test_an_answer_that_is_the_chosen_one_makes_no_pair(run, tmp_path):
    answers = [row["answer"] for row in run()[1]]
    records = [{**RECORDS[0], "chosen": answers[0] + " "}, RECORDS[1], {**RECORDS[2], "chosen": answers[2]}]
    path = tmp_path / "same.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    _, rows, said = run("--rejected", batch=path, out="pairs.jsonl")
    assert [row["id"] for row in rows] == [2]
    assert "2 left out" in said
    assert "is complete" in run("--rejected", batch=path, out="pairs.jsonl")[2]


@pytest.mark.parametrize(
    ("record", "words", "message"),
    [
        ({"id": 1}, [], "no prompt"),
        ({"prompt": "a", "answer": "b"}, [], "--answer_key"),
        ({"prompt": "a", "seed": 3}, [], '"seed"'),
        ({"prompt": "a\0"}, [], "NUL"),
        ({"prompt": "a"}, ["--rejected"], '"chosen"'),
        ({"chosen": "b"}, ["--rejected"], '"prompt"'),
        ({"prompt": "a", "chosen": " "}, ["--rejected"], '"chosen"'),
        ({"prompt": "a", "chosen": [{"role": "assistant"}]}, ["--rejected"], '"chosen"'),
        ({"prompt": "a", "chosen": "b", "raw": True}, ["--rejected"], "something else than pairs are trained with"),
        (
            {"prompt": "a", "chosen": [{"role": "user", "content": "z"}, {"role": "assistant", "content": "b"}]},
            ["--rejected"],
            "something else than pairs are trained with",
        ),
    ],
)
def test_a_bad_record_gives_one_message_with_its_line_and_no_output(run, asked, tmp_path, record, words, message):
    asked.write_text(asked.read_text() + json.dumps(record) + "\n")
    code, rows, said = run(*words)
    assert (code, rows) == (2, None)
    assert f"{asked}:4: " in said
    assert message in said
    assert "Traceback" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["asked.jsonl"]


def test_messages_do_not_go_into_csv(run, asked):
    code, _, said = run("--rejected", out="pairs.csv")
    assert code == 2
    assert f"{asked}:2: " in said


def test_the_questions_are_not_written_over(model, asked, capsys):
    before = asked.read_bytes()
    assert main(["--model", str(model), "--batch", str(asked), "--output", str(asked)]) == 2
    told = capsys.readouterr().err
    assert "would be written over the questions" in told
    assert "delete" not in told
    assert asked.read_bytes() == before


def test_csv_has_no_place_for_a_system_text(run, tmp_path):
    path = tmp_path / "with_system.jsonl"
    path.write_text(json.dumps({"prompt": "a", "chosen": "b", "system": "Be brief."}) + "\n")
    code, rows, said = run("--rejected", batch=path, out="pairs.csv")
    assert (code, rows) == (2, None)
    assert "has more" in said
    assert run("--rejected", batch=path, out="pairs.jsonl")[0] == 0


def test_a_folder_is_told_by_what_is_in_it(tmp_path):
    told = []
    for content in (b"a", b"b", b"a"):
        (tmp_path / "adapter_model.safetensors").write_bytes(content)
        told.append(content_fingerprint(tmp_path))
    assert told[0] == told[2] != told[1]


def test_another_name_for_the_answer_keeps_the_records_own(run, asked):
    asked.write_text('{"question": "a", "answer": "right"}\n')
    row = run("--answer_key", "said")[1][0]
    assert row["answer"] == "right"
    assert isinstance(row["said"], str)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "x", "--output", "o.jsonl"], "--output"),
        (["--chat", "--n", "2"], "--n"),
        (["--prompt", "x", "--rejected"], "--rejected"),
        (["--prompt", "x", "--batch_size", "2"], "--batch_size"),
        (["--batch", "q.txt"], "--output"),
        (["--batch", "q.txt", "--chat", "--output", "o.jsonl"], "only one"),
        (["--batch", "q.txt", "--output", "o.csv"], "--rejected"),
        (["--batch", "q.txt", "--output", "o"], ".jsonl"),
        (["--batch", "q.txt", "--output", "o.jsonl", "--n", "0"], "--n"),
        (["--batch", "q.txt", "--output", "o.jsonl", "--n", "2", "--temperature", "0"], "--n 2"),
        (["--batch", "q.txt", "--output", "o.jsonl", "--rejected", "--answer_key", "a"], "--answer_key"),
        (["--batch", "q.txt", "--output", "o.jsonl"], "q.txt"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(model, capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    assert main(["--model", str(model), *words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())
