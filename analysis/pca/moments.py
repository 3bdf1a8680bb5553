"""Count, mean and scatter of rows, exact, mergeable, and about as cheap as one symmetric product over the rows.

Blocks of rows are centred by their own mean and multiplied in the precision asked for; everything is added up in
float64, by the formulas of Chan, Golub and LeVeque (1979). Any partition and any order of merging agree up to rounding.

Shape suffixes: N rows, D dimensions, T = D (D + 1) / 2 elements of a triangle.

What float32 costs, measured: with s = the variance of the coordinates that component k loads on, averaged with weights
loading^2, eigenvalue l_k is off by up to ``1e-5 sqrt(D / N) s`` and the angle of the first k components by up to
``1e-5 sqrt(D / N) s / (l_k - l_(k+1))``; a tenth to a hundredth of that where the spectrum falls off behind k. So 5e-6
is NOT kept where s is many times l_k (one component, or heavy tails, that dominate and run through all coordinates; a
loud coordinate of its own does no harm) nor where k cuts a flat spectrum, unless rows are many. There, take float64.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg.blas import dsyrk

from personaspace.store.errors import InputError

Array = NDArray[Any]
Precision = Literal["float32", "float64"]
NanRows = Literal["refuse", "skip"]

BLOCK_ROWS = 2048
"""Rows of one symmetric product: enough that adding its triangle to the scatter is cheap beside it."""
SUM_ROWS = 128
"""Rows that are added up in float32 before float64 takes over; also what stays in the cache while centring."""
PANEL_ROWS = 128
"""Rows of the scatter that are updated at once: above the diagonal little is touched."""
MOST_TERMS = 64
"""Differences of means that wait until one product adds them all."""
NARROW = 256
"""Up to so many dimensions float32 gains no time, and float64 is taken for both."""
SMALLEST_PEAK = 1e-30
"""A block whose largest sum of squares is below has lost digits to float32's underflow."""


class RowError(InputError, ValueError):
    """Rows or weights can't be used. A ValueError, too, as scikit-learn expects of estimators."""


class Syrk(Protocol):
    """What multiplies a block: ``block_ND`` (C-order, float32 or float64) -> ``block.T @ block``, on the host.

    In the block's own dtype; above the diagonal anything may stand.
    """

    def __call__(self, block_ND: Array, /) -> Array: ...


class SelfProduct:
    """NumPy's matmul, with an output buffer (D, D) that every call overwrites; not to be shared between threads.

    It knows a product with itself (syrk) and lets other threads run meanwhile; SciPy's ssyrk holds the interpreter.
    """

    def __init__(self) -> None:
        self._out_DD: Array = np.zeros((0, 0), np.float32)

    def __call__(self, block_ND: Array, /) -> Array:
        shape = (block_ND.shape[1],) * 2
        if self._out_DD.shape != shape or self._out_DD.dtype != block_ND.dtype:
            self._out_DD = np.empty(shape, block_ND.dtype)
        return np.matmul(block_ND.T, block_ND, out=self._out_DD)

    def __reduce__(self) -> tuple[type["SelfProduct"], tuple[()]]:
        return SelfProduct, ()


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedMoments:
    """Moments as they are stored: half the size, nothing lost."""

    dtype: Precision
    """Of the products."""
    rows: int
    """Rows added, whatever their weight."""
    n: float
    """Sum of their weights."""
    mean_D: NDArray[np.float64]
    triangle_T: NDArray[np.float64]
    """Lower triangle of the scatter, row by row."""


