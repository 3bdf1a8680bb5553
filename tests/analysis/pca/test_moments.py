"""Moments: any partition and order of merging, weights, what is refused, what is stored."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from personaspace.analysis.pca.moments import (
    BLOCK_ROWS,
    MOST_TERMS,
    NARROW,
    Moments,
    PackedMoments,
    Precision,
    RowError,
)
from personaspace.store.errors import InputError

WIDE = NARROW + 8
TOLERANCE = {"float64": 1e-13, "float32": 3e-6}
"""Of an element of the covariance, relative to its columns; float32 sums of few rows or of coarse numbers err most."""


def rows(count: int, dimension: int = WIDE, seed: int = 0, mean: float = 3.0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, dimension), dtype=np.float32) + np.float32(mean)


def check_same(moments: Moments, x_ND: np.ndarray, tolerance: float) -> None:
    """Against numpy, relative to the columns' lengths."""
    covariance_DD = np.atleast_2d(np.cov(x_ND.astype(np.float64), rowvar=False))
    std_D = np.sqrt(covariance_DD.diagonal())
    assert np.abs((moments.covariance() - covariance_DD) / np.outer(std_D, std_D)).max() <= tolerance
    assert np.abs((moments.mean_D - x_ND.mean(0, dtype=np.float64)) / std_D).max() <= tolerance + 1e-14 * float(
        np.abs(x_ND).max()
    )
    np.testing.assert_allclose(moments.variance_D, covariance_DD.diagonal(), rtol=tolerance)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("dimension", [1, 7, WIDE])
@pytest.mark.parametrize("count", [2, BLOCK_ROWS, 2 * BLOCK_ROWS + 129])
def test_mean_and_covariance_are_numpys(dtype: Precision, dimension: int, count: int) -> None:
    x_ND = rows(count, dimension)
    moments = Moments(dimension, dtype).add(x_ND)
    check_same(moments, x_ND, TOLERANCE[dtype])
    assert (moments.rows, moments.n) == (count, count)


@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    dtype=st.sampled_from(["float64", "float32"]),
    spread=st.sampled_from([0.0, 1e3]),
)
def test_merging_parts_is_adding_all(seed: int, sizes: list[int], dtype: Precision, spread: float) -> None:
    generator = np.random.default_rng(seed)
    parts = [rows(size, 9, seed + i, spread * generator.standard_normal()) for i, size in enumerate([*sizes, 3])]
    forth, back = Moments(9, dtype), Moments(9, dtype)
    for part in parts:
        forth.add(part)
    for part in parts[::-1]:
        back = Moments(9, dtype).add(part).merge(back)
    for moments in (forth, back):
        check_same(moments, np.concatenate(parts), 1e-11)


def test_more_parts_than_terms_are_kept_back() -> None:
    x_ND = rows(3 * MOST_TERMS, 20)
    moments = Moments(20)
    for row_D in x_ND:
        moments.add(row_D[None])
    check_same(moments, x_ND, 1e-12)


def test_a_mean_far_from_zero_costs_no_digits() -> None:
    x_ND = rows(5000, mean=1e4)
    check_same(Moments(WIDE, "float32").add(x_ND), x_ND, TOLERANCE["float32"])
    # Float64 rows keep the digits that float32 could not hold.
    exact_ND = np.random.default_rng(0).standard_normal((5000, WIDE)) + 1e8
    check_same(Moments(WIDE, "float32").add(exact_ND), exact_ND, TOLERANCE["float32"])


@pytest.mark.parametrize(("order", "tolerance"), [("sorted", 3e-6), ("outlier first", 2e-5), ("outlier last", 3e-6)])
def test_the_first_rows_of_a_block_need_not_be_like_the_others(order: str, tolerance: float) -> None:
    x_ND = rows(BLOCK_ROWS)
    if order == "sorted":
        x_ND = np.sort(x_ND, axis=0)
    else:
        # So far out that its square swallows digits of those that are added after it.
        x_ND[0 if order == "outlier first" else -1] += 1e5
    check_same(Moments(WIDE, "float32").add(x_ND), x_ND, tolerance)
    check_same(Moments(WIDE).add(x_ND), x_ND, 1e-12)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_float32_products_that_would_under_or_overflow_are_done_in_float64(scale: float) -> None:
    x_ND = rows(100) * np.float32(scale)
    check_same(Moments(WIDE, "float32").add(x_ND), x_ND, TOLERANCE["float32"])
    huge_ND = rows(100).astype(np.float64) * 1e60
    check_same(Moments(WIDE, "float32").add(huge_ND), huge_ND, TOLERANCE["float32"])


