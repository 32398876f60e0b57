"""Many answers side by side, against answers written one by one."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkvpeft.adapters.build import build_adapter
from rwkvpeft.checkpoints.files import save_tensors
from rwkvpeft.checkpoints.load import load_model
from rwkvpeft.checkpoints.quantised import Quantiser
from rwkvpeft.data.tokenizer import load_tokenizer
from rwkvpeft.errors import ContractError, UserError
from rwkvpeft.generation.batched import Request, decode
from rwkvpeft.generation.generate import TextGenerator
from rwkvpeft.generation.sampling import Sampler, SamplingConfig
from rwkvpeft.generation.stopping import StopTexts
from rwkvpeft.memory.dry_run import Tally
from rwkvpeft.models.shape import new_shape
from rwkvpeft.registry import MODELS, find

VOCABULARY = 256
GREEDY = SamplingConfig(temperature=0)
VARIED = SamplingConfig(temperature=1.3, top_p=0.95, presence_penalty=0.4, frequency_penalty=0.2)
CPU = torch.device("cpu")


def open_model(folder, version="x070", dtype=torch.float64, quantiser=None):
    torch.manual_seed(1)
    shape = new_shape(version, n_layer=2, n_embd=32, vocab_size=VOCABULARY, head_size=16)
    weights = find(MODELS, version, flag="").initial_weights(shape)
    # initial weights give every token nearly the same chance, whatever was read
    weights = {name: t + (1.0 if "emb" in name or "head" in name else 0.1) * torch.randn(t.shape)
               for name, t in weights.items()}
    save_tensors(folder / "m.pth", weights)
    return load_model(folder / "m.pth", dtype=dtype, quantiser=quantiser)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return open_model(tmp_path_factory.mktemp("batched"))


def tune(model, method):
    """Attach a disturbed adapter."""
    adapter = build_adapter(method, {})
    adapter.attach(model)
    with torch.no_grad():
        for tensor in adapter.trained_tensors(model).values():
            tensor.add_(0.3 * torch.randn(tensor.shape))
    return model.eval()


def some_prompts(lengths):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def one_by_one(model, request, sampling, max_tokens, end_token=0):
    """The tokens of one answer, read and drawn as a single text."""
    generator = TextGenerator(model, load_tokenizer("bytes"), chunk=7)
    sampler = Sampler(dataclasses.replace(sampling, seed=request.seed))
    logits, state = generator.read(request.tokens)
    tokens = []
    while len(tokens) < max_tokens:
        tokens.append(sampler.draw(logits))
        if tokens[-1] == end_token:
            break
        logits, state = generator.read(tokens[-1:], state)
    return tokens


def answers(model, requests, sampling=VARIED, **changes):
    """All answers by number."""
    asked = {"max_tokens": 12, "batch_size": 3, "end_token": 0, "prefill_tokens": 40, **changes}
    found = dict(decode(model, requests, sampling, **asked))
    assert sorted(found) == list(range(len(found)))
    return [found[number] for number in range(len(found))]


def requests_of(*lengths):
    return [Request(tokens, seed) for seed, tokens in enumerate(some_prompts(lengths))]


RAGGED = requests_of(1, 70, 5, 16, 33, 2, 100, 8)


@pytest.mark.parametrize("kind", ["plain", "lora", "state", "nf4"])
@pytest.mark.parametrize("version", ["x052", "x060", "x070"])
def test_greedy_answers_are_those_given_one_by_one(tmp_path, version, kind):
    quantiser = Quantiser("nf4", double=False, head=False, device=CPU) if kind == "nf4" else None
    model = open_model(tmp_path, version, torch.float32, quantiser)
    if kind in ("lora", "state"):
        tune(model, kind)
    expected = [one_by_one(model, request, GREEDY, 12) for request in RAGGED]
    assert len({tuple(tokens) for tokens in expected}) > 4
    assert [answer.tokens for answer in answers(model, RAGGED, GREEDY)] == expected


@pytest.mark.golden
@pytest.mark.parametrize("name", ["tiny_v5", "tiny_v6", "tiny_v7"])
def test_a_real_model_answers_as_it_does_one_by_one(golden, name):
    model = load_model(golden / f"{name}.pth", dtype=torch.float32)
    for sampling in (GREEDY, SamplingConfig(top_p=0.9)):
        expected = [one_by_one(model, request, sampling, 20) for request in RAGGED]
        assert [answer.tokens for answer in answers(model, RAGGED, sampling, max_tokens=20)] == expected


@pytest.mark.golden
@pytest.mark.parametrize("version", [5, 6, 7])
def test_greedy_answers_are_those_of_the_package_rwkv(golden, version):
    stored = np.load(golden / f"package_v{version}.npz")
    model = load_model(golden / f"tiny_v{version}.pth", dtype=torch.float32)
    prompt = stored["prompt_tokens"].tolist()
    requests = [Request(prompt, 0), *RAGGED, Request(prompt, 1)]
    found = answers(model, requests, GREEDY, max_tokens=64, end_token=None)
    assert found[0].tokens == found[-1].tokens == stored["greedy"].tolist()


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=7),
    seed=st.integers(0, 2**63),
    batch_size=st.integers(1, 8),
    prefill_tokens=st.integers(1, 300),
    end_token=st.sampled_from([None, 0, 77]),
    sampling=st.builds(
        SamplingConfig,
        temperature=st.sampled_from([0.0, 0.7, 1.5]),
        top_p=st.sampled_from([0.5, 1.0]),
        top_k=st.sampled_from([0, 5]),
        presence_penalty=st.sampled_from([0.0, 0.5]),
    ),
)
def test_an_answer_does_not_depend_on_what_else_is_answered(
    model, lengths, seed, batch_size, prefill_tokens, end_token, sampling
):
    requests = [Request(tokens, seed + number) for number, tokens in enumerate(some_prompts(lengths))]
    expected = [one_by_one(model, request, sampling, 9, end_token) for request in requests]
    found = answers(model, requests, sampling, max_tokens=9, batch_size=batch_size, prefill_tokens=prefill_tokens,
                    end_token=end_token)
    assert [answer.tokens for answer in found] == expected


def test_prompts_read_ahead_are_answered_as_others_are(model):
    prompts = some_prompts([1 + 7 * number % 30 for number in range(13)])
    requests = [Request(prompt, 10 * place + seed) for place, prompt in enumerate(prompts) for seed in range(3)]
    whole = [one_by_one(model, request, VARIED, 8, None) for request in requests]
    ends = [next((place for place, token in enumerate(tokens, 1) if token % 5 == 0), 8) for tokens in whole]
    assert len(set(ends)) > 5
    found = answers(model, requests, VARIED, max_tokens=8, batch_size=24, end_token=None,
                    stop=lambda number: lambda token: token % 5 == 0)
    assert [answer.tokens for answer in found] == [tokens[:end] for tokens, end in zip(whole, ends, strict=True)]


def test_samples_of_one_prompt_differ_by_their_seeds(model):
    prompt = some_prompts([20])[0]
    found = answers(model, [Request(prompt, seed) for seed in (1, 2, 3, 1)])
    first, second, third, again = (answer.tokens for answer in found)
    assert first == again
    assert len({tuple(first), tuple(second), tuple(third)}) == 3


def test_a_prompt_asked_several_times_is_read_once(model):
    first, second = some_prompts([20, 31])
    counts = []
    found = answers(model, [Request(prompt, seed) for prompt in (first, second) for seed in range(5)],
                    report=counts.append)
    assert counts[-1].prompt_tokens == 20 + 31
    assert counts[-1].answers == 10
    assert counts[-1].tokens == sum(len(answer.tokens) for answer in found)


def test_log_probabilities_are_the_models_own_at_the_temperature(model):
    sampling = dataclasses.replace(VARIED, top_k=20)
    for request, answer in zip(RAGGED, answers(model, RAGGED, sampling), strict=True):
        read = torch.tensor([[*request.tokens, *answer.tokens[:-1]]])
        with torch.no_grad():
            logits = model(read)[0][0, len(request.tokens) - 1 :] / sampling.temperature
        expected = logits.log_softmax(1).gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(answer.logprobs, dtype=torch.float64), expected, rtol=1e-5, atol=1e-5)


def test_an_answer_that_ends_by_itself_holds_its_end(model):
    request = RAGGED[1]
    written = one_by_one(model, request, GREEDY, 6, None)
    end = written[3]
    ended, cut = (answers(model, [request], GREEDY, max_tokens=n, end_token=end)[0] for n in (6, 3))
    assert (ended.tokens, ended.ended) == (written[: written.index(end) + 1], True)
    assert (cut.tokens, cut.ended) == (written[:3], end in written[:3])


def test_a_stop_text_ends_an_answer_and_is_cut_off(model):
    tokenizer = load_tokenizer("bytes")
    written = answers(model, RAGGED, VARIED, max_tokens=30)
    text = tokenizer.decode(written[0].tokens)
    stop = StopTexts(tokenizer, [text[10:12], "never said"])
    stopped = answers(model, RAGGED, VARIED, max_tokens=30, stop=stop)[0]
    assert stopped.ended
    assert stopped.tokens == written[0].tokens[: len(stopped.tokens)]
    assert stop.text(stopped.tokens) == text[: text.index(text[10:12])]
    assert len(stopped.tokens) < len(written[0].tokens)


@pytest.mark.parametrize(("count", "max_tokens"), [(40, 4), (7, 150)])
def test_memory_depends_on_the_slots_alone(model, count, max_tokens):
    """The most that all tensors take at once, measured, is that of as many short answers as there are slots."""

    def peak(count, max_tokens):
        requests = [Request(tokens, seed) for seed, tokens in enumerate(some_prompts([9] * count))]
        with Tally([*model.parameters(), *model.buffers()]) as tally:
            answers(model, requests, max_tokens=max_tokens, end_token=None, batch_size=3)
        return max(moment.bytes for moment in tally.worst.values())

    # while other prompts are read there are states beside those of the slots
    assert peak(count, max_tokens) <= peak(6, 4)


def test_long_prompts_take_no_more_tokens_at_once_than_allowed(model, monkeypatch):
    read = []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda tokens, *rest: read.append(tokens.shape) or hidden(tokens, *rest))
    answers(model, requests_of(100, 300, 7), prefill_tokens=64)
    assert max(shape[1] for shape in read) <= 64


def test_requests_are_taken_as_slots_become_free(model):
    taken = []

    def asked():
        for request in RAGGED:
            taken.append(request)
            yield request

    found = decode(model, asked(), VARIED, max_tokens=5, batch_size=2, end_token=0)
    next(found)
    assert len(taken) == 2
    found.close()


def test_weights_can_be_trained_after_answering(model):
    answers(model, RAGGED[:2])
    logits, _ = model(torch.tensor([[1, 2, 3]]))
    logits.sum().backward()
    assert model.head.weight.grad is not None
    model.zero_grad()


def test_no_request_is_no_answer(model):
    assert answers(model, []) == []


def test_a_model_in_training_mode_is_refused(model):
    model.train()
    try:
        with pytest.raises(ContractError, match="evaluation mode"):
            answers(model, RAGGED)
    finally:
        model.eval()


def test_a_prompt_without_tokens_is_refused(model):
    with pytest.raises(ContractError, match="without tokens"):
        answers(model, [Request([], 1)])


def test_head_qk_is_refused(model, monkeypatch):
    monkeypatch.setattr(model, "shape", dataclasses.replace(model.shape, head_qk=8))
    with pytest.raises(UserError, match="headQK"):
        answers(model, RAGGED)
