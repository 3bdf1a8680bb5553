"""How alike two arrangements of the same roles are, each measure beside what chance gives with as few roles.

The null relabels the roles of the second arrangement: it keeps both shapes and loses only who is who. All measures
grow with likeness. They are NaN where one side does not vary at all.
Shape suffixes: R roles, D hidden, L and M layers, C and K components, P permutations.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.stats import rankdata

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]


@dataclass(frozen=True, kw_only=True, slots=True)
class Matching:
    """Each component of the first arrangement with the one of the second that goes with it."""

    of_C: Indices
    """Index of the partner; -1 where the second has fewer components."""
    correlation_C: Floats
    """Signed Pearson correlation of the roles' scores with the partner's; NaN without one."""


def relabellings(groups: Sequence[object], draws: int, generator: np.random.Generator) -> Indices:
    """``(P, R)``: whose place each role takes, shuffled among the roles of one group."""
    roles = len(groups)
    order_PR = np.argsort(generator.random((draws, roles)), axis=1)
    code_R = np.unique(np.array([str(group) for group in groups]), return_inverse=True)[1]
    # A stable sort by group keeps the shuffled order within each group.
    dealt_PR = np.take_along_axis(order_PR, np.argsort(code_R[order_PR], axis=1, kind="stable"), axis=1)
    relabelled_PR = np.empty_like(dealt_PR)
    relabelled_PR[:, np.argsort(code_R, kind="stable")] = dealt_PR
    return relabelled_PR


def correlation(a_R: Floats, b_R: Floats) -> Floats:
    """Pearson correlation over the last axis; the other axes broadcast."""
    product: Floats = (_standard(a_R) * _standard(b_R)).sum(axis=-1)
    return product


def rank_correlation(a_R: Floats, b_R: Floats) -> Floats:
    """Spearman correlation over the last axis; the other axes broadcast."""
    return correlation(rankdata(a_R, axis=-1), rankdata(b_R, axis=-1))


def procrustes_similarity(a_RC: Floats, b_RC: Floats) -> Floats:
    """1 - disparity after the best shift, scale, rotation and reflection: 1 for the same shape, 0 for nothing shared.

    The disparity is that of ``scipy.spatial.procrustes``: with both centred and of norm 1, the squared sum of the
    singular values of their product is what the best fit leaves out. ``b_RC`` may have more axes in front.
    """
    a_RC, b_RC = _unit(a_RC), _unit(b_RC)
    product_CK = a_RC.T @ b_RC
    if not np.isfinite(product_CK).all():
        return np.full(product_CK.shape[:-2], np.nan)
    similarity: Floats = np.linalg.svd(product_CK, compute_uv=False).sum(axis=-1) ** 2
    return similarity


def centred_gram(x_RD: Floats) -> Floats:
    """Dual Gram matrix ``(R, R)`` of the centred rows, of Frobenius norm 1."""
    centred_RD = x_RD - x_RD.mean(axis=0)
    gram_RR = centred_RD @ centred_RD.T
    norm = np.linalg.norm(gram_RR)
    unit_RR: Floats = gram_RR / norm if norm > 0 else np.full_like(gram_RR, np.nan)
    return unit_RR


def linear_cka(gram_LRR: Floats, gram_MRR: Floats) -> Floats:
    """Linear CKA ``(L, M)`` (Kornblith et al. 2019, arXiv 1905.00414) of centred Gram matrices of norm 1.

    It compares the distances between the roles, and so needs neither equal widths nor a shared basis. With few roles
    in many dimensions it is far above 0 for unrelated spaces: read it beside its null only.
    """
    cka_LM: Floats = gram_LRR.reshape(len(gram_LRR), -1) @ gram_MRR.reshape(len(gram_MRR), -1).T
    return cka_LM


def match_components(a_RC: Floats, b_RK: Floats) -> Matching:
    """Pair the components so that the sum of the absolute correlations of the roles' scores is largest."""
    correlation_CK = _standard(a_RC.T) @ _standard(b_RK.T).T
    of_C, signed_C = np.full(len(correlation_CK), -1), np.full(len(correlation_CK), np.nan)
    rows, columns = linear_sum_assignment(np.nan_to_num(np.abs(correlation_CK)), maximize=True)
    of_C[rows], signed_C[rows] = columns, correlation_CK[rows, columns]
    return Matching(of_C=of_C, correlation_C=signed_C)


def offset_cosines(a_RD: Floats, b_RD: Floats) -> Floats:
    """Cosines ``(R, R)`` of each role's offset from the mean role in the first space with each in the second."""
    unit_RD, other_RD = (x - x.mean(axis=0) for x in (a_RD, b_RD))
    with np.errstate(invalid="ignore", divide="ignore"):
        unit_RD = unit_RD / np.linalg.norm(unit_RD, axis=1, keepdims=True)
        other_RD = other_RD / np.linalg.norm(other_RD, axis=1, keepdims=True)
    cosine_RR: Floats = unit_RD @ other_RD.T
    return cosine_RR


def _standard(x: Floats) -> Floats:
    """Mean 0 and norm 1 over the last axis; NaN where nothing varies."""
    centred = x - x.mean(axis=-1, keepdims=True)
    norm = np.linalg.norm(centred, axis=-1, keepdims=True)
    varies = norm > 1e-12 * np.abs(x).max(axis=-1, keepdims=True)
    standard: Floats = np.where(varies, centred / np.where(varies, norm, 1), np.nan)
    return standard


def _unit(x_RC: Floats) -> Floats:
    """Centred over the roles and of Frobenius norm 1."""
    centred_RC = x_RC - x_RC.mean(axis=-2, keepdims=True)
    norm = np.linalg.norm(centred_RC, axis=(-2, -1), keepdims=True)
    unit_RC: Floats = np.where(norm > 0, centred_RC / np.where(norm > 0, norm, 1), np.nan)
    return unit_RC
