"""Is the axis real? Held-out tests per layer, each beside what chance gives at this size.

The null permutes the roles within each question: the mean over roles, and with it the axis, stays as it is,
while every role loses its identity. Shape suffixes: R roles without default, Q questions, L layers, D hidden,
P permutations.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta, rankdata

from personaspace.analysis.cells import Cells
from personaspace.analysis.space import cosine, fit_space

QUANTILE = 0.99
"""Of the nulls."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """Measures per layer ``(L,)`` and the 99th percentile of their nulls; NaN where they can't be computed."""

    cos_axis_pc1: NDArray[np.float64]
    """abs(cosine) of the axis and the first principal component of the role vectors."""
    cos_null_p99: NDArray[np.float64]
    cos_random_p99: NDArray[np.float64]
    """The same for two random directions of the hidden space."""
    auc: NDArray[np.float64]
    """ROC AUC of one kind of roles against another, placed on an axis that never saw their questions."""
    auc_null_p99: NDArray[np.float64]
    rank_correlation: NDArray[np.float64]
    """Spearman correlation of the roles' ranking between two halves of the questions."""
    rank_correlation_null_p99: NDArray[np.float64]


def gather_evidence(
    default: Cells, roles: Cells, kinds: Sequence[str], *, positive: str, negative: str, permutations: int, seed: int
) -> Evidence:
    """Put the axis to the test. ``default`` holds one role, ``roles`` the others, ``kinds`` one kind per role.

    Held out by question: the axis is fitted on every other question and the roles are placed by the rest, both
    ways, and the two results are averaged.
    """
    generator = np.random.default_rng(seed)
    layers, hidden = roles.mean_RQLD.shape[2:]
    cos_observed, cos_null = _axis_against_pc1(default, roles, permutations, generator)
    nothing = np.full(layers, np.nan)
    auc = auc_null = rank = rank_null = nothing
    halves = _halves(default, roles)
    if halves is not None:
        # Place each role's answer to each question on the axis of the other half, once; nulls only reorder them.
        place_LRQ = [_place(default, roles, fit, held_out) for fit, held_out in (halves, halves[::-1])]
        observed = np.stack([_role_positions(place) for place in place_LRQ])
        null = np.stack([_permuted_positions(place, permutations, generator) for place in place_LRQ])
        rank = _spearman(observed[0], observed[1])
        rank_null = np.quantile(_spearman(null[0], null[1]), QUANTILE, axis=-1)
        is_positive, is_negative = (np.array([kind == name for kind in kinds]) for name in (positive, negative))
        if is_positive.any() and is_negative.any():
            auc = _auc(observed, is_positive, is_negative).mean(axis=0)
            auc_null = np.quantile(_auc(null, is_positive, is_negative).mean(axis=0), QUANTILE, axis=-1)
    return Evidence(
        cos_axis_pc1=cos_observed,
        cos_null_p99=np.quantile(cos_null, QUANTILE, axis=0),
        # The squared cosine of random directions in D dimensions is Beta(1/2, (D-1)/2).
        cos_random_p99=np.full(layers, np.sqrt(beta.ppf(QUANTILE, 0.5, (hidden - 1) / 2))),
        auc=auc,
        auc_null_p99=auc_null,
        rank_correlation=rank,
        rank_correlation_null_p99=rank_null,
    )


