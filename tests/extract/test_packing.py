"""Windows and micro-batches: complete, within budget, and the same whatever order the rows came in."""

import math
import pickle
import random
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, pairwise
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from personaspace.extract.config import Attention
from personaspace.extract.packing import (
    DUMMY_TOKEN,
    WASTE,
    MicroBatch,
    batch_by_length,
    chooses_packed,
    form_batches,
    pack_by_length,
    padding_waste,
    token_hash,
    windows,
)

LENGTHS = st.dictionaries(st.integers(0, 500), st.integers(1, 120), max_size=60)
BUDGET = st.integers(16, 300)
Rows = tuple[int, ...]
Group = Callable[[Mapping[int, int], int], list[Rows]]
BOTH = pytest.mark.parametrize("group", [batch_by_length, pack_by_length])


def padded(lengths: Mapping[int, int], rows: Sequence[int]) -> int:
    return len(rows) * max(lengths[row] for row in rows)


def waste(lengths: Mapping[int, int], batches: Sequence[Rows]) -> float:
    """Of padded micro-batches."""
    return padding_waste(
        [
            MicroBatch(rows=rows, token_ids=tuple((0,) * lengths[row] for row in rows), segments=((),) * len(rows))
            for rows in batches
        ]
    )


@BOTH
@given(LENGTHS, BUDGET)
def test_every_row_is_in_one_batch(group: Group, lengths: dict[int, int], budget: int) -> None:
    batches = group(lengths, budget)
    assert sorted(row for batch in batches for row in batch) == sorted(lengths)
    assert all(batches)


@pytest.mark.parametrize(
    ("group", "size"),
    [(batch_by_length, padded), (pack_by_length, lambda lengths, rows: sum(lengths[row] for row in rows))],
)
@given(LENGTHS, BUDGET)
def test_tokens_stay_within_the_budget_unless_a_row_is_alone(
    group: Group, size: Callable[[Mapping[int, int], Rows], int], lengths: dict[int, int], budget: int
) -> None:
    for batch in group(lengths, budget):
        assert len(batch) == 1 or size(lengths, batch) <= budget


@BOTH
def test_the_budget_may_be_used_up(group: Group) -> None:
    lengths = dict.fromkeys(range(3), 101)
    assert group(lengths, 303) == [(0, 1, 2)]
    assert len(group(lengths, 302)) == 2


@BOTH
@given(LENGTHS, BUDGET, st.randoms(use_true_random=False))
def test_batches_do_not_depend_on_the_order_of_the_rows(
    group: Group, lengths: dict[int, int], budget: int, shuffler: random.Random
) -> None:
    shuffled = list(lengths.items())
    shuffler.shuffle(shuffled)
    assert group(dict(shuffled), budget) == group(lengths, budget)


@BOTH
@given(LENGTHS, BUDGET)
def test_longest_first(group: Group, lengths: dict[int, int], budget: int) -> None:
    ordered = [row for batch in group(lengths, budget) for row in batch]
    assert ordered == sorted(lengths, key=lambda row: (-lengths[row], row))


@BOTH
def test_a_long_row_runs_alone(group: Group) -> None:
    assert group({0: 10, 1: 99, 2: 10, 3: 5}, 20) == [(1,), (0, 2), (3,)]
    assert group({0: 20, 1: 21}, 20) == [(1,), (0,)]
    assert group({}, 20) == []


@given(st.dictionaries(st.integers(0, 50), st.integers(1, 60), min_size=1, max_size=8), BUDGET)
def test_padding_and_number_of_batches_cost_least(lengths: dict[int, int], budget: int) -> None:
    """Of all ways to cut the sorted rows."""

    def cost(batches: Sequence[Rows]) -> float:
        return sum(padded(lengths, rows) + WASTE * budget for rows in batches)

    ordered = tuple(sorted(lengths, key=lambda row: (-lengths[row], row)))
    cuts = [
        [ordered[a:b] for a, b in pairwise((0, *inner, len(ordered)))]
        for many in range(len(ordered))
        for inner in combinations(range(1, len(ordered)), many)
    ]
    allowed = [cut for cut in cuts if all(len(rows) == 1 or padded(lengths, rows) <= budget for rows in cut)]
    assert math.isclose(cost(batch_by_length(lengths, budget)), min(cost(cut) for cut in allowed), abs_tol=1e-9)


