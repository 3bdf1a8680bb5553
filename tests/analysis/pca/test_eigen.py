"""Components against the SVD in float64: exact, with deterministic signs and null directions.

Shape suffixes as in ``eigen``.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from personaspace.analysis.pca.eigen import RESIDUAL, Decomposition, Solver, _lanczos, decompose
from personaspace.analysis.pca.moments import NARROW, Moments, PackedMoments, Precision, RowError

SOLVERS: tuple[Solver, ...] = ("lapack", "lanczos")
SINE = {"float64": 1e-6, "float32": 5e-6}
WIDE = NARROW + 64
"""Where float32 is not replaced by float64."""


def spectrum(dimension: int, components: int, gap: float = 0.011, first: float = 3.0, tail: float = 0.9) -> np.ndarray:
    """Variances: ``components`` even ones down from ``first`` to 1, then the gap, then a geometric tail."""
    leading_K = np.linspace(first, 1, components) if components > 1 else np.ones(1)
    return np.append(leading_K, (1 - gap) * tail ** np.arange(dimension - components))


def rows_with(
    variance_D: np.ndarray, rows: int, seed: int, tails: bool = False, mean_over_std: float = 0
) -> np.ndarray:
    """Float32 rows whose sample covariance has these eigenvalues, in directions that load on every coordinate.

    ``tails``: scores of Student's t with 2 degrees of freedom, made uncorrelated.
    """
    generator, dimension = np.random.default_rng(seed), len(variance_D)
    raw_ND = generator.standard_t(2, (rows, dimension)) if tails else generator.standard_normal((rows, dimension))
    score_ND = np.linalg.qr(raw_ND - raw_ND.mean(0))[0] * np.sqrt(rows - 1)
    rotation_DD = np.linalg.qr(generator.standard_normal((dimension, dimension)))[0]
    x_ND = (score_ND * np.sqrt(variance_D)) @ rotation_DD
    shift_D = mean_over_std * generator.choice([-1, 1], dimension) * x_ND.std(0)
    return (x_ND + shift_D).astype(np.float32)


def truth(x_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Variances and components by SVD of the centred rows, as float64 sees the given (rounded) rows."""
    centred_ND = x_ND.astype(np.float64) - x_ND.mean(0, dtype=np.float64)
    centred_ND -= centred_ND.mean(0)
    _, value_K, vector_KD = np.linalg.svd(centred_ND, full_matrices=False)
    return value_K**2 / (len(x_ND) - 1), vector_KD


def sine(found_KD: np.ndarray, true_KD: np.ndarray) -> float:
    """Of the largest angle between two subspaces."""
    return float(np.linalg.norm(found_KD - (found_KD @ true_KD.T) @ true_KD, 2))


def resolution(x_ND: np.ndarray, value_K: np.ndarray, vector_KD: np.ndarray, count: int) -> float:
    """What the module docstring of ``moments`` says that float32 costs."""
    loaded = float(vector_KD[count - 1] ** 2 @ x_ND.var(0, dtype=np.float64))
    apart = value_K[count - 1] - (value_K[count] if count < len(value_K) else 0)
    return float(1e-5 * np.sqrt(x_ND.shape[1] / len(x_ND)) * loaded / apart)


def check_exact(x_ND: np.ndarray, count: int, found: Decomposition, within: float) -> None:
    value_K, vector_KD = truth(x_ND)
    assert 1 - value_K[count] / value_K[count - 1] >= 0.01
    assert sine(found.component_KD, vector_KD[:count]) <= within
    np.testing.assert_allclose(found.variance_K, value_K[:count], rtol=1e-6)
    np.testing.assert_allclose(found.variance_ratio_K, value_K[:count] / value_K.sum(), rtol=1e-6)
    np.testing.assert_allclose(found.component_KD @ found.component_KD.T, np.eye(count), atol=1e-12)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("mean_over_std", [0, 1e4])
