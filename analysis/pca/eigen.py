"""Principal components from the moments of rows, by LAPACK or Lanczos.

What noise would decide is decided by rule. Signs: a component's largest loading is positive, the first of equals. Null
directions, where the rows have no variance beyond rounding: variance 0, and the first unit vectors that keep enough of
themselves beside the components before them, made orthogonal.

Shape suffixes: N rows, D dimensions, K components, R of them with variance.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh
from scipy.linalg.blas import dsymv
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

from personaspace.analysis.pca.moments import BLOCK_ROWS, Array, Moments, Precision, RowError

Solver = Literal["auto", "lapack", "lanczos"]

LANCZOS_DIMENSION, LANCZOS_SHARE = 1024, 16
"""From so many dimensions, for at most one in so many components, Lanczos was faster for all but flat spectra."""
RESIDUAL = 1e-10
"""Of a pair that Lanczos found, relative to the largest eigenvalue; above, LAPACK does it again."""
TIE = 1e-4
"""Loadings that differ by less than this share count as equal: more than rounding moves them."""
NOISE = {"float32": 1e-6, "float64": 4e-15}
"""Rounding of a product of columns, relative to their lengths."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decomposition:
    """The leading components of some rows, in float64."""

    mean_D: NDArray[np.float64]
    component_KD: NDArray[np.float64]
    """Orthonormal rows, by falling variance; null directions last."""
    variance_K: NDArray[np.float64]
    """Along each component, divided by n - 1; exactly 0 along null directions."""
    total_variance: float
    """Over all D dimensions."""
    n: float
    """Rows, or the sum of their weights."""

    @property
    def variance_ratio_K(self) -> NDArray[np.float64]:
        """Share of the total variance; 0 where there is no variance at all."""
        return self.variance_K / self.total_variance if self.total_variance else np.zeros_like(self.variance_K)

    def project(self, x_ND: Array) -> NDArray[np.float64]:
        """Scores (N, K) of rows, in float64, block by block."""
        score_NK = np.empty((len(x_ND), len(self.component_KD)))
        for start in range(0, len(x_ND), BLOCK_ROWS):
            block = slice(start, start + BLOCK_ROWS)
            score_NK[block] = (x_ND[block] - self.mean_D) @ self.component_KD.T
        return score_NK


def decompose(moments: Moments, components: int | float | None = None, solver: Solver = "auto") -> Decomposition:
    """The leading ``components``: a count; as many as it takes to exceed a share of the variance; or all that have any.

    A count may go up to D; what the rows can't span are null directions. ``solver`` is LAPACK (copies the scatter,
    8 D^2 bytes), Lanczos (for counts; LAPACK steps in where it fails), or what the shape wants. Raises RowError if the
    moments hold no row, or can't have so many components.
    """
    dimension = moments.dimension
    whole = isinstance(components, int | np.integer) and not isinstance(components, bool)
    if not (components is None or (whole and 1 <= components <= dimension) or (not whole and 0 < components < 1)):
        raise RowError(
            f"n_components: {components!r}; allowed are counts from 1 to {dimension} (the dimensions), shares of the "
            "variance between 0 and 1, and None."
        )
    if not moments.rows:
        raise RowError("no usable row of a weight above zero has been added: a PCA needs at least one.")
    scatter_DD, degrees = moments.scatter_DD, moments.degrees
    total = float(scatter_DD.trace())
    count = int(components) if components is not None and whole else dimension
    # Of the rows, one is spent on the mean.
    wanted = min(count, moments.rows - 1)
    by_shape = dimension >= LANCZOS_DIMENSION and wanted * LANCZOS_SHARE <= dimension
    try_lanczos = wanted and whole and (solver == "lanczos" or (solver == "auto" and by_shape))
    found = _lanczos(scatter_DD, wanted) if try_lanczos else None
    found_K, vector_KD = found or _lapack(scatter_DD, wanted)
    real = _real(found_K, vector_KD, scatter_DD.diagonal(), moments.dtype)
    if not whole:
        wanted_sum = np.inf if components is None else components * total
        count = max(1, min(int(np.searchsorted(np.cumsum(found_K[:real]), wanted_sum, side="right")) + 1, real))
    real = min(real, count)
    value_K = np.zeros(count)
    value_K[:real] = found_K[:real]
    component_KD = _completed(vector_KD[:real], count)
    return Decomposition(
        mean_D=moments.mean_D.copy(),
        component_KD=component_KD * _signs(component_KD)[:, None],
        variance_K=value_K / degrees,
        total_variance=total / degrees,
        n=moments.n,
    )


