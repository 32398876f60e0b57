import json
import pickle
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkvpeft.config.groups import DataConfig
from rwkvpeft.data.binidx import write_binidx
from rwkvpeft.data.dataset import open_dataset
from rwkvpeft.data.mixing import Mixture
from rwkvpeft.errors import UserError

shares = st.lists(st.fractions(Fraction(1, 20), 50, max_denominator=20), min_size=1, max_size=5)


@given(shares, st.integers(0, 10**7))
def test_up_to_any_position_each_part_has_its_share(given_shares, positions):
    mixture = Mixture(given_shares)
    total = sum(given_shares)
    counts = [mixture.count(part, positions) for part in range(len(given_shares))]
    assert sum(counts) == positions
    for count, share in zip(counts, given_shares, strict=True):
        # shares finer than a millionth are rounded
        assert abs(count - positions * share / total) < len(given_shares) + positions * 1e-6


@given(shares)
def test_each_part_counts_its_positions_without_a_gap(given_shares):
    mixture = Mixture(given_shares)
    seen = Counter()
    for position in range(200):
        part, index = mixture.place(position)
        assert index == seen[part] == mixture.count(part, position)
        seen[part] += 1


@given(shares, st.integers(0, 500))
def test_a_pass_ends_with_the_last_row_of_the_first_part(given_shares, count):
    mixture = Mixture(given_shares)
    end = mixture.first_with(count)
    assert mixture.count(0, end) == count
    assert count == 0 or mixture.count(0, end - 1) == count - 1


def test_shares_of_one_batch_are_even():
    mixture = Mixture([Fraction(3), Fraction(1)])
    assert all(sum(mixture.place(4 * batch + row)[0] for row in range(4)) == 1 for batch in range(20))


@pytest.fixture
def config(tmp_path):
    """Documents of part a begin with 1 to 8, those of part b, one of them jsonl, with letters."""
    write_binidx(tmp_path / "a", [np.array([number] * (number + 1) + [0]) for number in range(1, 9)])
    lines = [json.dumps({"text": letter * (1 + place)}) for place, letter in enumerate("KLMNO")]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    return DataConfig(data_file=f"{tmp_path}/a:3,{tmp_path}/b.jsonl:1", tokenizer="bytes")


def open_rows(config, ctx_len=12, seed=3):
    return open_dataset(config, ctx_len=ctx_len, vocab_size=256, seed=seed)


def firsts(dataset, positions):
    return [int(dataset.sample(position).input_ids[0]) for position in positions]


@pytest.mark.parametrize("dataload", ["pad", "only"])
def test_each_part_is_drawn_by_its_share_and_in_its_own_passes(config, dataload):
    dataset = open_rows(replace(config, dataload=dataload))
    drawn = firsts(dataset, range(64))
    of_a, of_b = [first for first in drawn if first < 9], [first for first in drawn if first >= 9]
    assert (len(of_a), len(of_b)) == (48, 16)
    assert all(sorted(of_a[begin : begin + 8]) == list(range(1, 9)) for begin in range(0, 48, 8))
    assert all(sorted(of_b[begin : begin + 5]) == sorted(b"KLMNO") for begin in range(0, 15, 5))
    assert of_a[:8] != of_a[8:16]


def test_a_pass_holds_the_first_part_once(config):
    dataset = open_rows(config)
    drawn = firsts(dataset, range(dataset.pass_rows))
    assert sorted(first for first in drawn if first < 9) == list(range(1, 9))


def test_all_rows_are_those_of_the_parts(config):
    dataset = open_rows(config)
    assert [int(dataset.row(index).input_ids[0]) for index in range(len(dataset))] == [*range(1, 9), *b"KLMNO"]


def test_documents_of_a_pass_are_drawn_by_share_and_then_packed(config):
    dataset = open_rows(replace(config, dataload="pack"))
    drawn, position = Counter(), 0
    # six passes of the first part need twice as many as the second has, with more rows in some passes than in others
    while drawn[1] < 6 or sum(drawn[first] for first in range(1, 9)) < 48:
        row = dataset.sample(position)
        starts = np.cumsum([0, *row.lengths[:-1]])
        drawn.update(row.input_ids[starts].tolist())
        position += 1
    assert all(drawn[first] == 6 for first in range(1, 9))
    assert all(drawn[letter] in (3, 4) for letter in b"KLMNO")
    again = pickle.loads(pickle.dumps(open_rows(replace(config, dataload="pack"))))
    assert again.sample(position - 1).input_ids.tolist() == dataset.sample(position - 1).input_ids.tolist()


def test_windows_are_mixed_by_share(tmp_path):
    for name, tokens in (("a", range(1, 100)), ("b", range(101, 180))):
        write_binidx(tmp_path / name, [np.array([*tokens, 0])])
    files = f"{tmp_path}/a:1,{tmp_path}/b:2"
    dataset = open_rows(DataConfig(data_file=files, tokenizer="bytes", dataload="get"), ctx_len=8)
    drawn = firsts(dataset, range(300))
    assert sum(first > 100 for first in drawn) == 200


def test_the_order_of_one_magic_prime_does_not_serve_several_files(config):
    with pytest.raises(UserError, match="magic_prime"):
        open_rows(replace(config, dataload="get", magic_prime=5))


def test_the_report_tells_how_often_each_part_is_seen(config):
    text = open_rows(config).report().render()
    assert "a 75 % of what is drawn, 1 x in a pass" in text
    assert "b.jsonl 25 % of what is drawn, 0.4 x in a pass" in text
