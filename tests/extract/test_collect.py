"""From micro-batches to units: nothing missing, nothing doubled, and nothing that is not finite."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from personaspace.extract.collect import NON_FINITE, WindowBuffer, inspect_unit
from personaspace.store.errors import IntegrityError

LAYERS, HIDDEN = 4, 3
ALL = slice(0, LAYERS)


def means(row: int) -> NDArray[np.float32]:
    """Span means ``(L, D)`` that tell which row and layer they are."""
    return np.arange(LAYERS * HIDDEN, dtype=np.float32).reshape(LAYERS, HIDDEN) + 100 * row


def buffer_of(rows: list[int], *, non_finite: dict[int, float] | None = None) -> WindowBuffer:
    buffer = WindowBuffer(LAYERS, HIDDEN)
    values_BLD = np.stack([means(row) for row in rows])
    for row, value in (non_finite or {}).items():
        values_BLD[rows.index(row), 1, 2] = value
    buffer.add(rows[:2], values_BLD[:2])
    buffer.add(rows[2:], values_BLD[2:])
    return buffer


def test_rows_go_to_their_place_whatever_order_they_came_in() -> None:
    values, dropped = buffer_of([12, 9, 11, 10]).unit_values(slice(10, 13), {}, range(10, 13), ALL)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, np.stack([means(row) for row in (10, 11, 12)]))
    assert dropped == {}


def test_layers_count_from_the_first_of_the_stage() -> None:
    values, _ = buffer_of([0, 1, 2]).unit_values(slice(0, 3), {}, range(3), slice(1, 3))
    np.testing.assert_array_equal(values, np.stack([means(row)[1:3] for row in range(3)]))


def test_missing_row() -> None:
    with pytest.raises(IntegrityError, match=r"^rows \[11\] of the unit were never extracted$"):
        buffer_of([10, 12]).unit_values(slice(10, 13), {}, range(10, 13), ALL)


def test_row_that_comes_twice() -> None:
    with pytest.raises(IntegrityError, match=r"^row 10 was extracted twice in one window$"):
        buffer_of([10, 11, 10])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_row_is_dropped_whole(value: float) -> None:
    buffer = buffer_of([0, 1, 2], non_finite={1: value})
    values, dropped = buffer.unit_values(slice(0, 3), {}, range(3), ALL)
    assert dropped == {1: NON_FINITE} == {1: "non-finite activations"}
    assert np.isnan(values[1]).all()
    np.testing.assert_array_equal(values[[0, 2]], np.stack([means(0), means(2)]))


def test_dropped_and_padding_rows_are_nan() -> None:
    values, dropped = buffer_of([0, 2]).unit_values(slice(0, 5), {1: "empty response"}, range(3), ALL)
    assert dropped == {1: "empty response"}
    assert np.isnan(values).all(axis=(1, 2)).tolist() == [False, True, False, True, True]


@given(st.data())
def test_inspect_unit_finds_what_unit_values_said(data: st.DataObject) -> None:
    first, size = data.draw(st.integers(0, 50)), data.draw(st.integers(1, 8))
    planned = range(first, first + data.draw(st.integers(0, size)))
    fate = {row: data.draw(st.sampled_from(["sound", "empty response", "overflow"])) for row in planned}
    known = {row: reason for row, reason in fate.items() if reason == "empty response"}
    buffer = WindowBuffer(LAYERS, HIDDEN)
    for row in planned:
        if row not in known:
            buffer.add([row], np.where(fate[row] == "overflow", np.inf, means(row))[None])
    values, dropped = buffer.unit_values(slice(first, first + size), known, planned, ALL)
    assert dropped.keys() == {row for row, reason in fate.items() if reason != "sound"}
    assert inspect_unit(values, first, known, planned) == dropped


@pytest.mark.parametrize(
    ("known", "planned", "message"),
    [
        ({11: "empty response"}, range(10, 13), "row 11 holds values, but is not to be extracted"),
        ({}, range(10, 12), "row 12 holds values, but is not to be extracted"),
    ],
)
def test_inspect_unit_refuses_values_where_there_should_be_none(
    known: dict[int, str], planned: range, message: str
) -> None:
    values = np.stack([means(row) for row in (10, 11, 12)])
    with pytest.raises(IntegrityError, match=f"^{message}$"):
        inspect_unit(values, 10, known, planned)


def test_inspect_unit_refuses_half_a_row() -> None:
    values = np.stack([means(row) for row in (10, 11)])
    values[1, 0, 0] = np.nan
    with pytest.raises(IntegrityError, match=r"^row 11 is partly written$"):
        inspect_unit(values, 10, {}, range(10, 12))
