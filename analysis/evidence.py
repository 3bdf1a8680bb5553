"""Is the axis real? Held-out tests of one layer, each beside what chance gives at this size.

The null permutes the roles within each question: the mean over roles, and with it the axis, stays as it is,
while every role loses its identity. Shape suffixes: R roles without default, Q questions, D hidden,
P permutations.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh
from scipy.sparse import csr_array
from scipy.stats import beta, rankdata

from personaspace.analysis.cells import Cells
from personaspace.analysis.config import AnalysisConfig
from personaspace.analysis.space import PersonaSpace

QUANTILE = 0.99
"""Of the nulls."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """Measures of one layer and the 99th percentile of their nulls; NaN where they can't be computed."""

    cos_axis_pc1: float
    """abs(cosine) of the axis and the first principal component of the role vectors."""
    cos_null_p99: float
    cos_random_p99: float
    """The same for two random directions of the hidden space."""
    auc: float
    """ROC AUC of one kind of roles against another, placed on an axis that never saw their questions."""
    auc_null_p99: float
    rank_correlation: float
    """Spearman correlation of the roles' ranking between two halves of the questions."""
    rank_correlation_null_p99: float


def gather_evidence(
    space: PersonaSpace, default: Cells, roles: Cells, kinds: Sequence[str], config: AnalysisConfig
) -> Evidence:
    """Put the axis of one layer to the test. ``default`` holds one role, ``roles`` the others, with their ``kinds``.

    Held out by question: the axis is fitted on every other question and the roles are placed by the rest, both
    ways, and the two results are averaged.
    """
    permutations, generator = config.permutations, np.random.default_rng(config.seed)
    auc = auc_null = rank = rank_null = float("nan")
    halves = _halves(default, roles)
    if halves is not None:
        # Each answer's place on the axis of the other half is computed once; the null only deals them out anew.
        places = [_place(default, roles, fit, held_out) for fit, held_out in (halves, halves[::-1])]
        observed = np.stack([np.nanmean(place_RQ, axis=1) for place_RQ in places])
        null = np.stack([_permuted_positions(place_RQ, permutations, generator) for place_RQ in places])
        rank = float(_spearman(observed[0], observed[1]))
        rank_null = float(np.quantile(_spearman(null[0], null[1]), QUANTILE))
        is_positive = np.array([kind == config.positive_kind for kind in kinds])
        is_negative = np.array([kind == config.negative_kind for kind in kinds])
        if is_positive.any() and is_negative.any():
            auc = float(_auc(observed, is_positive, is_negative).mean())
            auc_null = float(np.quantile(_auc(null, is_positive, is_negative).mean(axis=0), QUANTILE))
    return Evidence(
        cos_axis_pc1=float(abs(_cosine(space.axis_D, space.component_KD[0]))),
        cos_null_p99=float(np.quantile(_cosine_null(space.axis_D, roles, permutations, generator), QUANTILE)),
        # The squared cosine of random directions in D dimensions is Beta(1/2, (D-1)/2).
        cos_random_p99=float(np.sqrt(beta.ppf(QUANTILE, 0.5, (len(space.axis_D) - 1) / 2))),
        auc=auc,
        auc_null_p99=auc_null,
        rank_correlation=rank,
        rank_correlation_null_p99=rank_null,
    )


def _halves(default: Cells, roles: Cells) -> tuple[NDArray[np.intp], NDArray[np.intp]] | None:
    """Every other question; None if default or a role has nothing in one of the halves."""
    asked = np.flatnonzero((default.count_RQ > 0).all(axis=0) & (roles.count_RQ > 0).any(axis=0))
    first, second = asked[0::2], asked[1::2]
    if len(second) < 2 or any((roles.count_RQ[:, half] == 0).all(axis=1).any() for half in (first, second)):
        return None
    return first, second