def _lapack(scatter_DD: Array, count: int) -> tuple[Array, Array]:
    """Eigenvalues (K,), falling, and eigenvectors (K, D)."""
    dimension = len(scatter_DD)
    if not count:
        return np.empty(0), np.empty((0, dimension))
    value_K, vector_DK = eigh(
        # In Fortran order, the copy that LAPACK may destroy.
        scatter_DD.copy().T,
        lower=False,
        overwrite_a=True,
        check_finite=False,
        driver="evr",
        subset_by_index=[dimension - count, dimension - 1],
    )
    return value_K[::-1], vector_DK.T[::-1]


def _lanczos(scatter_DD: Array, count: int) -> tuple[Array, Array] | None:
    """The same by ARPACK from a fixed start, or None if it does not converge or is not exact."""
    dimension = len(scatter_DD)
    if count >= dimension:
        return None

    def product(x_D: Array) -> Array:
        y_D: Array = dsymv(1.0, scatter_DD.T, x_D, lower=0)
        return y_D

    operator = LinearOperator((dimension, dimension), matvec=product, dtype=np.float64)
    try:
        value_K, vector_DK = eigsh(
            operator, k=count, which="LA", v0=np.random.default_rng(0).standard_normal(dimension)
        )
    except ArpackError:
        return None
    value_K, vector_KD = value_K[::-1], vector_DK.T[::-1]
    residual_K = [np.linalg.norm(product(v_D) - value * v_D) for value, v_D in zip(value_K, vector_KD, strict=True)]
    overlap_KK = vector_KD @ vector_KD.T - np.eye(count)
    exact = max(residual_K) <= RESIDUAL * value_K[0] and np.abs(overlap_KK).max() <= RESIDUAL
    return (value_K, vector_KD) if exact else None


def _real(value_K: Array, vector_KD: Array, square_D: Array, dtype: Precision) -> int:
    """How many leading eigenvalues are above what rounding alone can make; ``square_D`` is the scatter's diagonal."""
    if not len(value_K):
        return 0
    dimension = len(square_D)
    # Rounding is relative to the columns, so a loud column does not drown what happens in quiet ones.
    floor_K = NOISE[dtype] * np.sqrt(dimension) * (vector_KD**2 @ square_D)
    floor_K += np.finfo(np.float64).eps * dimension * value_K[0]
    is_noise = value_K <= floor_K
    return int(is_noise.argmax()) if is_noise.any() else len(value_K)


def _completed(vector_RD: Array, count: int) -> NDArray[np.float64]:
    """``vector_RD`` and null directions (see the module) up to ``count`` orthonormal rows."""
    real, dimension = vector_RD.shape
    component_KD = np.empty((count, dimension))
    component_KD[:real] = vector_RD
    left_D = 1 - (vector_RD**2).sum(axis=0)
    for place in range(real, count):
        # On average a unit vector keeps (D - place) / D of its square; some keep half of that.
        direction_D = np.zeros(dimension)
        direction_D[np.argmax(left_D >= (dimension - place) / (2 * dimension))] = 1
        for _ in range(2):  # once leaves rounding behind
            direction_D -= (component_KD[:place] @ direction_D) @ component_KD[:place]
        component_KD[place] = direction_D / np.linalg.norm(direction_D)
        left_D -= component_KD[place] ** 2
    return component_KD


def _signs(component_KD: Array) -> Array:
    size_KD = np.abs(component_KD)
    first_K = (size_KD >= (1 - TIE) * size_KD.max(axis=1, keepdims=True)).argmax(axis=1)
    return np.where(np.take_along_axis(component_KD, first_K[:, None], axis=1)[:, 0] < 0, -1.0, 1.0)
