"""From micro-batches to units: nothing missing, nothing doubled, nothing of other tokens, and nothing not finite.

Shape suffixes: Z sites, L layers, S segments of a rollout, D hidden, G layers of a group.
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from personaspace.extract.collect import NON_FINITE, Expected, WindowBuffer, inspect_shard_values, shard_values
from personaspace.extract.packing import MicroBatch, Segment, token_hash
from personaspace.extract.pooling import HostCopy
from personaspace.extract.reductions import ArrayPlace
from personaspace.extract.stage import OUT_OF_MEMORY, StageOutput
from personaspace.store.errors import IntegrityError
from personaspace.store.schema import ArraySpec

SITES, LAYERS, HIDDEN = 2, 4, 3
SEGMENTS: tuple[Segment, ...] = ((2, 6), (1, 2))
PLAIN = ArrayPlace(spec=ArraySpec(name="resid_post_mean", description=""), site=0, segments=slice(0, 1))
"""Where the first sum of each rollout is found."""
ALL = slice(0, LAYERS)


def tokens(row: int) -> tuple[int, ...]:
    return tuple(range(row, row + 7))


def sums(row: int, segments: int = len(SEGMENTS)) -> NDArray[np.float32]:
    """Sums ``(Z, L, S, D)`` that tell which row and place they are of."""
    shape = (SITES, LAYERS, segments, HIDDEN)
    return 1000.0 * row + np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def means(row: int) -> NDArray[np.float32]:
    lengths_S = np.array([stop - start for start, stop in SEGMENTS], dtype=np.float32)
    return sums(row) / lengths_S[:, None]


def batch_of(rows: list[int]) -> MicroBatch:
    return MicroBatch(
        rows=tuple(rows), token_ids=tuple(tokens(row) for row in rows), segments=tuple(SEGMENTS for _ in rows)
    )


def output_of(*parts: list[int], failed: dict[int, str] | None = None) -> StageOutput:
    """What a stage gives that has run these parts of a micro-batch."""
    copies = [
        (batch_of(rows), HostCopy(torch.from_numpy(np.concatenate([sums(row) for row in rows], axis=2))))
        for rows in parts
    ]
    return StageOutput(hidden_BTD=None, copies=tuple(copies), failed=failed or {})


def buffer_of(*batches: list[int]) -> WindowBuffer:
    buffer = WindowBuffer()
    for rows in batches:
        buffer.add(batch_of(rows), output_of(rows))
    return buffer


def expected(rows: list[int]) -> dict[int, Expected]:
    return {row: Expected(token_hash=token_hash(tokens(row)), counts=(4, 1)) for row in rows}


def test_rows_are_found_whatever_order_they_came_in() -> None:
    found = buffer_of([12, 9], [11, 10]).means(expected([10, 11, 12]))
    assert list(found) == [10, 11, 12]
    for row, means_ZLSD in found.items():
        assert means_ZLSD.dtype == np.float32
        np.testing.assert_array_equal(means_ZLSD, means(row))


def test_units_are_asked_for_one_after_another() -> None:
    buffer = buffer_of([0, 1])
    assert list(buffer.means(expected([1]))) == [1]
    buffer.add(batch_of([2]), output_of([2]))
    np.testing.assert_array_equal(buffer.means(expected([0, 2]))[2], means(2))
    assert buffer.means({}) == {}


def test_missing_rows() -> None:
    with pytest.raises(IntegrityError, match=r"^rows \[11, 13\] of the unit were never extracted$"):
        buffer_of([10, 12]).means(expected([10, 11, 12, 13]))


@pytest.mark.parametrize("batches", [([10, 11], [12, 10]), ([10, 11, 10],)])
def test_row_that_comes_twice(batches: tuple[list[int], ...]) -> None:
    with pytest.raises(IntegrityError, match=r"^row 10 was extracted twice in one window$"):
        buffer_of(*batches)


def test_row_of_other_tokens() -> None:
    other = Expected(token_hash=token_hash((*tokens(11)[:-1], 0)), counts=(4, 1))
    with pytest.raises(IntegrityError, match=r"^row 11 was extracted from other tokens than its rollout has$"):
        buffer_of([10, 11]).means({**expected([10]), 11: other})


@pytest.mark.parametrize("counts", [(3, 1), (4, 1, 1), (4,), ()])
def test_row_of_other_spans(counts: tuple[int, ...]) -> None:
    other = Expected(token_hash=token_hash(tokens(11)), counts=counts)
    with pytest.raises(IntegrityError) as error:
        buffer_of([11]).means({11: other})
    assert str(error.value) == f"row 11: (4, 1) tokens were summed, and its spans have {counts}"


def test_rows_that_failed_and_rows_that_were_split_off() -> None:
    buffer = WindowBuffer()
    buffer.add(batch_of([1, 2, 3]), output_of([1], [3], failed={2: OUT_OF_MEMORY}))
    buffer.add(batch_of([4, 5]), output_of([4, 5]))
    assert buffer.split == {1, 2, 3}
    found = buffer.means(expected([1, 2, 3, 4, 5]))
    assert found.pop(2) == OUT_OF_MEMORY == "out of memory, even alone in its micro-batch"
    for row, means_ZLSD in found.items():
        np.testing.assert_array_equal(means_ZLSD, means(row))


def test_row_that_failed_with_other_tokens() -> None:
    buffer = WindowBuffer()
    buffer.add(batch_of([1]), output_of(failed={1: OUT_OF_MEMORY}))
    with pytest.raises(IntegrityError, match=r"^row 1 was extracted from other tokens than its rollout has$"):
        buffer.means({1: Expected(token_hash="", counts=(4, 1))})


def test_values_of_a_shard_are_one_site_some_layers_and_one_reduction() -> None:
    place = ArrayPlace(spec=PLAIN.spec, site=1, segments=slice(1, 2))
    values_RGD, dropped = shard_values(
        {row: means(row) for row in (10, 12)}, place, slice(1, 3), first_row=10, shape=(4, 2, HIDDEN)
    )
    assert values_RGD.dtype == np.float32
    assert dropped == {}
    np.testing.assert_array_equal(values_RGD[[0, 2]], np.stack([means(row)[1, 1:3, 1] for row in (10, 12)]))
    assert np.isnan(values_RGD[[1, 3]]).all()


def test_spans_lie_one_after_another_in_their_rollouts_places() -> None:
    place = ArrayPlace(spec=PLAIN.spec, site=0, segments=slice(1, None))
    found = {5: sums(5, segments=3), 6: sums(6, segments=1), 7: "the response is empty", 8: sums(8, segments=4)}
    values_PGD, dropped = shard_values(found, place, ALL, first_row=5, shape=(12, LAYERS, HIDDEN), capacity=3)
    assert dropped == {7: "the response is empty"}
    used = {0: (5, 1), 1: (5, 2), 9: (8, 1), 10: (8, 2), 11: (8, 3)}
    for number, values_GD in enumerate(values_PGD):
        if number in used:
            row, segment = used[number]
            np.testing.assert_array_equal(values_GD, found[row][0, :, segment])
        else:
            assert np.isnan(values_GD).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rollout_that_is_not_finite_is_dropped_whole(value: float) -> None:
    damaged = means(1)
    damaged[0, 1, 0, 2] = value
    found = {0: means(0), 1: damaged, 2: means(2)}
    values_RGD, dropped = shard_values(found, PLAIN, ALL, first_row=0, shape=(3, LAYERS, HIDDEN))
    assert dropped == {1: NON_FINITE} == {1: "non-finite activations"}
    assert np.isnan(values_RGD[1]).all()
    np.testing.assert_array_equal(values_RGD[[0, 2]], np.stack([means(row)[0, :, 0] for row in (0, 2)]))
    # Another array, or other layers, of the same rollout may be sound.
    assert shard_values(found, PLAIN, slice(2, 4), first_row=0, shape=(3, 2, HIDDEN))[1] == {}


@given(st.data())
def test_inspection_finds_what_was_written(data: st.DataObject) -> None:
    capacity = data.draw(st.integers(1, 3), "capacity")
    ragged = capacity > 1 or data.draw(st.booleans(), "ragged")
    first, size = data.draw(st.integers(0, 50), "first"), data.draw(st.integers(1, 6), "size")
    planned = range(first, first + data.draw(st.integers(0, size), "planned"))
    reasons = st.sampled_from(["sound", "the response is empty", OUT_OF_MEMORY, "overflow"])
    fate = {row: data.draw(reasons, f"fate {row}") for row in planned}
    known = {row: why for row, why in fate.items() if why == "the response is empty"}
    used = {row: data.draw(st.integers(0, capacity), f"used {row}") if ragged else 1 for row in planned}
    found: dict[int, NDArray[np.float32] | str] = {}
    for row, why in fate.items():
        if why == OUT_OF_MEMORY:
            found[row] = why
        elif row not in known:
            found[row] = sums(row, segments=1 + used[row]) + (np.inf if why == "overflow" else 0)
    place = ArrayPlace(spec=PLAIN.spec, site=0, segments=slice(1, None))
    shape = (size * capacity, LAYERS, HIDDEN)
    values_PGD, dropped = shard_values(found, place, ALL, first_row=first, shape=shape, capacity=capacity)
    assert dropped == {
        row: NON_FINITE if why == "overflow" else why
        for row, why in fate.items()
        if why == OUT_OF_MEMORY or (why == "overflow" and used[row])
    }
    inspected = inspect_shard_values(
        values_PGD,
        first_row=first,
        known_dropped=known,
        planned=planned,
        used=used if ragged else None,
        capacity=capacity,
    )
    # Why a rollout has no values is not in them; nor can one be missed that has no spans.
    lost = {row for row in dropped if used[row]}
    assert inspected == known | dict.fromkeys(lost, NON_FINITE)


def shard(rows: int) -> NDArray[np.float32]:
    return np.ones((rows, LAYERS, HIDDEN), dtype=np.float32)


@pytest.mark.parametrize(
    ("known", "planned", "message"),
    [
        ({11: "the response is empty"}, range(10, 13), "row 11 holds values, but is not to be extracted"),
        ({}, range(10, 12), "row 12 holds values, but is not to be extracted"),
    ],
)
def test_inspection_refuses_values_where_there_should_be_none(
    known: dict[int, str], planned: range, message: str
) -> None:
    with pytest.raises(IntegrityError, match=f"^{message}$"):
        inspect_shard_values(shard(3), first_row=10, known_dropped=known, planned=planned)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_inspection_refuses_half_a_row(value: float) -> None:
    values = shard(2)
    values[1, 0, 0] = value
    with pytest.raises(IntegrityError, match=r"^row 11 is partly written$"):
        inspect_shard_values(values, first_row=10, known_dropped={}, planned=range(10, 12))


@pytest.mark.parametrize(
    ("used", "message"),
    [
        ({10: 1, 11: 2}, "row 10 holds more spans than its rollout has"),
        ({10: 2}, "row 11 holds more spans than its rollout has"),
    ],
)
def test_inspection_refuses_more_spans_than_there_are(used: dict[int, int], message: str) -> None:
    with pytest.raises(IntegrityError, match=f"^{message}$"):
        inspect_shard_values(shard(4), first_row=10, known_dropped={}, planned=range(10, 12), used=used, capacity=2)


def test_inspection_refuses_fewer_spans_than_there_are() -> None:
    values = shard(4)
    values[1] = np.nan
    with pytest.raises(IntegrityError, match=r"^row 10 is partly written$"):
        inspect_shard_values(
            values, first_row=10, known_dropped={}, planned=range(10, 12), used={10: 2, 11: 2}, capacity=2
        )
