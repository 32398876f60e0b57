"""Log-probabilities of continuations, against direct sums."""

from __future__ import annotations

import pytest
import torch

from rwkvpeft.checkpoints.files import save_tensors
from rwkvpeft.checkpoints.load import load_model
from rwkvpeft.data.tokenizer import load_tokenizer
from rwkvpeft.generation.scoring import Pair, Scorer, encode_pair, has_tuned_state
from rwkvpeft.models.shape import new_shape
from rwkvpeft.registry import MODELS, find

PAIRS = [
    Pair([0, 5, 6], [7]),
    Pair([0, 5, 6], [8]),
    Pair([0], [1, 2, 3, 4, 5, 6, 7, 8, 9]),
    Pair([0, 9, 9, 9, 9, 9, 9, 9, 9], [1, 2]),
    Pair([3], []),
    Pair([3, 4], [5, 6]),
]


@pytest.fixture(scope="module", params=["x052", "x060", "x070"])
def model(request, tmp_path_factory):
    torch.manual_seed(1)
    shape = new_shape(request.param, n_layer=2, n_embd=16, vocab_size=12, head_size=8)
    weights = find(MODELS, request.param, flag="").initial_weights(shape)
    # initial weights give every token nearly the same chance
    weights |= {name: torch.randn_like(weights[name]) for name in ("emb.weight", "head.weight")}
    path = tmp_path_factory.mktemp("scoring") / "m.pth"
    save_tensors(path, weights)
    return load_model(path)


def direct(model, pair):
    tokens = torch.tensor([[*pair.context, *pair.continuation]])
    with torch.no_grad():
        logprobs = model(tokens)[0][0].log_softmax(-1)
    places = range(len(pair.context) - 1, tokens.shape[1] - 1)
    found = [logprobs[place, token].item() for place, token in zip(places, pair.continuation, strict=True)]
    greedy = all(
        int(logprobs[place].argmax()) == token for place, token in zip(places, pair.continuation, strict=True)
    )
    return sum(found), greedy


@pytest.mark.parametrize("tokens_at_once", [1, 4, 20, 8192])
def test_scores_are_direct_sums_however_rows_are_batched_and_cut(model, tokens_at_once):
    scores = Scorer(model, tokens_at_once=tokens_at_once).score(PAIRS)
    for pair, score in zip(PAIRS, scores, strict=True):
        logprob, greedy = direct(model, pair)
        assert score.logprob == pytest.approx(logprob, abs=2e-5)
        assert score.is_greedy == greedy


def test_the_likeliest_continuation_is_greedy(model):
    tokens = [0, 5]
    for _ in range(4):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens]))[0][0, -1].argmax()))
    assert Scorer(model).score([Pair(tokens[:2], tokens[2:])])[0].is_greedy
    wrong = [*tokens[2:5], (tokens[5] + 1) % 12]
    assert not Scorer(model).score([Pair(tokens[:2], wrong)])[0].is_greedy


def test_rows_of_equal_tokens_are_read_once(model, monkeypatch):
    read = []
    hidden = type(model).hidden
    monkeypatch.setattr(type(model), "hidden", lambda self, tokens, *rest: (
        read.append(tuple(tokens.shape)), hidden(self, tokens, *rest))[1])
    Scorer(model).score([Pair([0, 1, 2], [token]) for token in range(4)])
    assert read == [(1, 3)]


def test_every_pair_is_reported_done_once(model):
    done = []
    Scorer(model, tokens_at_once=8).score(PAIRS, done.append)
    assert sum(done) == len(PAIRS)


@pytest.mark.parametrize(
    ("context", "continuation", "border"),
    [("Answer:", " yes", "Answer:"), ("Answer: ", "yes", "Answer:"), ("a\n\n", "b", "a"), ("", "abc", "")],
)
def test_a_pair_is_cut_where_the_context_ends(context, continuation, border):
    world = load_tokenizer("world")
    pair = encode_pair(world, context, continuation)
    assert pair.context[0] == 0
    assert world.decode(pair.context) == border
    assert world.decode([*pair.context, *pair.continuation]) == context + continuation


def test_a_token_across_the_border_is_scored():
    world = load_tokenizer("world")
    joined = world.encode("hello")
    assert len(joined) == 1
    pair = encode_pair(world, "hel", "lo")
    assert (list(pair.context), list(pair.continuation)) == ([0], joined)


def test_without_a_prefix_only_an_empty_context_begins_with_token_0():
    tokenizer = load_tokenizer("bytes")
    assert encode_pair(tokenizer, "a", "b", prefix=False) == Pair([97], [98])
    assert encode_pair(tokenizer, "", "b", prefix=False) == Pair([0], [98])


def test_a_tuned_state_is_seen(model):
    assert not has_tuned_state(model)
    model.blocks[0].att.time_state = torch.nn.Parameter(torch.zeros(2, 8, 8))
    assert has_tuned_state(model)
    model.blocks[0].att.time_state = None