class Moments:
    """Accumulator of n, mean and scatter (sum of outer products about the mean) of rows in ``dimension`` coordinates.

    Holds the scatter (8 D^2 bytes), the default ``syrk``'s buffer (4 D^2 or 8 D^2) and one block; not for use by
    several threads at once. Rows come fastest in multiples of BLOCK_ROWS: each block costs one pass over the scatter.
    Weights are counts: weight 2 is the row twice, weight 0 leaves it out. ``nan_rows`` says whether rows that hold NaN
    or infinity are refused or skipped.
    """

    def __init__(
        self, dimension: int, dtype: Precision = "float64", nan_rows: NanRows = "refuse", syrk: Syrk | None = None
    ) -> None:
        for name, value, allowed in (("dtype", dtype, get_args(Precision)), ("nan_rows", nan_rows, get_args(NanRows))):
            if value not in allowed:
                raise RowError(f"{name}: {value!r}; allowed are {' and '.join(allowed)}.")
        self.dimension, self.dtype, self.nan_rows = dimension, dtype, nan_rows
        self.rows = 0
        self.n = 0.0
        self.mean_D = np.zeros(dimension)
        self._scatter_DD = np.zeros((dimension, dimension))
        self._terms: list[NDArray[np.float64]] = []
        self._syrk: Syrk = SelfProduct() if syrk is None else syrk
        self._centred_ND: Array = np.empty((0, dimension))

    @property
    def scatter_DD(self) -> NDArray[np.float64]:
        """The scatter's lower triangle; what stands above the diagonal has no meaning. Not a copy."""
        self._apply_terms()
        return self._scatter_DD

    @property
    def degrees(self) -> float:
        """What the scatter is divided by, n - 1; 1 for a single row. Raises RowError if it would not be positive."""
        if self.rows == 1:
            return 1.0
        if self.n <= 1:
            raise RowError(
                f"{self.rows} rows with a sum of weights of {self.n:g}: a variance needs more than 1. Weights are "
                "counts of rows: scale them up, or add rows."
            )
        return self.n - 1

    @property
    def variance_D(self) -> NDArray[np.float64]:
        """Variance of each coordinate, divided by n - 1."""
        variance_D: NDArray[np.float64] = self.scatter_DD.diagonal() / self.degrees
        return variance_D

    def covariance(self) -> NDArray[np.float64]:
        """The whole covariance (D, D), divided by n - 1; a copy."""
        lower_DD = np.tril(self.scatter_DD)
        lower_DD /= self.degrees
        lower_DD += np.tril(lower_DD, -1).T
        return lower_DD

    def add(self, x_ND: ArrayLike, weight_N: ArrayLike | None = None) -> Self:
        """Add rows, in any float or integer type. Raises RowError, with nothing added, if one can't be used."""
        x_ND = np.asarray(x_ND)
        if x_ND.ndim != 2 or x_ND.shape[1] != self.dimension:
            raise RowError(f"rows of shape {x_ND.shape}; these moments take (rows, {self.dimension}).")
        weight_N, used_N = self._usable(x_ND, weight_N)
        for start in range(0, len(x_ND), BLOCK_ROWS):
            block = slice(start, start + BLOCK_ROWS)
            block_ND, block_weight_N = x_ND[block], None if weight_N is None else weight_N[block]
            if used_N is not None:
                block_ND = block_ND[used_N[block]]
                block_weight_N = None if block_weight_N is None else block_weight_N[used_N[block]]
            if len(block_ND):
                self._add_block(block_ND, block_weight_N)
        return self

    def merge(self, other: "Moments | PackedMoments") -> Self:
        """Add what ``other`` has seen. Raises RowError if it has other dimensions or another precision."""
        theirs, mine = (other.dtype, len(other.mean_D)), (self.dtype, self.dimension)
        if theirs != mine:
            raise RowError(f"moments of (dtype, dimensions) {theirs} do not merge into {mine}: make both alike.")
        if isinstance(other, PackedMoments):
            if len(other.triangle_T) != self.dimension * (self.dimension + 1) // 2:
                raise RowError(
                    f"a packed triangle of {len(other.triangle_T)} elements does not fit {self.dimension} "
                    "dimensions: it was not stored whole."
                )
            for row, part in _triangle_rows(self.dimension):
                self._scatter_DD[row, : row + 1] += other.triangle_T[part]
        else:
            self._add_triangle(other.scatter_DD)
        self._shift(other.rows, other.n, other.mean_D)
        return self

    def copy(self) -> "Moments":
        """The same moments, apart; with the same ``syrk``."""
        syrk = None if isinstance(self._syrk, SelfProduct) else self._syrk
        return Moments(self.dimension, self.dtype, self.nan_rows, syrk).merge(self)

    def packed(self) -> PackedMoments:
        """What has to be stored; ``from_packed`` gives the same bits back."""
        triangle_T = np.empty(self.dimension * (self.dimension + 1) // 2)
        scatter_DD = self.scatter_DD
        for row, part in _triangle_rows(self.dimension):
            triangle_T[part] = scatter_DD[row, : row + 1]
        return PackedMoments(
            dtype=self.dtype, rows=self.rows, n=self.n, mean_D=self.mean_D.copy(), triangle_T=triangle_T
        )

    @classmethod
    def from_packed(cls, packed: PackedMoments, nan_rows: NanRows = "refuse", syrk: Syrk | None = None) -> "Moments":
        """Moments that go on where ``packed`` was taken."""
        return cls(len(packed.mean_D), packed.dtype, nan_rows, syrk).merge(packed)

    def _usable(self, x_ND: Array, weight_N: ArrayLike | None) -> tuple[Array | None, NDArray[np.bool_] | None]:
        """Weights in float64 and which rows take part, None for all. Raises RowError."""
        rows = len(x_ND)
        one_D = np.ones(self.dimension, np.result_type(x_ND.dtype, np.float32))
        with np.errstate(over="ignore", invalid="ignore"):
            sums = [x_ND[start : start + BLOCK_ROWS] @ one_D for start in range(0, rows, BLOCK_ROWS)]
        # A sum that overflows is no NaN, so the rows that the sums point at are looked at.
        bad = np.flatnonzero(~np.isfinite(np.concatenate([np.empty(0), *sums])))
        bad = bad[~np.isfinite(x_ND[bad]).all(axis=1)]
        used_N = np.ones(rows, np.bool_)
        if weight_N is not None:
            weight_N = np.asarray(weight_N, np.float64)
            if weight_N.shape != (rows,):
                raise RowError(f"weights of shape {weight_N.shape}; {rows} rows need ({rows},).")
            wrong = np.flatnonzero(~(np.isfinite(weight_N) & (weight_N >= 0)))
            if len(wrong):
                raise RowError(f"weight of row {wrong[0]}: {weight_N[wrong[0]]}; allowed are finite numbers from 0 on.")
            used_N = weight_N > 0
            bad = bad[used_N[bad]]
        if len(bad) and self.nan_rows == "refuse":
            raise RowError(
                f"{len(bad)} of {rows} rows hold NaN or infinity, the first is row {bad[0]}: leave them out, "
                'give them weight 0, or set nan_rows="skip".'
            )
        used_N[bad] = False
        return weight_N, None if used_N.all() else used_N

    def _add_block(self, x_ND: Array, weight_N: Array | None) -> None:
        float64 = self.dtype == "float64" or self.dimension <= NARROW
        with np.errstate(over="ignore", invalid="ignore"):
            mean_D, triangle_DD = self._product(x_ND, weight_N, np.float64 if float64 else np.float32)
            peak = triangle_DD.diagonal().max(initial=0)
            if not (float64 or SMALLEST_PEAK < peak < np.inf):
                mean_D, triangle_DD = self._product(x_ND, weight_N, np.float64)
        self._add_triangle(triangle_DD)
        self._shift(len(x_ND), float(len(x_ND) if weight_N is None else weight_N.sum()), mean_D)

    def _product(self, x_ND: Array, weight_N: Array | None, dtype: Any) -> tuple[NDArray[np.float64], Array]:
        """A block's mean in float64 and its scatter about that mean, multiplied in ``dtype``."""
        # Relative to a row and a few rows' mean: exact for constant columns, and near enough that no digit gets lost.
        head_ND = x_ND[:SUM_ROWS].astype(np.result_type(x_ND.dtype, dtype))
        shift_D = head_ND[0] + (head_ND - head_ND[0]).mean(axis=0)
        if len(self._centred_ND) < len(x_ND) or self._centred_ND.dtype != dtype:
            self._centred_ND = np.empty((len(x_ND), self.dimension), dtype)
        centred_ND = self._centred_ND[: len(x_ND)]
        counted_N = np.ones(len(x_ND), dtype) if weight_N is None else weight_N.astype(dtype)
        sum_D = np.zeros(self.dimension)
        for start in range(0, len(x_ND), SUM_ROWS):
            part = slice(start, start + SUM_ROWS)
            np.subtract(x_ND[part], shift_D, out=centred_ND[part], casting="same_kind")
            sum_D += counted_N[part] @ centred_ND[part]
        rest_D = sum_D / (len(x_ND) if weight_N is None else weight_N.sum())
        centred_ND -= rest_D.astype(dtype)
        if weight_N is not None:
            centred_ND *= np.sqrt(weight_N).astype(dtype)[:, None]
        return shift_D + rest_D, np.asarray(self._syrk(centred_ND))

    def _add_triangle(self, triangle_DD: Array) -> None:
        for start in range(0, self.dimension, PANEL_ROWS):
            stop = min(start + PANEL_ROWS, self.dimension)
            self._scatter_DD[start:stop, :stop] += triangle_DD[start:stop, :stop]

    def _shift(self, rows: int, n: float, mean_D: NDArray[np.float64]) -> None:
        """Chan's rank-one term: what two sets add to their scatters since their means differ."""
        total = self.n + n
        if self.n and n:
            apart_D = mean_D - self.mean_D
            self._terms.append(apart_D * np.sqrt(self.n / total * n))
            self.mean_D = self.mean_D + apart_D * (n / total)
            if len(self._terms) == MOST_TERMS:
                self._apply_terms()
        elif n:
            self.mean_D = mean_D.copy()
        self.rows, self.n = self.rows + rows, total

    def _apply_terms(self) -> None:
        if self._terms:
            dsyrk(1.0, np.stack(self._terms).T, beta=1.0, c=self._scatter_DD.T, lower=0, overwrite_c=1)
            self._terms.clear()


def _triangle_rows(dimension: int) -> Iterator[tuple[int, slice]]:
    """Each row of a triangle, and where it lies in the packed one."""
    for row in range(dimension):
        start = row * (row + 1) // 2
        yield row, slice(start, start + row + 1)