@given(LENGTHS, BUDGET)
def test_a_packed_batch_is_left_only_for_a_row_that_does_not_fit(lengths: dict[int, int], budget: int) -> None:
    for batch, following in pairwise(pack_by_length(lengths, budget)):
        assert sum(lengths[row] for row in batch) + lengths[following[0]] > budget


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
    assert waste(lengths, [(0, 1), (2,)]) == 1 - 20 / 25
    assert waste(lengths, [(0,), (1, 2)]) == 0
    assert waste({}, []) == 0
    packed = form_batches({0: (1, 2), 1: (3,)}, {0: ((0, 1),), 1: ((0, 1),)}, 16, packed=True)
    assert padding_waste(packed) == 0


@given(LENGTHS, BUDGET)
def test_sorting_wastes_no_more_than_one_batch_of_all(lengths: dict[int, int], budget: int) -> None:
    sorted_waste = waste(lengths, batch_by_length(lengths, budget))
    assert 0 <= sorted_waste <= waste(lengths, [tuple(lengths)] if lengths else []) + 1e-12


def lognormal(rows: int, median: int, sigma: float, longest: int, seed: int) -> dict[int, int]:
    draw = random.Random(seed)
    return {row: max(1, min(longest, round(draw.lognormvariate(math.log(median), sigma)))) for row in range(rows)}


