"""One pass over a layer: blocks, parts, and their merging."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from personaspace.analysis.summary import Rows, summarise, summary_bytes

CELLS = 3


def rows_of(row_N: np.ndarray, unit_rows: int = 4, seed: int = 0) -> Rows:
    generator = np.random.default_rng(seed)
    return Rows(
        row_N=row_N,
        cell_N=generator.integers(-1, CELLS, size=len(row_N)),
        pooled_N=generator.random(len(row_N)) < 0.7,
        cells=CELLS,
        unit_rows=unit_rows,
    )


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), count=st.integers(1, 60), most=st.integers(1, 30), unit_rows=st.integers(1, 9))
def test_blocks_hold_every_row_once_and_cut_no_unit(seed: int, count: int, most: int, unit_rows: int) -> None:
    row_N = np.sort(np.random.default_rng(seed).choice(80, size=count, replace=False))
    rows = rows_of(row_N, unit_rows)
    blocks = list(rows.blocks(most))
    assert np.concatenate([block.row_N for block in blocks]).tolist() == row_N.tolist()
    assert np.concatenate([block.cell_N for block in blocks]).tolist() == rows.cell_N.tolist()
    units = [set((block.row_N // unit_rows).tolist()) for block in blocks]
    assert sum(map(len, units)) == len(set.union(*units)), "a unit is in one block only"
    assert all(len(block.row_N) <= most or len(unit) == 1 for block, unit in zip(blocks, units, strict=True))


@settings(deadline=None, max_examples=25)
@given(parts=st.integers(1, 5), layer=st.integers(0, 1))
def test_parts_merge_into_the_whole(parts: int, layer: int) -> None:
    values = np.random.default_rng(1).normal(100, 1, size=(9000, 2, 6)).astype(np.float32)
    row_N = np.flatnonzero(np.arange(9000) % 7 > 0)
    rows = rows_of(row_N)
    split = rows.parts(parts)
    assert np.concatenate([part.row_N for part in split]).tolist() == row_N.tolist()
    whole = summarise(values, layer, split[0])
    before = whole.cells.sum_CD.copy()
    for part in split[1:]:
        merged = whole.merged(summarise(values, layer, part))
        np.testing.assert_array_equal(whole.cells.sum_CD, before)
        whole, before = merged, merged.cells.sum_CD.copy()
    x_ND = values[row_N, layer].astype(np.float64)
    pooled_ND = x_ND[rows.pooled_N]
    np.testing.assert_allclose(whole.moments.mean_D, pooled_ND.mean(0), rtol=1e-6)
    np.testing.assert_allclose(whole.moments.covariance(), np.cov(pooled_ND.T), rtol=1e-4, atol=1e-4)
    for cell in range(CELLS):
        mean_D = whole.cells.sum_CD[cell] / whole.cells.count_C[cell] + whole.cells.shift_D
        np.testing.assert_allclose(mean_D, x_ND[rows.cell_N == cell].mean(0), rtol=1e-6)


def test_a_value_that_is_no_number_is_refused() -> None:
    values = np.ones((8, 1, 3), np.float32)
    values[5, 0, 1] = np.nan
    rows = Rows(row_N=np.arange(8), cell_N=np.zeros(8, np.intp), pooled_N=np.ones(8, bool), cells=1, unit_rows=4)
    with pytest.raises(ValueError, match="row 5"):
        summarise(values, 0, rows)


def test_the_stated_memory_is_that_of_matrices_cells_and_blocks() -> None:
    assert summary_bytes(8192, 66_240) == pytest.approx(3.4e9, rel=0.05), "the paper's scale: 276 roles, 240 questions"
