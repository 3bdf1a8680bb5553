"""The estimator: scikit-learn's own checks, its PCA, and learning in pieces."""

from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from personaspace.analysis.pca.estimator import ExactIncrementalPCA
from personaspace.analysis.pca.moments import RowError

ATTRIBUTES = ("explained_variance_", "explained_variance_ratio_", "singular_values_", "mean_", "noise_variance_")


@parametrize_with_checks(
    [
        ExactIncrementalPCA(),
        ExactIncrementalPCA(dtype="float32"),
        ExactIncrementalPCA(n_components=1, nan_rows="skip"),
        ExactIncrementalPCA(n_components=0.9),
    ]
)
def test_scikit_learns_checks(estimator: Any, check: Any) -> None:
    check(estimator)


def rows(count: int = 200, dimension: int = 12) -> np.ndarray:
    generator = np.random.default_rng(0)
    return generator.standard_normal((count, dimension)) * np.geomspace(3, 0.2, dimension) + 5


@pytest.mark.parametrize("components", [3, 0.8, None])
@pytest.mark.parametrize("shape", [(200, 12), (13, 12)])
def test_it_has_what_scikit_learns_pca_has(components: int | float | None, shape: tuple[int, int]) -> None:
    x_ND = rows(*shape)
    ours, theirs = ExactIncrementalPCA(components).fit(x_ND), PCA(components, svd_solver="full").fit(x_ND)
    for attribute in ATTRIBUTES:
        np.testing.assert_allclose(getattr(ours, attribute), getattr(theirs, attribute), err_msg=attribute, atol=1e-13)
    assert ours.n_components_ == theirs.n_components_
    assert ours.n_samples_seen_ == len(x_ND)
    sign_K = np.sign(np.einsum("kd,kd->k", ours.components_, theirs.components_))
    np.testing.assert_allclose(ours.components_, theirs.components_ * sign_K[:, None], atol=1e-10)
    np.testing.assert_allclose(ours.transform(x_ND), theirs.transform(x_ND) * sign_K, atol=1e-10)
    np.testing.assert_allclose(
        ours.inverse_transform(ours.transform(x_ND)), theirs.inverse_transform(theirs.transform(x_ND)), atol=1e-10
    )


def test_pieces_and_merges_are_one_fit() -> None:
    x_ND = rows()
    whole = ExactIncrementalPCA(4).fit(x_ND)
    pieces = ExactIncrementalPCA(4)
    for part in np.split(x_ND, [1, 3, 90]):
        pieces.partial_fit(part)
    merged = ExactIncrementalPCA(4).partial_fit(x_ND[100:]).merge(ExactIncrementalPCA(4).fit(x_ND[:100]))
    for other in (pieces, merged):
        np.testing.assert_allclose(other.components_, whole.components_, atol=1e-12)
        np.testing.assert_allclose(other.explained_variance_, whole.explained_variance_)
        np.testing.assert_allclose(other.transform(x_ND), whole.transform(x_ND), atol=1e-12)


def test_components_follow_every_row_that_is_learnt_and_fit_forgets() -> None:
    x_ND = rows()
    pca = ExactIncrementalPCA(2).fit(x_ND[:50])
    before_KD = pca.components_
    assert not np.allclose(pca.partial_fit(x_ND[50:]).components_, before_KD, atol=1e-6)
    np.testing.assert_array_equal(pca.fit(x_ND[:50]).components_, before_KD)


def test_weights_are_repetition() -> None:
    x_ND, weight_N = rows(), np.random.default_rng(1).integers(0, 3, 200)
    weighted = ExactIncrementalPCA(0.9).fit(x_ND, sample_weight=weight_N)
    repeated = ExactIncrementalPCA(0.9).fit(np.repeat(x_ND, weight_N, axis=0))
    for attribute in (*ATTRIBUTES, "components_", "n_samples_seen_"):
        np.testing.assert_allclose(getattr(weighted, attribute), getattr(repeated, attribute), rtol=1e-10, atol=1e-12)


def test_nan_rows_are_named_or_skipped() -> None:
    x_ND = rows()
    x_ND[7, 2] = np.nan
    with pytest.raises(RowError, match=r"1 of 200 rows hold NaN or infinity, the first is row 7: .* nan_rows=\"skip\""):
        ExactIncrementalPCA(2).fit(x_ND)
    skipping = ExactIncrementalPCA(2, nan_rows="skip").fit(x_ND)
    np.testing.assert_allclose(skipping.components_, ExactIncrementalPCA(2).fit(np.delete(x_ND, 7, 0)).components_)
    assert skipping.n_samples_seen_ == 199
    assert np.flatnonzero(np.isnan(skipping.transform(x_ND)).any(axis=1)).tolist() == [7]


def test_it_is_not_fitted_before_the_first_rows() -> None:
    with pytest.raises(NotFittedError, match="call fit or partial_fit"):
        ExactIncrementalPCA().transform(rows())
    assert not hasattr(ExactIncrementalPCA(), "components_")


def test_rows_are_not_copied_whole_and_stay_as_they_are() -> None:
    x_ND = rows().astype(np.float32)
    x_ND.setflags(write=False)
    assert ExactIncrementalPCA(2, dtype="float32").fit(x_ND).components_.shape == (2, 12)


def test_in_a_pipeline_with_names() -> None:
    pipeline = make_pipeline(StandardScaler(), clone(ExactIncrementalPCA(2))).set_output(transform="pandas")
    assert list(pipeline.fit_transform(rows()).columns) == ["exactincrementalpca0", "exactincrementalpca1"]
