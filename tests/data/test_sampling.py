import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkvpeft.data.loader import BatchPlan
from rwkvpeft.data.sampling import magic_prime_window, permute, random_start, sample_index

# seed 42, two passes over ten samples, as this package has always drawn them
FIRST_TWENTY = [4, 0, 8, 1, 2, 9, 6, 5, 3, 7, 6, 7, 3, 8, 9, 1, 5, 4, 2, 0]


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 300), st.integers(-1, 2**70), st.integers(0, 5))
def test_every_pass_holds_each_sample_once(n, seed, passed):
    order = [sample_index(passed * n + index, n, seed, shuffle=True) for index in range(n)]
    assert sorted(order) == list(range(n))


def test_passes_and_seeds_have_orders_of_their_own():
    orders = {
        tuple(sample_index(passed * 50 + i, 50, seed, shuffle=True) for i in range(50))
        for passed in range(5)
        for seed in range(5)
    }
    assert len(orders) == 25


def test_without_shuffling_every_pass_is_in_the_order_of_the_file():
    assert [sample_index(position, 3, 7, shuffle=False) for position in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_the_order_never_changes_between_versions():
    assert [sample_index(position, 10, 42, shuffle=True) for position in range(20)] == FIRST_TWENTY


def test_every_sample_comes_first_about_equally_often():
    counts = Counter(permute(0, 5, key) for key in range(5000))
    assert all(abs(counts[index] - 1000) < 150 for index in range(5))


def test_pairs_of_neighbours_are_about_equally_frequent():
    counts = Counter((permute(0, 4, key), permute(1, 4, key)) for key in range(6000))
    assert len(counts) == 12
    assert max(counts.values()) < 640
    assert min(counts.values()) > 360


def test_a_huge_file_costs_no_memory():
    n = 10**15
    assert len({sample_index(position, n, 1, shuffle=True) for position in range(100)}) == 100


def test_random_starts_reach_both_ends_and_nothing_beyond():
    starts = [random_start(position, 9, seed=3) for position in range(2000)]
    assert set(starts) == set(range(10))
    assert max(Counter(starts).values()) < 260


@pytest.mark.golden
def test_windows_follow_the_order_of_rwkv_lm(golden):
    for row in json.loads((golden / "sample_order.json").read_text())["rows"]:
        position = row["real_epoch"] * 40320 + row["idx"] * row["world_size"] + row["rank"]
        assert magic_prime_window(position, row["magic_prime"]) * row["ctx_len"] == row["token_offset"]


@pytest.mark.golden
@pytest.mark.parametrize("micro_bsz", [1, 4])
def test_the_ranks_of_a_step_together_read_the_windows_rwkv_lms_ranks_read(golden, micro_bsz):
    for row in json.loads((golden / "sample_order.json").read_text())["rows"]:
        world_size, prime = row["world_size"], row["magic_prime"]
        epoch_steps = 40320 // (micro_bsz * world_size)
        batch = row["real_epoch"] * epoch_steps + row["idx"] // micro_bsz
        plans = [
            BatchPlan(micro_bsz=micro_bsz, epoch_steps=epoch_steps, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        windows = {magic_prime_window(position, prime) for plan in plans for position in plan.positions(batch)}
        assert row["token_offset"] // row["ctx_len"] in windows


@pytest.mark.golden
def test_a_magic_prime_visits_every_window_once(golden):
    for cycle in json.loads((golden / "sample_order.json").read_text())["full_cycles"]:
        prime = cycle["magic_prime"]
        assert [magic_prime_window(i, prime) for i in range(prime)] == cycle["chunk_order_ii_1_to_p"]
