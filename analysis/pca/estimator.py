"""Exact PCA that learns in pieces, as a scikit-learn estimator around ``moments`` and ``eigen``.

Shape suffixes: N rows, D dimensions, K components.
"""

from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.exceptions import NotFittedError
from sklearn.utils.validation import validate_data

from personaspace.analysis.pca.eigen import Decomposition, Solver, decompose
from personaspace.analysis.pca.moments import Moments, NanRows, Precision, Syrk

FLOATS = (np.float64, np.float32)
"""Types that are taken as they are; others become the first."""


class ExactIncrementalPCA(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """scikit-learn estimator of the same: ``partial_fit`` and ``merge`` in any order give what ``fit`` gives.

    ``n_components`` and ``solver`` as in ``decompose``. ``dtype`` is that of the products ("float32" is about twice as
    fast; ``moments`` says what it costs), ``nan_rows`` refuses or skips rows with NaN or infinity, ``syrk`` multiplies
    on another array backend. Weights count rows. ``moments_`` can be packed and stored, and merged with others; after
    ``partial_fit`` and ``merge`` components are computed when they are first asked for.
    """

    def __init__(
        self,
        n_components: int | float | None = None,
        *,
        dtype: Precision = "float64",
        nan_rows: NanRows = "refuse",
        solver: Solver = "auto",
        syrk: Syrk | None = None,
    ) -> None:
        self.n_components = n_components
        self.dtype = dtype
        self.nan_rows = nan_rows
        self.solver = solver
        self.syrk = syrk

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Forget all rows, learn these (N, D). Raises RowError (a ValueError) if they can't be used."""
        if hasattr(self, "moments_"):
            del self.moments_
        self.partial_fit(X, y, sample_weight)
        self.decomposition_  # noqa: B018 - what is wrong with n_components shows here
        return self

    def partial_fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Learn these rows (N, D), too. Raises RowError, with none learnt, if they can't be used."""
        first = not hasattr(self, "moments_")
        # Whether rows are finite is for the moments to say, which name them.
        X = validate_data(self, X, reset=first, dtype=FLOATS, ensure_all_finite=False)
        if first:
            self.moments_ = Moments(X.shape[1], self.dtype, self.nan_rows, self.syrk)
        self.moments_.add(X, sample_weight)
        self._decomposition: Decomposition | None = None
        return self

    def merge(self, other: "ExactIncrementalPCA") -> Self:
        """Learn what ``other`` has learnt. Raises RowError if it has other dimensions or another dtype."""
        self.moments_.merge(other.moments_)
        self._decomposition = None
        return self

    def transform(self, X: Any) -> NDArray[np.float64]:
        """Scores (N, K) in float64. Rows with NaN give NaN if they are skipped in fitting."""
        decomposition, finite = self.decomposition_, self.nan_rows == "refuse"
        return decomposition.project(validate_data(self, X, reset=False, dtype=FLOATS, ensure_all_finite=finite))

    def inverse_transform(self, X: Any) -> NDArray[np.float64]:
        """Rows (N, D) that have these scores (N, K), and none along other directions."""
        rows_ND: NDArray[np.float64] = np.asarray(X) @ self.components_ + self.mean_
        return rows_ND

    @property
    def decomposition_(self) -> Decomposition:
        """All of it. Raises NotFittedError before the first rows."""
        if not hasattr(self, "moments_"):
            raise NotFittedError(f"This {type(self).__name__} instance is not fitted yet: call fit or partial_fit.")
        found: Decomposition | None = self._decomposition
        if found is None:
            found = self._decomposition = decompose(self.moments_, self.n_components, self.solver)
        return found

    @property
    def components_(self) -> NDArray[np.float64]:
        """(K, D)."""
        return self.decomposition_.component_KD

    @property
    def explained_variance_(self) -> NDArray[np.float64]:
        """(K,), divided by n - 1."""
        return self.decomposition_.variance_K

    @property
    def explained_variance_ratio_(self) -> NDArray[np.float64]:
        """(K,)."""
        return self.decomposition_.variance_ratio_K

    @property
    def singular_values_(self) -> NDArray[np.float64]:
        """(K,), of the centred rows."""
        value_K: NDArray[np.float64] = np.sqrt(self.explained_variance_ * self.moments_.degrees)
        return value_K

    @property
    def mean_(self) -> NDArray[np.float64]:
        """(D,)."""
        return self.moments_.mean_D

    @property
    def n_samples_seen_(self) -> float:
        """Sum of the rows' weights."""
        return self.moments_.n

    @property
    def n_components_(self) -> int:
        """K."""
        return len(self.components_)

    @property
    def noise_variance_(self) -> float:
        """Mean variance of the min(N, D) - K directions that are left out."""
        left = min(self.moments_.n, self.n_features_in_) - self.n_components_
        decomposition = self.decomposition_
        return (
            max(decomposition.total_variance - float(decomposition.variance_K.sum()), 0.0) / left if left > 0 else 0.0
        )

    @property
    def _n_features_out(self) -> int:
        return self.n_components_

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "moments_")

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = self.nan_rows == "skip"
        return tags