@pytest.mark.parametrize(("first", "tails"), [(3.0, False), (3.0, True), (100.0, False)])
def test_64_components_at_a_gap_of_one_percent(
    dtype: Precision, mean_over_std: float, first: float, tails: bool
) -> None:
    variance_D = spectrum(WIDE, 64)
    variance_D[0] = first
    x_ND = rows_with(variance_D, 6000, 0, tails=tails, mean_over_std=mean_over_std)
    moments = Moments(WIDE, dtype).add(x_ND)
    for solver in SOLVERS:
        check_exact(x_ND, 64, decompose(moments, 64, solver), SINE[dtype])


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 16),
    rows=st.integers(800, 2000),
    cuts=st.lists(st.floats(0, 1), max_size=5),
    mean_over_std=st.sampled_from([0, 1, 1e4]),
    tails=st.booleans(),
    dtype=st.sampled_from(["float64", "float32"]),
)
def test_any_partition_merged_in_any_order_is_exact(
    seed: int, count: int, rows: int, cuts: list[float], mean_over_std: float, tails: bool, dtype: Precision
) -> None:
    generator = np.random.default_rng(seed)
    x_ND = rows_with(spectrum(WIDE, count), rows, seed, tails, mean_over_std)
    # Sorted, so that the parts' means lie far apart.
    x_ND = x_ND[np.argsort(x_ND[:, 0])]
    parts = [Moments(WIDE, dtype).add(part) for part in np.split(x_ND, sorted(int(cut * rows) for cut in cuts))]
    while len(parts) > 1:
        left, right = generator.choice(len(parts), 2, replace=False)
        parts[left].merge(parts[right])
        del parts[right]
    check_exact(x_ND, count, decompose(parts[0], count), SINE[dtype])


def hard_rows(kind: str) -> np.ndarray:
    """Rows for which float32 misses 5e-6: no fall-off behind component 32, or much that dominates."""
    variance_D = np.where(np.arange(WIDE) < 32, 1.011, 1.0)
    if kind == "t2 as drawn":
        generator = np.random.default_rng(0)
        rotation_DD = np.linalg.qr(generator.standard_normal((WIDE, WIDE)))[0]
        scale_D = np.sqrt(np.append(np.linspace(90, 36, 8), 0.9 ** np.arange(WIDE - 8)))
        return ((generator.standard_t(2, (2000, WIDE)) * scale_D) @ rotation_DD).astype(np.float32)
    if kind.startswith("one"):
        variance_D[0] = float(kind[-3:])
    if kind.startswith("all"):
        variance_D = np.append(np.geomspace(1e4, 1.011, 32), np.geomspace(1, 0.1, WIDE - 32))
    return np.repeat(rows_with(variance_D, 500, 0), 4, axis=0) if kind == "repeated" else rows_with(variance_D, 2000, 0)


@pytest.mark.parametrize("kind", ["flat", "repeated", "one of 1e3", "one of 1e4", "all within 1e4", "t2 as drawn"])
def test_where_float32_misses_the_goal_it_keeps_the_stated_limit_and_float64_the_goal(kind: str) -> None:
    x_ND = hard_rows(kind)
    value_K, vector_KD = truth(x_ND)
    single, double = (decompose(Moments(WIDE, dtype).add(x_ND), 64) for dtype in ("float32", "float64"))
    sines = []
    for count in range(1, 65):
        apart = value_K[count - 1] - value_K[count]
        if apart < 0.01 * value_K[count - 1]:
            continue
        limit = resolution(x_ND, value_K, vector_KD, count)
        sines.append(sine(single.component_KD[:count], vector_KD[:count]))
        assert sines[-1] <= max(limit, 1e-7)
        assert abs(single.variance_K[count - 1] / value_K[count - 1] - 1) <= max(
            limit * apart / value_K[count - 1], 1e-7
        )
        assert sine(double.component_KD[:count], vector_KD[:count]) <= SINE["float64"]
        np.testing.assert_allclose(double.variance_K[:count], value_K[:count], rtol=1e-6)
    assert max(sines) > SINE["float32"]


