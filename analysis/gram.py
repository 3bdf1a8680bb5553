"""Axis, first component and positions from inner products alone, which is all that resampling needs to know.

Vectors are `default`'s first, then the roles'. With K their Gram matrix and a the coefficients of the axis
(1 for `default`, -t/T for each role that counts t times of T), axis . v = K a, |axis|^2 = a K a, and PC1 is the leading
eigenvector of the roles' centred Gram matrix (the dual form of PCA). Shape suffixes: P draws, R roles, V = R + 1
vectors.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]


def axis_geometry(gram_PVV: Floats, times_PR: Floats) -> tuple[Floats, Floats]:
    """Positions of all roles on the axis ``(P, R)``: mean role at 0, `default` at 1; and abs(cosine) of axis and PC1.

    ``times_PR``: how often each role counts for both. NaN where fewer than two do.
    """
    usable_P = (times_PR > 0).sum(axis=1) > 1
    # The draws without an axis go through with even weights, since no eigensolver takes NaN.
    times_PR = np.where(usable_P[:, None], times_PR, 1.0)
    a_PV, share_PR = _axis(times_PR)
    along_PV = _apply(gram_PVV, a_PV)
    squared_P = (a_PV * along_PV).sum(axis=1)
    along_PR = along_PV[:, 1:] - (along_PV[:, 1:] * share_PR).sum(axis=1, keepdims=True)
    # A role that counts t times is a row times sqrt(t), about the weighted mean.
    root_PR = np.sqrt(times_PR)
    value_PR, vector_PRR = np.linalg.eigh(
        _centred(gram_PVV[:, 1:, 1:], share_PR) * root_PR[:, :, None] * root_PR[:, None, :]
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        along_pc1_P = (vector_PRR[:, :, -1] * root_PR * along_PR).sum(axis=1)
        cosine_P = np.abs(along_pc1_P) / np.sqrt(value_PR[:, -1] * squared_P)
        position_PR = along_PR / squared_P[:, None]
    return np.where(usable_P[:, None], position_PR, np.nan), np.where(usable_P, cosine_P, np.nan)


def held_out_positions(cross_PVV: Floats, fit_PVV: Floats, times_PR: Floats) -> Floats:
    """Positions ``(P, R)`` of held-out role vectors on the axis of others.

    ``cross_PVV[:, i, j]``: inner product of held-out vector i and fitted vector j; ``fit_PVV``: the Gram matrix of the
    latter.
    """
    a_PV, share_PR = _axis(times_PR)
    along_PR = _apply(cross_PVV, a_PV)[:, 1:]
    squared_P = (a_PV * _apply(fit_PVV, a_PV)).sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        position_PR: Floats = (along_PR - (along_PR * share_PR).sum(axis=1, keepdims=True)) / squared_P[:, None]
    return position_PR


def _axis(times_PR: Floats) -> tuple[Floats, Floats]:
    """Coefficients of the axis ``(P, V)``, and the share of each role in the mean role ``(P, R)``."""
    with np.errstate(invalid="ignore", divide="ignore"):
        share_PR = times_PR / times_PR.sum(axis=1, keepdims=True)
    return np.concatenate([np.ones((len(share_PR), 1)), -share_PR], axis=1), share_PR


def _apply(matrix_PVV: Floats, vector_PV: Floats) -> Floats:
    product: Floats = (matrix_PVV @ vector_PV[:, :, None])[:, :, 0]
    return product


def _centred(gram_PRR: Floats, share_PR: Floats) -> Floats:
    """The Gram matrices of vectors less their weighted mean."""
    mean_PR = _apply(gram_PRR, share_PR)
    overall_P = (mean_PR * share_PR).sum(axis=1)
    centred_PRR: Floats = gram_PRR - mean_PR[:, :, None] - mean_PR[:, None, :] + overall_P[:, None, None]
    return centred_PRR