def _axis_against_pc1(
    default: Cells, roles: Cells, permutations: int, generator: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    default_LD = default.role_means()[0]
    space = fit_space(default_LD, roles.role_means(), components=1)
    observed = np.abs(cosine(space.axis_LD, space.component_LKD[:, 0]))
    null = np.empty((permutations, len(observed)))
    filled = _fill(roles)
    for draw in range(permutations):
        role_RLD = _permute_roles(filled, generator).mean(axis=1)
        null[draw] = np.abs(_cosine_with_pc1(space.axis_LD, role_RLD))
    return observed, null


def _cosine_with_pc1(axis_LD: NDArray[np.float64], role_RLD: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cosine with the first principal component, by the small Gram matrix of the roles."""
    centred_LRD = np.moveaxis(role_RLD - role_RLD.mean(axis=0), 1, 0)
    _, vectors = np.linalg.eigh(centred_LRD @ np.swapaxes(centred_LRD, 1, 2))
    return cosine(axis_LD, np.einsum("lr,lrd->ld", vectors[:, :, -1], centred_LRD))


def _halves(default: Cells, roles: Cells) -> tuple[NDArray[np.intp], NDArray[np.intp]] | None:
    """Two halves of the questions that default and every role answered; None if there are fewer than four."""
    complete = np.flatnonzero((default.count_RQ > 0).all(axis=0) & (roles.count_RQ > 0).any(axis=0))
    if len(complete) < 4 or any((roles.count_RQ[:, complete[half::2]] == 0).all(axis=1).any() for half in (0, 1)):
        return None
    return complete[0::2], complete[1::2]


def _place(
    default: Cells, roles: Cells, fit: NDArray[np.intp], held_out: NDArray[np.intp]
) -> NDArray[np.float64]:
    """Projection ``(L, R, Q/2)`` of the held-out cells on the axis of the other questions; NaN for empty cells."""
    fitted_default = Cells(mean_RQLD=default.mean_RQLD[:, fit], count_RQ=default.count_RQ[:, fit])
    fitted_roles = Cells(mean_RQLD=roles.mean_RQLD[:, fit], count_RQ=roles.count_RQ[:, fit])
    axis_LD = fitted_default.role_means()[0] - fitted_roles.role_means().mean(axis=0)
    placed: NDArray[np.float64] = np.einsum("rqld,ld->lrq", roles.mean_RQLD[:, held_out], axis_LD, optimize=True)
    return placed


def _role_positions(place_LRQ: NDArray[np.float64]) -> NDArray[np.float64]:
    positions: NDArray[np.float64] = np.nanmean(place_LRQ, axis=2)
    return positions


def _permuted_positions(
    place_LRQ: NDArray[np.float64], permutations: int, generator: np.random.Generator
) -> NDArray[np.float64]:
    """Role positions ``(L, P, R)`` after permuting the roles within each question."""
    place_RQL = np.moveaxis(place_LRQ, 0, 2)
    draws = [np.nanmean(_permute_roles(place_RQL, generator), axis=1) for _ in range(permutations)]
    return np.moveaxis(np.stack(draws), 2, 0)


def _permute_roles(cells_RQ: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.float64]:
    """Shuffle the first axis independently for each entry of the second."""
    order_RQ = generator.permuted(np.tile(np.arange(cells_RQ.shape[0])[:, None], (1, cells_RQ.shape[1])), axis=0)
    return cells_RQ[order_RQ, np.arange(cells_RQ.shape[1])]


def _fill(roles: Cells) -> NDArray[np.float64]:
    """Cells with empty ones replaced by their question's mean, which adds nothing to any role."""
    counted_QLD = np.nansum(roles.mean_RQLD, axis=0)
    mean_QLD = counted_QLD / np.maximum((roles.count_RQ > 0).sum(axis=0), 1)[:, None, None]
    return np.where(np.isnan(roles.mean_RQLD), mean_QLD, roles.mean_RQLD)


def _spearman(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Spearman correlation over the last axis."""
    ranks_a, ranks_b = (rankdata(x, axis=-1) for x in (a, b))
    ranks_a, ranks_b = (r - r.mean(axis=-1, keepdims=True) for r in (ranks_a, ranks_b))
    norm = np.sqrt((ranks_a**2).sum(axis=-1) * (ranks_b**2).sum(axis=-1))
    correlation: NDArray[np.float64] = (ranks_a * ranks_b).sum(axis=-1) / norm
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