def _place(default: Cells, roles: Cells, fit: NDArray[np.intp], held_out: NDArray[np.intp]) -> NDArray[np.float64]:
    """Projection ``(R, Q/2)`` of the held-out cells on the axis of the other questions; NaN for empty cells."""
    axis_D = default.questions(fit).role_means()[0] - roles.questions(fit).role_means().mean(axis=0)
    place_RQ: NDArray[np.float64] = roles.questions(held_out).mean_RQD @ axis_D
    return place_RQ


def _permutations(roles: int, questions: int, draws: int, generator: np.random.Generator) -> NDArray[np.intp]:
    """``(P, R, Q)``: which role's answer each role is dealt, shuffled within each question."""
    return np.argsort(generator.random((draws, roles, questions)), axis=1)


def _permuted_positions(
    place_RQ: NDArray[np.float64], permutations: int, generator: np.random.Generator
) -> NDArray[np.float64]:
    """Role positions ``(P, R)`` after permuting the roles within each question."""
    roles, questions = place_RQ.shape
    dealt_PRQ = _permutations(roles, questions, permutations, generator)
    positions_PR: NDArray[np.float64] = np.nanmean(np.take_along_axis(place_RQ[None], dealt_PRQ, axis=1), axis=2)
    return positions_PR


def _cosine_null(
    axis_D: NDArray[np.float64], roles: Cells, permutations: int, generator: np.random.Generator
) -> NDArray[np.float64]:
    """abs(cosine) of the axis with PC1 of permuted role means ``(P,)``."""
    cells_CD = _filled(roles)
    count, questions = roles.count_RQ.shape
    cosines = np.empty(permutations)
    for draw in range(permutations):
        dealt_RQ = _permutations(count, questions, 1, generator)[0]
        # One sparse product deals out and averages, without ever copying the cells.
        columns = (dealt_RQ * questions + np.arange(questions)).ravel()
        dealing = csr_array((np.full(columns.size, 1 / questions), columns, np.arange(count + 1) * questions))
        role_RD = dealing @ cells_CD
        centred_RD = role_RD - role_RD.mean(axis=0)
        # PC1 by the small Gram matrix of the roles, of which only the last eigenvector is wanted.
        _, vector_R1 = eigh(centred_RD @ centred_RD.T, subset_by_index=[count - 1, count - 1])
        cosines[draw] = abs(_cosine(axis_D, vector_R1[:, 0] @ centred_RD))
    return cosines


def _filled(roles: Cells) -> NDArray[np.float64]:
    """Cells ``(C, D)`` with empty ones replaced by their question's mean, which adds nothing to any role."""
    present_RQ = roles.count_RQ > 0
    mean_QD = np.nansum(roles.mean_RQD, axis=0) / np.maximum(present_RQ.sum(axis=0), 1)[:, None]
    filled: NDArray[np.float64] = np.where(present_RQ[:, :, None], roles.mean_RQD, mean_QD)
    return filled.reshape(-1, filled.shape[-1])


def _cosine(a_D: NDArray[np.float64], b_D: NDArray[np.float64]) -> float:
    return float(a_D @ b_D / (np.linalg.norm(a_D) * np.linalg.norm(b_D)))


def _spearman(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Spearman correlation over the last axis."""
    ranks = [rankdata(x, axis=-1) for x in (a, b)]
    left, right = (rank - rank.mean(axis=-1, keepdims=True) for rank in ranks)
    norm = np.sqrt((left**2).sum(axis=-1) * (right**2).sum(axis=-1))
    correlation: NDArray[np.float64] = (left * right).sum(axis=-1) / norm
    return correlation


def _auc(
    positions: NDArray[np.float64], is_positive: NDArray[np.bool_], is_negative: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """ROC AUC over the last axis (roles), from the rank sum of the positives (Mann-Whitney)."""
    chosen = np.concatenate([positions[..., is_positive], positions[..., is_negative]], axis=-1)
    count, others = int(is_positive.sum()), int(is_negative.sum())
    rank_sum = rankdata(chosen, axis=-1)[..., :count].sum(axis=-1)
    area: NDArray[np.float64] = (rank_sum - count * (count + 1) / 2) / (count * others)
    return area