def test_one_loud_coordinate_costs_the_others_nothing_in_float32() -> None:
    x_ND = rows_with(spectrum(WIDE, 8), 2000, 0)
    loud_ND = np.column_stack([x_ND, 3e4 * np.random.default_rng(1).standard_normal(2000, dtype=np.float32)])
    value_K, vector_KD = truth(loud_ND)
    found = decompose(Moments(WIDE + 1, "float32").add(loud_ND), 9)
    assert value_K[0] / value_K[8] > 1e8
    assert sine(found.component_KD, vector_KD[:9]) <= SINE["float32"]
    np.testing.assert_allclose(found.variance_K, value_K[:9], rtol=1e-6)


def test_duplicate_rows_change_nothing_but_the_divisor() -> None:
    x_ND = rows_with(spectrum(40, 4), 60, 0)
    once, twice = (decompose(Moments(40).add(rows), 4) for rows in (x_ND, np.repeat(x_ND, 2, axis=0)))
    np.testing.assert_allclose(once.component_KD, twice.component_KD, atol=1e-12)
    np.testing.assert_allclose(twice.variance_K, once.variance_K * 2 * 59 / 119)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("copies", [1, 4])
@pytest.mark.parametrize("mean", [0, 1e4])
def test_fewer_rows_than_dimensions_end_in_null_directions_that_noise_does_not_move(
    dtype: Precision, copies: int, mean: float
) -> None:
    x_ND = rows_with(np.geomspace(9, 1, WIDE), WIDE + 1, 0)[:10] + np.float32(mean)
    x_ND = np.repeat(x_ND, copies, axis=0)
    shuffled_ND = np.random.default_rng(1).permutation(x_ND)
    found, again = (
        decompose(Moments(WIDE, dtype).add(part[:7]).merge(Moments(WIDE, dtype).add(part[7:])), 15)
        for part in (x_ND, shuffled_ND)
    )
    _, vector_KD = truth(x_ND)
    assert (found.variance_K[:9] > 0).all()
    assert (found.variance_K[9:] == 0).all()
    assert sine(found.component_KD[:9], vector_KD[:9]) <= SINE[dtype]
    np.testing.assert_allclose(found.component_KD @ found.component_KD.T, np.eye(15), atol=1e-12)
    np.testing.assert_allclose(again.component_KD[9:], found.component_KD[9:], atol=10 * SINE[dtype])
    assert len(decompose(Moments(WIDE, dtype).add(x_ND)).component_KD) == 9


def test_a_single_row_has_unit_vectors_and_no_variance() -> None:
    found = decompose(Moments(5).add([[3, 1, 4, 1, 5]]), 2)
    np.testing.assert_array_equal(found.component_KD, np.eye(5)[:2])
    np.testing.assert_array_equal(found.variance_K, [0, 0])
    np.testing.assert_array_equal(found.variance_ratio_K, [0, 0])
    np.testing.assert_array_equal(found.mean_D, [3, 1, 4, 1, 5])
    np.testing.assert_array_equal(found.project(np.array([[3, 1, 4, 1, 5]])), [[0, 0]])


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_constant_columns_have_no_part_in_components_and_are_the_null_directions(dtype: Precision) -> None:
    x_ND = rows_with(spectrum(WIDE, 4, tail=0.999), 5000, 0)
    constant = [2, 3, WIDE - 1]
    x_ND[:, constant] = [0.1, 1e6, -3e-4]
    moments = Moments(WIDE, dtype).add(x_ND)
    assert (moments.variance_D[constant] == 0).all()
    component_KD = decompose(moments, WIDE).component_KD
    assert np.abs(component_KD[:-3, constant]).max() < 1e-15
    np.testing.assert_allclose(component_KD[-3:], np.eye(WIDE)[constant], atol=1e-12)