@pytest.mark.parametrize("given", [np.float16, np.int8, np.int64, np.float64])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_other_types_and_orders_are_taken(given: type, dtype: Precision) -> None:
    x_ND = (10 * rows(300)).astype(given)
    check_same(Moments(WIDE, dtype).add(np.asfortranarray(x_ND)), x_ND, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_weights_are_repetition_and_zero_leaves_out(dtype: Precision) -> None:
    x_ND = rows(3000)
    weight_N = np.random.default_rng(1).integers(0, 4, 3000)
    x_ND[weight_N == 0] = np.nan
    weighted = Moments(WIDE, dtype).add(x_ND, weight_N)
    check_same(weighted, np.repeat(x_ND, weight_N, axis=0), TOLERANCE[dtype])
    assert weighted.n == weight_N.sum()
    assert weighted.rows == (weight_N > 0).sum()


def test_nan_rows_are_refused_by_number_and_nothing_is_added() -> None:
    x_ND = rows(BLOCK_ROWS + 100)
    x_ND[[BLOCK_ROWS + 7, BLOCK_ROWS + 9], 3] = [np.nan, np.inf]
    moments = Moments(WIDE).add(rows(10))
    with pytest.raises(RowError, match=r"2 of 2148 rows hold NaN or infinity, the first is row 2055: leave them out, "):
        moments.add(x_ND)
    assert moments.rows == 10
    assert issubclass(RowError, InputError)
    assert issubclass(RowError, ValueError)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("weighted", [False, True])
def test_nan_rows_are_skipped_if_so_configured(dtype: Precision, weighted: bool) -> None:
    x_ND = rows(BLOCK_ROWS + 100)
    bad = [0, 5, BLOCK_ROWS + 7]
    x_ND[bad, 3] = [np.nan, np.inf, -np.inf]
    moments = Moments(WIDE, dtype, nan_rows="skip").add(x_ND, np.ones(len(x_ND)) if weighted else None)
    check_same(moments, np.delete(x_ND, bad, axis=0), TOLERANCE[dtype])
    assert moments.rows == len(x_ND) - 3


@pytest.mark.parametrize(
    ("weight_N", "message"),
    [
        ([1, -1, 1], r"weight of row 1: -1\.0; allowed are finite numbers from 0 on"),
        ([1, 1, np.nan], "weight of row 2: nan"),
        ([1, 1], r"weights of shape \(2,\); 3 rows need \(3,\)"),
    ],
)
def test_weights_that_can_not_be_are_refused(weight_N: list[float], message: str) -> None:
    with pytest.raises(RowError, match=message):
        Moments(4).add(rows(3, 4), weight_N)


def test_weights_that_sum_to_less_than_two_rows_have_no_variance() -> None:
    moments = Moments(4).add(rows(3, 4), [0.2, 0.3, 0.5])
    with pytest.raises(
        RowError, match=r"3 rows with a sum of weights of 1: a variance needs more than 1\. Weights are"
    ):
        moments.covariance()
    assert (Moments(4).add(rows(1, 4), [0.5]).variance_D == 0).all()


def test_wrong_shapes_and_options_are_refused() -> None:
    with pytest.raises(RowError, match=r"rows of shape \(3, 5\); these moments take \(rows, 4\)"):
        Moments(4).add(rows(3, 5))
    with pytest.raises(RowError, match=r"dtype: 'float16'; allowed are float32 and float64"):
        Moments(4, "float16")  # type: ignore[arg-type]
    with pytest.raises(RowError, match=r"nan_rows: 'drop'; allowed are refuse and skip"):
        Moments(4, nan_rows="drop")  # type: ignore[arg-type]
    with pytest.raises(RowError, match=r"\('float32', 4\) do not merge into \('float64', 4\): make both alike"):
        Moments(4).merge(Moments(4, "float32"))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_packed_moments_come_back_bit_by_bit_and_go_on(dtype: Precision) -> None:
    moments = Moments(WIDE, dtype).add(rows(3000), np.linspace(0, 2, 3000))
    packed = moments.packed()
    assert packed.triangle_T.shape == (WIDE * (WIDE + 1) // 2,)
    back = Moments.from_packed(packed)
    for attribute in ("triangle_T", "mean_D"):
        np.testing.assert_array_equal(getattr(back.packed(), attribute), getattr(packed, attribute))
    assert (back.packed().n, back.packed().rows, back.packed().dtype) == (packed.n, packed.rows, dtype)
    for each in (moments, back):
        each.add(rows(100, seed=1))
    np.testing.assert_array_equal(back.covariance(), moments.covariance())
    np.testing.assert_array_equal(moments.copy().merge(packed).covariance(), moments.merge(packed).covariance())


def test_a_packed_triangle_that_was_cut_is_refused() -> None:
    packed = PackedMoments(dtype="float64", rows=2, n=2, mean_D=np.zeros(4), triangle_T=np.zeros(9))
    with pytest.raises(RowError, match="a packed triangle of 9 elements does not fit 4 dimensions"):
        Moments.from_packed(packed)


def test_a_copy_is_apart_and_pickles_are_the_same() -> None:
    moments = Moments(WIDE, "float32").add(rows(100))
    before_DD = moments.covariance()
    moments.copy().add(rows(100, seed=1))
    np.testing.assert_array_equal(moments.covariance(), before_DD)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(moments)).covariance(), before_DD)


def by_numpy(block_ND: np.ndarray) -> np.ndarray:
    return block_ND.T @ block_ND


def by_torch(block_ND: np.ndarray) -> np.ndarray:
    block = torch.from_numpy(block_ND)
    return (block.T @ block).cpu().numpy()


@pytest.mark.parametrize("syrk", [by_numpy, by_torch])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_another_array_backend_multiplies(syrk: object, dtype: Precision) -> None:
    x_ND = rows(3000)
    moments = Moments(WIDE, dtype, syrk=syrk).add(x_ND[:1000])  # type: ignore[arg-type]
    check_same(moments.copy().add(x_ND[1000:]), x_ND, TOLERANCE[dtype])
