"""Windows and micro-batches: complete, within budget, and the same whatever order the rows came in."""

import random

from hypothesis import given
from hypothesis import strategies as st

from personaspace.extract.packing import MicroBatch, batch_by_length, padding_waste, windows

LENGTHS = st.dictionaries(st.integers(0, 500), st.integers(0, 120), max_size=60)
BUDGET = st.integers(16, 300)


@given(LENGTHS, BUDGET)
def test_every_row_is_in_one_batch(lengths: dict[int, int], budget: int) -> None:
    batches = batch_by_length(lengths, budget)
    assert sorted(row for batch in batches for row in batch) == sorted(lengths)
    assert all(batches)


@given(LENGTHS, BUDGET)
def test_padded_tokens_stay_within_the_budget_unless_a_row_is_alone(lengths: dict[int, int], budget: int) -> None:
    for batch in batch_by_length(lengths, budget):
        assert len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= budget


@given(LENGTHS, BUDGET, st.randoms(use_true_random=False))
def test_batches_do_not_depend_on_the_order_of_the_rows(
    lengths: dict[int, int], budget: int, shuffler: random.Random
) -> None:
    shuffled = list(lengths.items())
    shuffler.shuffle(shuffled)
    assert batch_by_length(dict(shuffled), budget) == batch_by_length(lengths, budget)


@given(LENGTHS, BUDGET)
def test_longest_first(lengths: dict[int, int], budget: int) -> None:
    ordered = [row for batch in batch_by_length(lengths, budget) for row in batch]
    assert ordered == sorted(lengths, key=lambda row: (-lengths[row], row))


def test_a_long_row_runs_alone() -> None:
    assert batch_by_length({0: 10, 1: 99, 2: 10, 3: 5}, 20) == [(1,), (0, 2), (3,)]


@given(st.lists(st.integers(), unique=True), st.integers(1, 50), st.integers(1, 300))
def test_windows_cover_all_units_in_order(unit_order: list[int], unit_rows: int, window_rows: int) -> None:
    cut = windows(unit_order, unit_rows, window_rows)
    assert [unit for window in cut for unit in window] == unit_order
    assert all(cut)
    assert len({len(window) for window in cut[:-1]}) <= 1
    for window in cut[:-1]:
        assert len(window) == 1 or abs(len(window) * unit_rows - window_rows) <= unit_rows / 2


def test_windows() -> None:
    assert windows([4, 2, 0, 1, 3], 120, 250) == [(4, 2), (0, 1), (3,)]
    assert windows([1, 0], 120, 10) == [(1,), (0,)]


def test_padding_waste() -> None:
    lengths = {0: 10, 1: 5, 2: 5}
    assert padding_waste([(0, 1), (2,)], lengths) == 1 - 20 / 25
    assert padding_waste([(0,), (1, 2)], lengths) == 0
    assert padding_waste([], {}) == 0


@given(LENGTHS, BUDGET)
def test_sorting_wastes_no_more_than_one_batch_of_all(lengths: dict[int, int], budget: int) -> None:
    sorted_waste = padding_waste(batch_by_length(lengths, budget), lengths)
    assert 0 <= sorted_waste <= max(padding_waste([tuple(lengths)] if lengths else [], lengths), 0) + 1e-12


def test_wide_windows_waste_little() -> None:
    """The design's reason for windows: one unit of 120 rows wastes a fifth, a window of 3,840 rows 1-2%."""
    draw = random.Random(0)
    lengths = {row: 60 + min(512, int(draw.lognormvariate(5.3, 0.6))) for row in range(3840)}
    waste = {}
    for rows in (120, 3840):
        parts = [range(start, start + rows) for start in range(0, 3840, rows)]
        batches = [batch for part in parts for batch in batch_by_length({row: lengths[row] for row in part}, 16384)]
        waste[rows] = padding_waste(batches, lengths)
    assert waste[3840] < 0.02 < 0.1 < waste[120]


def test_micro_batch_counts_tokens() -> None:
    batch = MicroBatch(rows=(3, 1), token_ids=((1, 2, 3), (4,)), spans=((1, 3), (0, 1)))
    assert (batch.padded_length, batch.tokens) == (3, 4)