def test_all_columns_constant() -> None:
    found = decompose(Moments(3).add(np.full((100, 3), 0.1)), 3)
    np.testing.assert_array_equal(found.component_KD, np.eye(3))
    assert found.total_variance == 0


def test_the_largest_loading_is_positive_and_of_equals_the_first() -> None:
    x_ND = np.outer(np.random.default_rng(0).standard_normal(50), [0, -1, 1, -1, 1])
    for noise in (0, 1e-9, -1e-9):
        noisy_ND = x_ND + noise * np.random.default_rng(1).standard_normal(x_ND.shape)
        component_KD = decompose(Moments(5).add(noisy_ND), 1).component_KD
        np.testing.assert_allclose(component_KD, [[0, 0.5, -0.5, 0.5, -0.5]], atol=1e-6)


def test_a_share_takes_the_least_count_that_exceeds_it() -> None:
    moments = of_variances(np.array([5.0, 3.0, 1.0, 1.0]))
    assert [len(decompose(moments, share).variance_K) for share in (0.4, 0.6, 0.85, 0.99)] == [1, 2, 3, 4]
    assert len(decompose(moments).variance_K) == 4


def of_variances(variance_D: np.ndarray, rotate: bool = False) -> Moments:
    """Moments that have this covariance, of rows that nobody needs."""
    dimension = len(variance_D)
    covariance_DD = np.diag(variance_D)
    if rotate:
        rotation_DD = np.linalg.qr(np.random.default_rng(0).standard_normal((dimension, dimension)))[0]
        covariance_DD = (rotation_DD * variance_D) @ rotation_DD.T
    return Moments.from_packed(
        PackedMoments(
            dtype="float64",
            rows=10 * dimension,
            n=10 * dimension,
            mean_D=np.zeros(dimension),
            triangle_T=covariance_DD[np.tril_indices(dimension)] * (10 * dimension - 1),
        )
    )


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("equal", [2, 5])
def test_equal_eigenvalues_are_all_found(rotate: bool, equal: int) -> None:
    variance_D = np.append(np.repeat([9.0, 5.0], equal), np.geomspace(2, 0.1, 300 - 2 * equal))
    moments = of_variances(variance_D, rotate)
    for solver in SOLVERS:
        found = decompose(moments, 2 * equal + 1, solver)
        np.testing.assert_allclose(found.variance_K, variance_D[: 2 * equal + 1])
        np.testing.assert_allclose(found.component_KD @ found.component_KD.T, np.eye(2 * equal + 1), atol=1e-12)


def test_lapack_steps_in_where_lanczos_fails() -> None:
    moments = of_variances(np.zeros(300))
    assert _lanczos(moments.scatter_DD, 3) is None
    np.testing.assert_array_equal(decompose(moments, 3, "lanczos").component_KD, np.eye(300)[:3])


def test_the_solvers_agree_and_lanczos_repeats_itself() -> None:
    moments = of_variances(np.geomspace(100, 0.01, 400), rotate=True)
    lapack, lanczos, again = (decompose(moments, 20, solver) for solver in ("lapack", "lanczos", "lanczos"))
    np.testing.assert_array_equal(lanczos.component_KD, again.component_KD)
    np.testing.assert_allclose(lanczos.component_KD, lapack.component_KD, atol=1e3 * RESIDUAL)
    np.testing.assert_allclose(lanczos.variance_K, lapack.variance_K)


@pytest.mark.parametrize("components", [0, 6, -1, 1.0, 0.0, 1.5, True, float("nan")])
def test_a_count_that_can_not_be_is_refused(components: float) -> None:
    with pytest.raises(RowError, match=r"allowed are counts from 1 to 5 \(the dimensions\), shares"):
        decompose(Moments(5).add(np.eye(5)), components)


def test_no_rows_are_refused() -> None:
    with pytest.raises(RowError, match="no usable row of a weight above zero has been added"):
        decompose(Moments(5), 1)
