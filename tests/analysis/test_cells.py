"""Cells: sums by group and question, however the rows are cut, and weighted means of them."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from personaspace.analysis.cells import NO_CELL, STRIP, Cells, selection


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 60), offset=st.sampled_from([0.0, 1e4]))
def test_any_partition_gives_the_means_of_the_rows(seed: int, rows: int, offset: float) -> None:
    generator = np.random.default_rng(seed)
    x_ND = (offset + generator.normal(size=(rows, 5))).astype(np.float32)
    cell_N = generator.integers(-1, 4, size=rows)
    cut = int(generator.integers(0, rows + 1))
    parts = []
    for part in (slice(0, cut), slice(cut, None)):
        shift_D = x_ND[part].mean(0) if len(x_ND[part]) else np.zeros(5, np.float32)
        parts.append(Cells.empty(4, shift_D))
        parts[-1].add(x_ND[part], cell_N[part])
    whole, other = parts
    whole.merge(other)
    mean_VD, count_V = whole.vectors(selection([np.array([cell]) for cell in range(4)], 4))
    for cell in range(4):
        members = cell_N == cell
        assert count_V[cell] == members.sum()
        if members.any():
            expected = x_ND[members].mean(0, dtype=np.float64)
            np.testing.assert_allclose(mean_VD[cell] + whole.shift_D, expected, atol=1e-6 * (1 + offset))
        else:
            assert np.isnan(mean_VD[cell]).all()


def test_a_cell_named_twice_counts_twice() -> None:
    cells = Cells.empty(2, np.zeros(1, np.float32))
    cells.add(np.array([[1.0], [3.0], [8.0]], np.float32), np.array([0, 0, 1]))
    mean_VD, count_V = cells.vectors(selection([np.array([0, 1]), np.array([0, 1, 1])], 2))
    assert mean_VD[:, 0].tolist() == pytest.approx([4.0, 5.0])
    assert count_V.tolist() == [3, 4]


def test_rows_of_no_cell_are_passed_over() -> None:
    cells = Cells.empty(1, np.zeros(2, np.float32))
    cells.add(np.full((3, 2), np.nan, np.float32), np.full(3, NO_CELL))
    assert cells.count_C.tolist() == [0]
    assert (cells.sum_CD == 0).all()


def test_merging_takes_little_memory() -> None:
    """Far less than the sums themselves, which are gigabytes where there are many roles and questions."""
    hidden, count = 4 * STRIP, 2000
    draw = np.random.default_rng(0)
    cells, other = (Cells.empty(count, draw.normal(size=hidden).astype(np.float32)) for _ in range(2))
    other.count_C[:] = 1
    tracemalloc.start()
    cells.merge(other)
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert taken < 1.2 * cells.sum_CD.nbytes
