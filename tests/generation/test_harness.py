"""A model in lm_eval. Tasks here read local files only."""

from __future__ import annotations

import json
import math

import pytest
import torch

from rwkvpeft.checkpoints.files import save_tensors
from rwkvpeft.generation.tuned import load_tuned
from rwkvpeft.models.shape import new_shape
from rwkvpeft.registry import MODELS, find

pytest.importorskip("lm_eval")

from rwkvpeft.cli.evaluate import main
from rwkvpeft.generation.harness import RwkvLm

QUESTIONS = [
    {"question": "2+2=", "choices": ["4", "five"], "answer": 0},
    {"question": "a b ", "choices": ["c", "dd"], "answer": 1},
]
CHOICES = """
task: own_choices
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list: [{metric: acc}]
"""


class Request:
    def __init__(self, *args):
        self.args = args


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("harness")
    shape = new_shape("x070", n_layer=1, n_embd=16, vocab_size=256, head_size=8)
    weights = find(MODELS, "x070", flag="").initial_weights(shape)
    weights |= {name: torch.randn_like(weights[name]) for name in ("emb.weight", "head.weight")}
    # it answers in letters
    weights["head.weight"][: ord("a")] = weights["head.weight"][ord("z") :] = 0
    save_tensors(folder / "m.pth", weights)
    (folder / "test.json").write_text("\n".join(json.dumps(question) for question in QUESTIONS))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "own.yaml").write_text(CHOICES.replace("FILE", str(folder / "test.json")))
    return folder


@pytest.fixture(scope="module")
def tuned(folder):
    return load_tuned(folder / "m.pth", device="cpu")


def direct(tuned, text, scored):
    """Log-probability of the last ``scored`` bytes of a text behind token 0."""
    tokens = torch.tensor([[0, *text.encode()]])
    with torch.no_grad():
        logprobs = tuned.model(tokens)[0][0].log_softmax(-1)
    places = range(tokens.shape[1] - 1 - scored, tokens.shape[1] - 1)
    return sum(logprobs[place, int(tokens[0, place + 1])].item() for place in places)


def test_likelihoods_are_those_of_the_continuation_after_its_context(tuned):
    found = RwkvLm(tuned).loglikelihood([Request("ab", "cd"), Request("", "xyz"), Request("ab ", "c")])
    expected = [direct(tuned, "abcd", 2), direct(tuned, "xyz", 3), direct(tuned, "ab c", 2)]
    assert [logprob for logprob, _ in found] == pytest.approx(expected, abs=1e-4)


def test_a_whole_text_is_scored_however_long_it_is(tuned):
    text = "the quick brown fox " * 20
    found = RwkvLm(tuned, tokens_at_once=64).loglikelihood_rolling([Request(text)])
    assert found == pytest.approx([direct(tuned, text, len(text))], rel=1e-5)


def test_an_answer_is_greedy_and_ends_before_a_stop_text(tuned):
    model = RwkvLm(tuned)
    whole = model.generate_until([Request("ab", {"until": [], "max_gen_toks": 8})])[0]
    assert model.loglikelihood([Request("ab", whole)])[0][1]
    stop = whole[3:5]
    cut = model.generate_until([Request("ab", {"until": [stop], "max_gen_toks": 8})])[0]
    assert cut == whole[: whole.index(stop)]


def test_a_dialogue_is_written_in_the_world_layout(tuned):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert RwkvLm(tuned).apply_chat_template(turns) == "System: Be brief.\n\nUser: Hi\n\nAssistant:"


@pytest.mark.slow
def test_the_command_runs_a_task_of_ones_own(folder, tuned, capsys):
    words = ["--model", str(folder / "m.pth"), "--device", "cpu", "--tasks", "own_choices"]
    assert main([*words, "--task_folder", str(folder / "tasks"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["tasks"]["own_choices"]
    right = 0
    for question in QUESTIONS:
        spaces = len(question["question"]) - len(question["question"].rstrip())
        scores = [direct(tuned, question["question"] + choice, len(choice) + spaces) for choice in question["choices"]]
        right += scores[question["answer"]] == max(scores)
    assert found["acc"] == right / 2
    assert math.isfinite(found["acc_stderr"])


@pytest.mark.slow
def test_a_task_that_nobody_knows_is_refused(folder, capsys):
    words = ["--model", str(folder / "m.pth"), "--device", "cpu", "--tasks", "own_choicse"]
    assert main([*words, "--task_folder", str(folder / "tasks")]) == 2
    assert "own_choices" in capsys.readouterr().err
