"""Is the axis real, and how sure is it? Measures of one layer, beside what chance gives, with bootstrap intervals.

Held out by question: the axis is fitted on every other question and the roles are placed by the rest, both ways round.
The null permutes the roles within each question, so that every role loses its identity while questions, and the mean
over roles, stay. Intervals are 95% basic bootstraps, over roles and over questions; the axis is fitted anew in each
draw. (Basic, not percentile: a draw has the noise of the sample twice, so its cosine lies below that of the sample; in
tests with a known truth percentile intervals of the cosine never held it.) Draws are measured in batches. Shape
suffixes: P draws, R roles without default, V = R + 1 vectors, H = 2 V vectors of the two halves, C cells.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.stats import beta, rankdata

from personaspace.analysis.cells import Cells
from personaspace.analysis.config import AnalysisConfig
from personaspace.analysis.design import Design
from personaspace.analysis.gram import Floats, axis_geometry, held_out_positions
from personaspace.analysis.similarity import rank_correlation

QUANTILE = 0.99
"""Of the nulls."""
LEVEL = 0.95
"""Of the intervals."""
RANGES = {"cos_axis_pc1": (0.0, 1.0), "kind_auc": (0.0, 1.0), "rank_correlation": (-1.0, 1.0)}
"""What each measure can be."""
MEASURED = (*RANGES, "position_R")
RESAMPLED = ("roles", "questions")
"""What the bootstrap draws anew."""
BATCH_BYTES = 2**25
"""Of the Gram matrices and vectors of one batch of draws."""
STRIP_BYTES = 2**23
"""Of the cells' sums that all draws of a batch pass over before the next dimensions: about what a cache holds."""
NARROWEST = 512
"""Dimensions of a strip, at least."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measures:
    """What is measured of one set of cells, or of each of several draws (an axis in front); NaN where it can't be."""

    cos_axis_pc1: Floats
    """abs(cosine) of the axis and the first principal component of the role vectors."""
    kind_auc: Floats
    """ROC AUC of one kind of roles against another, placed on an axis that never saw their questions."""
    rank_correlation: Floats
    """Spearman correlation of the roles' ranking between two halves of the questions: split-half reliability."""
    position_R: Floats
    """Position of every role, by all questions: the mean role at 0, `default` at 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """The measures of one layer, their nulls and intervals."""

    observed: Measures
    null_p99: Measures
    """99th percentile of each measure where roles are permuted; of the positions too."""
    cos_random_p99: float
    """What |cosine| two random directions of the hidden space reach: 99th percentile."""
    intervals: dict[str, tuple[Measures, Measures]]
    """Low and high end by what was resampled: `roles`, `questions`."""


def gather_evidence(cells: Cells, roles: int, questions: int, kinds: Sequence[str], config: AnalysisConfig) -> Evidence:
    """Put the axis of one layer to the test.

    The ``(1 + roles) * questions`` cells are those of `default` and of the roles that the axis rests on, in that order;
    ``kinds``: of these roles.
    """
    generator = np.random.default_rng(config.seed)
    design = Design(count_VQ=cells.count_C.reshape(1 + roles, questions))
    scale = Scale(vectors=1 + roles, kinds=tuple(kinds), config=config)
    batch = max(1, BATCH_BYTES // (2 * (1 + roles) * (8 * 2 * (1 + roles) + 4 * strip_width(cells))))
    own_PHH, rollouts_PH = scale.gram(cells, design.weights(), np.float64)
    observed = scale.measure(own_PHH, rollouts_PH)
    null = scale.measure_all(cells, design.permuted(generator, config.permutations, batch))
    by_question = scale.measure_all(cells, design.resampled(generator, config.bootstrap, batch))
    drawn_PR = generator.integers(roles, size=(config.bootstrap, roles))
    by_role = joined(
        scale.measure(own_PHH, rollouts_PH, drawn_PR[start : start + batch])
        for start in range(0, config.bootstrap, batch)
    )
    first = Measures(**{name: getattr(observed, name)[0] for name in MEASURED})
    return Evidence(
        observed=first,
        null_p99=Measures(**{name: _quantile(getattr(null, name), QUANTILE) for name in MEASURED}),
        # The squared cosine of random directions in D dimensions is Beta(1/2, (D-1)/2).
        cos_random_p99=float(np.sqrt(beta.ppf(QUANTILE, 0.5, (len(cells.shift_D) - 1) / 2))),
        intervals={
            "roles": _intervals(first, by_role, roles),
            # Questions are drawn within their half.
            "questions": _intervals(first, by_question, questions // 2),
        },
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """What the vectors of both halves are measured by."""

    vectors: int
    """V."""
    kinds: tuple[str, ...]
    """Of the roles."""
    config: AnalysisConfig

    def measure_all(self, cells: Cells, batches: Iterable[csr_array]) -> Measures:
        """The measures of every draw, from the weights of batches of them; float32 does for a spread."""
        return joined(self.measure(*self.gram(cells, weights, np.float32)) for weights in batches)

    def gram(self, cells: Cells, weights: csr_array, dtype: type[np.floating]) -> tuple[Floats, Floats]:
        """Gram matrices ``(P, H, H)`` of the halves' vectors, and the rollouts in each ``(P, H)``."""
        rollouts_X = weights @ cells.count_C.astype(np.float64)
        mean_XC = weights.multiply(1 / np.maximum(rollouts_X, 1)[:, None]).tocsr().astype(dtype)
        halves, hidden = 2 * self.vectors, len(cells.shift_D)
        gram_PHH = np.zeros((len(rollouts_X) // halves, halves, halves))
        strip = strip_width(cells)
        for start in range(0, hidden, strip):
            vector_PHD = (mean_XC @ cells.sum_CD[:, start : start + strip]).reshape(len(gram_PHH), halves, -1)
            gram_PHH += vector_PHD @ vector_PHD.transpose(0, 2, 1)
        return gram_PHH, rollouts_X.reshape(-1, halves)

    def measure(self, gram_PHH: Floats, rollouts_PH: Floats, drawn_PR: NDArray[np.intp] | None = None) -> Measures:
        """The measures of each draw. ``drawn_PR``: roles drawn with replacement, from vectors that are all the same."""
        vectors, roles = self.vectors, self.vectors - 1
        rollouts_P2V = rollouts_PH.reshape(-1, 2, vectors)
        total_PV = rollouts_P2V.sum(axis=1)
        if drawn_PR is None:
            drawn_PR = np.broadcast_to(np.arange(roles), (len(total_PV), roles))
        draws = len(drawn_PR)
        has_axis_PR = (total_PV[:, 1:] > 0) & (total_PV[:, :1] > 0)
        times_PR = (drawn_PR[:, :, None] == np.arange(roles)).sum(axis=1) * has_axis_PR
        # A vector over all questions is the mean of its halves by their rollouts.
        share_P2V = rollouts_P2V / np.maximum(total_PV, 1)[:, None]
        gram_P2V2V = gram_PHH.reshape(-1, 2, vectors, 2, vectors)
        joint_PVV = np.einsum("piv,pivjw,pjw->pvw", share_P2V, gram_P2V2V, share_P2V, optimize=True)
        position_PR, cosine_P = axis_geometry(np.broadcast_to(joint_PVV, (draws, vectors, vectors)), times_PR)
        auc_P = rank_P = np.full(draws, math.nan)
        whole_P = np.broadcast_to((rollouts_PH > 0).all(axis=1), draws) & ((times_PR > 0).sum(axis=1) > 1)
        if whole_P.any():
            placed_2PR = np.stack(
                [
                    np.take_along_axis(
                        held_out_positions(gram_P2V2V[:, held, :, fit], gram_P2V2V[:, fit, :, fit], times_PR),
                        drawn_PR,
                        axis=1,
                    )
                    for fit, held in ((0, 1), (1, 0))
                ]
            )
            rank_P = np.where(whole_P, rank_correlation(*placed_2PR), math.nan)
            kind_PR = np.array(self.kinds)[drawn_PR]
            positive_PR, negative_PR = kind_PR == self.config.positive_kind, kind_PR == self.config.negative_kind
            auc_P = np.where(whole_P, rank_auc(placed_2PR, positive_PR, negative_PR).mean(axis=0), math.nan)
        return Measures(
            cos_axis_pc1=cosine_P,
            kind_auc=auc_P,
            rank_correlation=rank_P,
            position_R=np.where(total_PV[:, 1:] > 0, position_PR, np.nan),
        )


def strip_width(cells: Cells) -> int:
    """Dimensions that are worked on at a time."""
    return min(len(cells.shift_D), max(NARROWEST, STRIP_BYTES // (4 * len(cells.count_C))))


def joined(batches: Iterable[Measures]) -> Measures:
    """The draws of all batches."""
    found = list(batches)
    return Measures(**{name: np.concatenate([getattr(batch, name) for batch in found]) for name in MEASURED})


def basic_interval(observed: Floats, draws: Floats, items: int) -> tuple[Floats, Floats]:
    """Basic bootstrap interval: the draws' distances from the observed value, turned round. Axis 0: draws.

    Draws from n items have (n - 1) / n of the variance that is meant, which is put right. Draws without a value (NaN)
    are left out.
    """
    tail = (1 - LEVEL) / 2
    distance = (draws - observed) * math.sqrt(items / max(1, items - 1))
    return observed - _quantile(distance, 1 - tail), observed - _quantile(distance, tail)


def _quantile(draws: Floats, quantile: float) -> Floats:
    """The quantile over axis 0 of the draws that have a value; NaN where none has."""
    known = np.isfinite(draws).any(axis=0)
    found: Floats = np.full(draws.shape[1:], math.nan)
    if known.any():
        found[known] = np.nanquantile(draws[:, known], quantile, axis=0)
    return found


def _intervals(observed: Measures, draws: Measures, items: int) -> tuple[Measures, Measures]:
    ends: tuple[dict[str, Floats], dict[str, Floats]] = ({}, {})
    for name in MEASURED:
        found = basic_interval(getattr(observed, name), getattr(draws, name), items)
        for end, value in zip(ends, found, strict=True):
            end[name] = np.clip(value, *RANGES[name]) if name in RANGES else value
    low, high = (Measures(**end) for end in ends)
    return low, high


def rank_auc(positions: Floats, is_positive: NDArray[np.bool_], is_negative: NDArray[np.bool_]) -> Floats:
    """ROC AUC over the last axis (roles), from the rank sum of the positives (Mann-Whitney); NaN without both kinds."""
    count, others = is_positive.sum(axis=-1), is_negative.sum(axis=-1)
    # What is neither comes last, where it changes no rank.
    rank = rankdata(np.where(is_positive | is_negative, positions, np.inf), axis=-1)
    rank_sum = (rank * is_positive).sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        area: Floats = (rank_sum - count * (count + 1) / 2) / (count * others)
    return area