@pytest.mark.parametrize("sigma", [0.4, 0.6, 0.8, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_window_of_the_defaults_wastes_little(sigma: float, seed: int) -> None:
    lengths = lognormal(2048, 250, sigma, 2048, seed)
    batches = batch_by_length(lengths, 8192)
    assert waste(lengths, batches) <= 0.03
    # Bought with few more micro-batches than the tokens alone would fill.
    assert len(batches) <= 1.2 * sum(lengths.values()) / 8192


def test_wide_windows_waste_less() -> None:
    """The design's reason for windows: units of 120 rows, cut each for itself, waste several times as much."""
    lengths = {row: 60 + length for row, length in lognormal(3840, 200, 0.6, 512, 0).items()}
    wasted = {}
    for rows in (120, 3840):
        parts = [range(start, start + rows) for start in range(0, 3840, rows)]
        batches = [batch for part in parts for batch in batch_by_length({row: lengths[row] for row in part}, 16384)]
        wasted[rows] = waste(lengths, batches)
    assert wasted[3840] < 0.02 < 0.05 < wasted[120]


@st.composite
def micro_batches(draw: st.DrawFn) -> MicroBatch:
    lengths = draw(st.lists(st.integers(1, 20), min_size=1, max_size=6))
    segment = [st.tuples(st.integers(0, n - 1), st.integers(1, n)).filter(lambda s: s[0] < s[1]) for n in lengths]
    return MicroBatch(
        rows=tuple(draw(st.permutations(range(100, 100 + len(lengths))))),
        # Tokens that say which rollout they are of, and which token.
        token_ids=tuple(tuple(100 * number + token for token in range(n)) for number, n in enumerate(lengths)),
        segments=tuple(tuple(draw(st.lists(own, max_size=3))) for own in segment),
        packed=draw(st.booleans()),
    )


def lay_out(batch: MicroBatch) -> np.ndarray:
    """Token ids as they lie in the tensors; -1 is padding. Fails where two rollouts overlap."""
    laid_BT = np.full(batch.shape, -1)
    for (row, origin), ids in zip(batch.origins, batch.token_ids, strict=True):
        place = laid_BT[row, origin : origin + len(ids)]
        assert place.shape == (len(ids),)
        assert (place == -1).all()
        place[:] = ids
    return laid_BT


@given(micro_batches())
def test_where_rollouts_and_segments_lie(batch: MicroBatch) -> None:
    laid_BT = lay_out(batch)
    assert (laid_BT != -1).sum() == batch.tokens == sum(batch.lengths)
    if batch.packed:
        assert batch.shape == (1, batch.tokens)
        assert laid_BT[0].tolist() == [token for ids in batch.token_ids for token in ids]
    else:
        assert batch.shape == (len(batch.rows), max(batch.lengths))
        assert all(origin == 0 for _, origin in batch.origins)
    expected = [
        list(ids[start:stop])
        for ids, segments in zip(batch.token_ids, batch.segments, strict=True)
        for start, stop in segments
    ]
    assert [laid_BT[row, start:stop].tolist() for row, start, stop in batch.placed_segments] == expected


@given(micro_batches())
def test_a_batch_survives_its_way_to_a_worker(batch: MicroBatch) -> None:
    assert pickle.loads(pickle.dumps(batch)) == batch


@given(micro_batches(), st.data())
def test_dummies_keep_all_shapes_and_the_other_rollouts(batch: MicroBatch, data: st.DataObject) -> None:
    places = data.draw(st.frozensets(st.integers(0, len(batch.rows) - 1)))
    blanked = batch.blank(places)
    assert (blanked.shape, blanked.lengths, blanked.placed_segments) == (
        batch.shape,
        batch.lengths,
        batch.placed_segments,
    )
    for place, (ids, before) in enumerate(zip(blanked.token_ids, batch.token_ids, strict=True)):
        assert ids == ((DUMMY_TOKEN,) * len(before) if place in places else before)


@given(micro_batches(), st.data())
def test_a_part_is_the_batch_of_its_rollouts(batch: MicroBatch, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(batch.rows) - 1))
    stop = data.draw(st.integers(first + 1, len(batch.rows)))
    batch.placed_segments, batch.shape  # noqa: B018 - cached in the whole, and not to be found in the part
    part = batch.part(first, stop)
    assert part == MicroBatch(
        rows=batch.rows[first:stop],
        token_ids=batch.token_ids[first:stop],
        segments=batch.segments[first:stop],
        packed=batch.packed,
    )
    assert part.tokens == sum(batch.lengths[first:stop])
    assert len(part.placed_segments) == sum(len(segments) for segments in batch.segments[first:stop])
    rest = lay_out(batch)
    row, origin = batch.origins[first]
    rows, length = part.shape
    np.testing.assert_array_equal(lay_out(part), rest[row : row + rows, origin : origin + length])


def test_micro_batches() -> None:
    tokens = {3: (1, 2, 3), 1: (4,), 8: (5, 6, 7)}
    segments = {3: ((1, 3),), 1: ((0, 1), (0, 1)), 8: ((2, 3),)}
    assert form_batches(tokens, segments, 6, packed=False) == [
        MicroBatch(rows=(3, 8), token_ids=((1, 2, 3), (5, 6, 7)), segments=(((1, 3),), ((2, 3),))),
        MicroBatch(rows=(1,), token_ids=((4,),), segments=(((0, 1), (0, 1)),)),
    ]
    assert form_batches(tokens, segments, 7, packed=True) == [
        MicroBatch(
            rows=(3, 8, 1),
            token_ids=((1, 2, 3), (5, 6, 7), (4,)),
            segments=(((1, 3),), ((2, 3),), ((0, 1), (0, 1))),
            packed=True,
        )
    ]
    (whole,) = form_batches(tokens, segments, 7, packed=True)
    assert (whole.shape, whole.tokens, whole.lengths) == ((1, 7), 7, (3, 3, 1))
    assert whole.origins == ((0, 0), (0, 3), (0, 6))
    assert whole.placed_segments == ((0, 1, 3), (0, 5, 6), (0, 6, 7), (0, 6, 7))


def test_auto_packs_for_flash_attention() -> None:
    for attention in get_args(Attention):
        assert chooses_packed("packed", attention)
        assert not chooses_packed("padded", attention)
        assert chooses_packed("auto", attention) == (attention in ("flash_attention_2", "flash_attention_3"))


def test_token_hash_is_the_same_in_every_process() -> None:
    assert token_hash([1, 2, 3]) == "abccad42d03c940bc2b249bf5a4e1e3d"
    assert token_hash(()) == "cae66941d9efbd404e4d88758ea67670"


@given(st.lists(st.integers(0, 2**31 - 1)), st.lists(st.integers(0, 2**31 - 1)))
def test_token_hash(ids: list[int], others: list[int]) -> None:
    assert token_hash(ids) == token_hash(tuple(ids)) == token_hash(np.array(ids, dtype=np.int32).tolist())
    assert (token_hash(ids) == token_hash(others)) == (ids == others)
    assert token_hash([*ids, 0]) != token_hash(ids)
