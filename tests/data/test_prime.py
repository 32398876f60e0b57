"""The prime of the window order."""

from __future__ import annotations

import json

import pytest

from rwkvpeft.data.prime import is_prime, magic_prime


@pytest.mark.golden
def test_the_prime_is_upstreams(golden):
    for row in json.loads((golden / "magic_prime_table.json").read_text()):
        assert magic_prime(row["data_size"], row["ctx_len"]) == row["magic_prime"], row


def test_the_prime_exists_from_three_windows_on():
    assert magic_prime(3 * 64 - 1, 64) is None
    assert magic_prime(3 * 64, 64) == 2


def test_primes_up_to_two_hundred():
    by_definition = [n for n in range(2, 200) if all(n % d for d in range(2, n))]
    assert [n for n in range(-3, 200) if is_prime(n)] == by_definition
