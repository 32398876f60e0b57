"""Rows of preferred answers: the tokens are those of instruction tuning, what is shared is there once."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkvpeft.config.groups import DataConfig
from rwkvpeft.data import parallel
from rwkvpeft.data.conversation import segments, tokenise
from rwkvpeft.data.jsonl import Record, blocks
from rwkvpeft.data.loader import BatchPlan, TrainLoader, evaluation_batches
from rwkvpeft.data.pair_files import open_pairs, open_pairs_split
from rwkvpeft.data.pair_source import JsonlPairs, PairSource
from rwkvpeft.data.pairs import PairRows
from rwkvpeft.data.preview import preview
from rwkvpeft.data.prompts import held_out_prompts
from rwkvpeft.data.row import apart
from rwkvpeft.data.tokenizer import load_tokenizer
from rwkvpeft.data.voices import Spoken, VoiceTable
from rwkvpeft.errors import UserError

TOKENIZERS = ("bytes", "world")


def rows_of(*records, tokenizer="bytes", ctx_len=10_000, answers=2, mask_think=False):
    made = [Record(line, record) for line, record in enumerate(records, start=1)]
    source = PairSource("in.jsonl", made, load_tokenizer(tokenizer), unpaired=answers == 3)
    rows = PairRows(source, ctx_len, seed=1, shuffle=False, answers=answers, mask_think=mask_think)
    rows.tokenizer = tokenizer
    return rows


def pair(prompt, chosen, rejected, **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def instruction_tuned(messages, tokenizer):
    """The tokens of a conversation and which of them are trained as the last answer, as instruction tuning has it."""
    table = VoiceTable()
    tokens, codes = tokenise(segments({"messages": messages}), load_tokenizer(tokenizer), table)
    return tokens, (Spoken(codes, table.voices).answers(last_only=True) > 0).tolist()


def documents(row):
    """Of each answer of a row its whole document, and which of the tokens are scored."""
    shared, *answers = apart(row)
    return [
        ([*shared.input_ids.tolist(), *answer.input_ids.tolist(), int(answer.labels[-1])],
         [False] * (len(shared.input_ids) + 1) + (answer.weights > 0).tolist())
        for answer in answers if len(answer.input_ids)
    ]


texts = st.text(st.sampled_from("aA4 .\n:\u00e9\u4e2d"), max_size=12)
words = texts.filter(lambda text: text.strip())
turns = st.lists(st.tuples(texts, words), max_size=2)


@settings(deadline=None)
@given(turns, texts, words, words, st.sampled_from(TOKENIZERS))
def test_shared_part_and_answer_are_the_document_of_instruction_tuning(earlier, question, chosen, rejected, tokenizer):
    asked = [{"role": role, "content": text} for one, other in earlier for role, text in (("user", one),
                                                                                         ("assistant", other))]
    asked.append({"role": "user", "content": question})
    expected = [
        instruction_tuned([*asked, {"role": "assistant", "content": answer}], tokenizer)
        for answer in (chosen, rejected)
    ]
    if expected[0] == expected[1]:
        return
    dataset = rows_of(pair(asked, chosen, rejected), tokenizer=tokenizer)
    assert documents(dataset.row(0)) == expected


@given(words, words)
def test_the_shared_part_ends_one_token_before_what_differs_or_is_scored(chosen, rejected):
    if chosen.strip() == rejected.strip():
        return
    row = rows_of(pair("2+2?", chosen, rejected), tokenizer="bytes").row(0)
    shared, *answers = apart(row)
    assert len(shared.input_ids) == len("User: 2+2?\n\nAssistant:") - 1
    assert [int(answer.input_ids[0]) for answer in answers] == [int(shared.labels[-1])] * 2
    assert not shared.weights.any()


def test_answers_to_prompts_that_differ_share_what_their_documents_begin_with():
    chosen = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "x"}]
    rejected = [{"role": "user", "content": "abd"}, {"role": "assistant", "content": "y"}]
    row = rows_of({"chosen": chosen, "rejected": rejected}).row(0)
    assert bytes(next(apart(row)).input_ids.tolist()) == b"User: a"
    assert documents(row) == [instruction_tuned(turns, "bytes") for turns in (chosen, rejected)]


def test_answers_may_share_nothing():
    chosen = [{"role": "system", "content": "a"}, {"role": "assistant", "content": "x"}]
    rejected = [{"role": "user", "content": "b"}, {"role": "assistant", "content": "y"}]
    row = rows_of({"chosen": chosen, "rejected": rejected}).row(0)
    assert row.lengths[0] == 0
    assert rows_of(pair("q", "a", "b"), {"chosen": chosen, "rejected": rejected}).sharing_nothing() == [1]
    assert documents(row) == [instruction_tuned(turns, "bytes") for turns in (chosen, rejected)]


def test_an_answer_is_cut_where_it_is_ctx_len_tokens_with_its_prompt():
    dataset = rows_of(pair("2+2?", "4" * 50, "5"), ctx_len=30)
    shared, chosen, rejected = (len(part.input_ids) for part in apart(dataset.row(0)))
    assert shared + chosen == 30
    assert shared + rejected == len("User: 2+2?\n\nAssistant: 5")
    assert "1 rows have an answer longer" in dataset.report().render()


def test_a_pair_is_left_out_if_the_cut_leaves_nothing_to_score_or_to_tell_apart():
    dataset = rows_of(pair("a", "x", "y"), pair("a" * 50, "x", "y"), pair("b", "x" * 20 + "y", "x" * 21), ctx_len=30)
    assert [dataset.label(index) for index in range(len(dataset))] == ["in.jsonl:1"]
    assert dataset.report().empty_rows == 2
    assert "2 records left out" in dataset.report().render()


def test_lengths_are_the_tokens_of_each_row():
    dataset = rows_of(pair("a", "x", "yes"), pair("a longer one", "x" * 40, "y"), ctx_len=40, answers=3)
    assert dataset.lengths.tolist() == [len(dataset.row(index).input_ids) for index in range(2)]
    assert dataset.longest_row == max(dataset.lengths)
    assert dataset.crowded_row == dataset.row(int(dataset.lengths.argmax())).lengths


def test_thoughts_are_not_scored_where_that_is_asked():
    record = pair("a", "<think>b</think>c", "d")
    (tokens, is_scored), _ = documents(rows_of(record, mask_think=True).row(0))
    assert bytes(token for token, scored in zip(tokens, is_scored, strict=True) if scored) == b" <think></think>c\0"


def test_identical_answers_are_left_out_with_a_note():
    dataset = rows_of(pair("a", "x", "y"), pair("b", "x ", "x"))
    assert len(dataset) == 1
    assert dataset.report().notes == ("1 pair is left out, chosen and rejected being the same: in.jsonl:2",)


def test_data_of_identical_answers_alone_are_refused():
    with pytest.raises(UserError, match="holds no pair that can be learned from"):
        rows_of(pair("a", "x", "x"))


def test_an_empty_file_is_refused(file):
    file.write_text("\n")
    with pytest.raises(UserError, match="holds no pair") as error:
        opened(file)
    assert error.value.found == "no record"


def test_a_bad_record_is_refused_with_its_line():
    with pytest.raises(UserError, match=r'in.jsonl:2: field "chosen" is an empty answer'):
        rows_of(pair("a", "x", "y"), pair("a", "", "y"))


# kto


def labelled(prompt, answer, label):
    return {"prompt": prompt, "completion": answer, "label": label}


def test_a_single_answer_has_an_empty_one_beside_it():
    dataset = rows_of(labelled("a", "x", True), labelled("b", "y", False), answers=3)
    lengths = [dataset.row(index).lengths for index in range(2)]
    assert [[length > 0 for length in row] for row in lengths] == [[True, True, False, True], [True, False, True, True]]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_the_mismatched_answer_is_that_of_another_prompt_behind_this_one(tokenizer):
    dataset = rows_of(labelled("a", "good", True), labelled("b", "bad", False), answers=3, tokenizer=tokenizer)
    mismatched = [documents(dataset.row(index))[-1] for index in range(2)]
    asked = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "bad"}],
             [{"role": "user", "content": "b"}, {"role": "assistant", "content": "good"}]]
    assert mismatched == [instruction_tuned(messages, tokenizer) for messages in asked]


def test_rows_with_nothing_to_compare_with_are_told():
    assert "3 of 3 rows" in rows_of(*(pair("a", str(n), "no") for n in range(3)), answers=3).report().render()
    assert "rows have" not in rows_of(pair("a", "x", "no"), pair("b", "x", "no"), answers=3).report().render()


def test_an_answer_to_the_same_prompt_is_not_mismatched():
    dataset = rows_of(*(pair("a", str(n), "no") for n in range(5)), pair("b", "x", "y"), answers=3)
    mismatched = [bytes(documents(dataset.row(index))[2][0][-3:]) for index in range(6)]
    assert all(ending in (b" x\0", b" y\0") for ending in mismatched[:5])
    assert mismatched[5] not in (b" x\0", b" y\0")


def test_one_record_alone_has_no_mismatched_answer():
    assert rows_of(pair("a", "x", "y"), answers=3).row(0).lengths[3] == 0


@given(st.lists(st.tuples(words, words), min_size=2, max_size=6), st.integers(22, 60))
def test_a_mismatched_answer_is_cut_as_others_are(answers, ctx_len):
    records = [labelled(f"{n}{prompt}", answer, True) for n, (prompt, answer) in enumerate(answers)]
    dataset = rows_of(*records, ctx_len=ctx_len, answers=3)
    for index in range(len(dataset)):
        lengths = dataset.row(index).lengths
        assert lengths[0] + max(lengths[1:]) <= ctx_len
        assert sum(lengths) == dataset.lengths[index]


# batches


PAIRS = [pair(f"{n}+{n}?", f"{2 * n}", f"{'no' * n}, {n}") for n in range(1, 12)]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in PAIRS))
    return path


def opened(file, answers=2, **change):
    config = DataConfig(data_file=str(file), tokenizer="bytes", **change)
    return open_pairs(config, ctx_len=100, vocab_size=256, seed=3, answers=answers)


def same(left, right):
    tensors = (name for name, part in left._asdict().items() if isinstance(part, torch.Tensor))
    return (
        all(torch.equal(getattr(left, name), getattr(right, name)) for name in tensors)
        and left.shared.lengths == right.shared.lengths
        and left.answers.lengths == right.answers.lengths
    )


@pytest.mark.parametrize("answers", [2, 3])
def test_a_batch_is_its_rows_shared_parts_first(file, answers):
    dataset = opened(file, answers)
    rows = [list(apart(dataset.row(index))) for index in range(4)]
    batch = next(iter(evaluation_batches(dataset, 4)))
    assert batch.shared.lengths == tuple(len(row[0].input_ids) for row in rows)
    assert batch.answers.lengths == tuple(len(part.input_ids) for row in rows for part in row[1:])
    assert batch.shared_ids[0].tolist() == [token for row in rows for token in row[0].input_ids.tolist()]
    for name in ("input_ids", "labels", "weights"):
        expected = np.concatenate([getattr(part, name) for row in rows for part in row[1:]])
        assert np.array_equal(getattr(batch, name)[0].numpy(), expected)
    assert batch.reference is None


def test_a_batch_weighs_its_pairs_and_the_scored_tokens_of_chosen_answers(file):
    batch = next(iter(evaluation_batches(opened(file, data_shuffle=0), 3)))
    # " 2", " 4", " 6" and their ends
    assert batch.step_weight.tolist() == [3, 9]


def test_for_kto_each_answer_is_an_example():
    dataset = rows_of(labelled("a", "xy", True), labelled("b", "y", False), pair("c", "x", "y"), answers=3)
    assert next(iter(evaluation_batches(dataset, 3))).step_weight.tolist() == [4, 7]


def test_a_batch_that_only_fills_up_weighs_nothing(file):
    _, behind = (list(evaluation_batches(opened(file), 8, rank, 2, equally_many=True)) for rank in range(2))
    _, filling = (list(evaluation_batches(opened(file), 4, rank, 2, equally_many=True)) for rank in range(2))
    assert [batch.step_weight[0] for batch in behind] == [3]
    assert [batch.step_weight.tolist()[0] for batch in filling] == [4, 0]


def test_reference_log_probabilities_go_with_their_rows(file):
    dataset = opened(file)
    dataset.reference = np.arange(22, dtype=np.float64).reshape(11, 2)
    batch = list(evaluation_batches(dataset, 4))[1]
    assert batch.reference.dtype == torch.float32
    assert batch.reference.tolist() == [[8, 9], [10, 11], [12, 13], [14, 15]]


def batches(dataset, begin=0, end=6, **workers):
    return list(TrainLoader(dataset, BatchPlan(micro_bsz=2, epoch_steps=6, accumulate=2), begin, end, **workers))


def test_workers_give_the_same_batches(file):
    dataset = opened(file, 3)
    dataset.reference = np.zeros((11, 3), dtype=np.float32)
    assert all(map(same, batches(dataset), batches(dataset, num_workers=2)))


def test_a_process_that_is_started_anew_gets_the_same_rows(file):
    dataset = opened(file, 3)
    copy = pickle.loads(pickle.dumps(dataset))
    assert all(map(same, evaluation_batches(dataset, 4), evaluation_batches(copy, 4)))


def test_a_run_goes_on_from_any_batch(file):
    whole = batches(opened(file))
    assert all(map(same, whole[3:], batches(opened(file), begin=3)))
    assert whole[3].step_weight[0] == 4


# files


def test_a_split_keeps_copies_on_one_side(file):
    file.write_text(file.read_text() * 2)
    config = DataConfig(data_file=str(file), tokenizer="bytes")
    trained, held_out = open_pairs_split(config, 5, ctx_len=100, vocab_size=256, seed=0, answers=2)
    sides = [{str(documents(side.row(index))) for index in range(len(side))} for side in (trained, held_out)]
    assert len(held_out) >= 5
    assert sides[0]
    assert not sides[0] & sides[1]


@pytest.mark.parametrize("answers", [2, 3])
def test_a_split_keeps_records_with_the_same_prompt_on_one_side(tmp_path, answers):
    path = tmp_path / "asked_often.jsonl"
    path.write_text("".join(
        json.dumps({"prompt": f"q{number // 4}", "chosen": f"good {number}", "rejected": f"bad {number}"}) + "\n"
        for number in range(80)
    ))  # fmt: skip
    config = DataConfig(data_file=str(path), tokenizer="bytes")
    split = open_pairs_split(config, 0.2, ctx_len=100, vocab_size=256, seed=0, answers=answers)
    trained, held_out = ([side.label(index) for index in range(len(side))] for side in split)
    lines = [{int(label.rpartition(":")[2]) for label in side} for side in (trained, held_out)]
    assert [len(side) for side in lines] == [64, 16]
    assert not {(line - 1) // 4 for line in lines[0]} & {(line - 1) // 4 for line in lines[1]}


def test_a_split_that_leaves_no_prompt_to_train_on_is_refused(tmp_path):
    path = tmp_path / "one_prompt.jsonl"
    path.write_text("".join(
        json.dumps({"prompt": "q", "chosen": f"good {number}", "rejected": "bad"}) + "\n" for number in range(4)
    ))  # fmt: skip
    config = DataConfig(data_file=str(path), tokenizer="bytes")
    with pytest.raises(UserError, match="records with one prompt stay together"):
        open_pairs_split(config, 1, ctx_len=100, vocab_size=256, seed=0, answers=2)


def test_blocks_and_processes_change_nothing(file, monkeypatch):
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:4], "", json.dumps(pair("a", "x", "x")), *lines[4:]]))
    whole = JsonlPairs(str(file), load_tokenizer("bytes"), unpaired=False)
    monkeypatch.setattr(parallel, "blocks", lambda path: blocks(path, 200))
    monkeypatch.setattr(parallel, "_suitable_workers", lambda path: 2)
    parts = JsonlPairs(str(file), load_tokenizer("bytes"), unpaired=False)
    assert np.array_equal(parts.stream, whole.stream)
    assert np.array_equal(parts.parts, whole.parts)
    assert parts.label(4) == whole.label(4) == f"{file}:7"
    assert parts.notes == whole.notes
    assert whole.notes[0].endswith(f"{file}:6")


def test_a_bad_line_behind_other_blocks_has_its_number(file, monkeypatch):
    file.write_text(file.read_text() + "nonsense\n")
    monkeypatch.setattr(parallel, "blocks", lambda path: blocks(path, 200))
    with pytest.raises(UserError, match=r"pairs.jsonl:12: not valid JSON"):
        opened(file)


def test_labels_are_lines(file):
    dataset = opened(file, data_shuffle=0)
    assert dataset.labels(12) == [f"{file}:2"]
    assert TrainLoader(dataset, BatchPlan(2, 3), 0, 3).labels(range(1, 2)) == [f"{file}:3", f"{file}:4"]


@pytest.mark.parametrize("answers", [2, 3])
def test_a_pair_of_a_step_that_is_looked_at_alone_is_its_prompt_with_the_chosen_answer(file, answers):
    dataset = opened(file, answers, data_shuffle=0)
    found = list(TrainLoader(dataset, BatchPlan(2, 3), 0, 3).documents(range(1)))
    assert [label for label, _ in found] == [f"{file}:1", f"{file}:2"]
    for index, (_, batch) in enumerate(found):
        tokens, scored = documents(dataset.row(index))[0]
        assert batch.sequences is None
        assert batch.input_ids.tolist() == [tokens[:-1]]
        assert (batch.weights > 0).tolist() == [scored[1:]]


def test_csv_as_rwkv_lm_rlhf_writes_it_is_read(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text('prompt,chosen,reject\n2+2?,4,"5,\nI think"\n')
    (chosen, _), (rejected, _) = documents(opened(path).row(0))
    assert bytes(chosen) == b"User: 2+2?\n\nAssistant: 4\0"
    assert bytes(rejected) == b"User: 2+2?\n\nAssistant: 5,\nI think\0"


def test_parquet_is_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "pairs.parquet"
    turns = [[{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": text}] for text in "45"]
    parquet.write_table(pyarrow.Table.from_pylist([{"chosen": turns[0], "rejected": turns[1]}]), path)
    assert bytes(documents(opened(path).row(0))[0][0]) == b"User: 2+2?\n\nAssistant: 4\0"


def test_files_are_mixed_by_their_shares(file, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(pair("a", "b", "c")) + "\n")
    mixed = opened(f"{file}:3,{other}:1")
    drawn = [mixed.labels(position)[0].startswith(str(other)) for position in range(8)]
    assert sum(drawn) == 2
    mixed.reference = np.arange(24, dtype=np.float32).reshape(12, 2)
    assert mixed.reference.tolist()[-1] == [22, 23]
    assert next(iter(evaluation_batches(mixed, 12))).reference.tolist()[-1] == [22, 23]
    assert "mixed:" in mixed.report().render()


def test_data_of_tokens_are_refused(tmp_path):
    with pytest.raises(UserError, match="reads records"):
        opened(tmp_path / "tokens", data_type="binidx")


def test_data_that_are_all_too_long_are_refused(file):
    config = DataConfig(data_file=str(file), tokenizer="bytes")
    with pytest.raises(UserError, match="anything to score in both answers within --ctx_len 10"):
        open_pairs(config, ctx_len=10, vocab_size=256, seed=0, answers=2)


# what people see


def test_a_preview_shows_the_prompt_once_and_what_is_scored(file):
    shown = preview(opened(file, data_shuffle=0), 1)
    assert f"sample 0: {file}:1, 31 tokens, 10 trained" in shown
    assert "prompt: User: 1+1?\n\nAssistant:\nchosen:⟦ 2<end>⟧\nrejected:⟦ no, 1<end>⟧\n" in shown


def test_a_preview_shows_answers_that_share_nothing_in_full():
    chosen = [{"role": "system", "content": "a"}, {"role": "assistant", "content": "x"}]
    rejected = [{"role": "user", "content": "b"}, {"role": "assistant", "content": "y"}]
    shown = preview(rows_of({"chosen": chosen, "rejected": rejected}), 1)
    assert "chosen: System: a\n\nAssistant:⟦ x<end>⟧\nrejected: User: b\n\nAssistant:⟦ y<end>⟧" in shown


def test_the_report_asks_what_was_held_out():
    found = held_out_prompts(rows_of(pair("2+2?", "4", "5")), load_tokenizer("bytes"), 3)
    assert [(prompt.text, prompt.expected) for prompt in found] == [("User: 2+2?\n\nAssistant:", "4")]
