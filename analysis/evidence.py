"""Is the axis real, and how sure is it? Measures of one layer, beside what chance gives, with bootstrap intervals.

Held out by question: the axis is fitted on every other question and the roles are placed by the rest, both ways round.
The null permutes the roles within each question, so that every role loses its identity while questions, and the mean
over roles, stay. Intervals are 95% basic bootstraps, over roles and over questions; the axis is fitted anew in each
draw. (Basic, not percentile: a draw has the noise of the sample twice, so its cosine lies below that of the sample; in
tests with a known truth percentile intervals of the cosine never held it.) Shape suffixes: R roles without default, V
= R + 1 vectors, H = 2 V vectors of the two halves, Q questions, C cells, P draws.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.stats import beta, rankdata

from personaspace.analysis.cells import Cells
from personaspace.analysis.config import AnalysisConfig
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Measures:
    """What is measured of one set of cells; NaN where it can't be."""

    cos_axis_pc1: float
    """abs(cosine) of the axis and the first principal component of the role vectors."""
    kind_auc: float
    """ROC AUC of one kind of roles against another, placed on an axis that never saw their questions."""
    rank_correlation: float
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

    The first ``(1 + roles) * questions`` cells are those of `default` and of the roles that the axis rests on, in that
    order; ``kinds``: of these roles.
    """
    generator = np.random.default_rng(config.seed)
    count_VQ = cells.count_C[: (1 + roles) * questions].reshape(1 + roles, questions)
    design = Design(count_VQ=count_VQ, kinds=tuple(kinds), config=config)
    observed_HH, rollouts_H = design.gram(cells, design.weights(), np.float64)
    observed = design.measure(observed_HH, rollouts_H)
    null = [
        design.measure(*design.gram(cells, weights, np.float32))
        for weights in design.permuted(generator, config.permutations)
    ]
    by_question = [
        design.measure(*design.gram(cells, weights, np.float32))
        for weights in design.resampled(generator, config.bootstrap)
    ]
    by_role = [
        design.measure(observed_HH, rollouts_H, generator.integers(roles, size=roles)) for _ in range(config.bootstrap)
    ]
    return Evidence(
        observed=observed,
        null_p99=_quantiles(null),
        # The squared cosine of random directions in D dimensions is Beta(1/2, (D-1)/2).
        cos_random_p99=float(np.sqrt(beta.ppf(QUANTILE, 0.5, (len(cells.shift_D) - 1) / 2))),
        intervals={
            "roles": _intervals(observed, by_role, roles),
            # Questions are drawn within their half.
            "questions": _intervals(observed, by_question, questions // 2),
        },
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Design:
    """Which cells there are, and how they are put together anew."""

    count_VQ: NDArray[np.int64]
    """Rollouts of `default` and each role, by question."""
    kinds: tuple[str, ...]
    config: AnalysisConfig

    def weights(self) -> csr_array:
        """Weights ``(H, C)`` of the vectors of both halves."""
        return self._deal(self._own(), np.ones(self.count_VQ.shape), self._half_of_question())

    def permuted(self, generator: np.random.Generator, draws: int) -> Iterator[csr_array]:
        """Weights where the roles that answered a question have dealt their answers out anew."""
        present_RQ, half_Q = self.count_VQ[1:] > 0, self._half_of_question()
        times = np.ones(self.count_VQ.shape)
        for _ in range(draws):
            key_RQ = generator.random(present_RQ.shape)
            taker_VQ = self._own()
            # Among the roles that are there, the one with the n-th smallest key takes the answer of the n-th role.
            order_RQ = np.argsort(np.where(present_RQ, key_RQ, 2.0), axis=0)
            place_RQ = np.cumsum(present_RQ, axis=0) - 1
            dealt_RQ = 1 + np.take_along_axis(order_RQ, np.maximum(place_RQ, 0), axis=0)
            taker_VQ[1:][present_RQ] = dealt_RQ[present_RQ]
            yield self._deal(taker_VQ, times, half_Q)

    def resampled(self, generator: np.random.Generator, draws: int) -> Iterator[csr_array]:
        """Weights where the questions of each half are drawn with replacement."""
        vectors, questions = self.count_VQ.shape
        halves, half_Q = self._halves(), self._half_of_question()
        for _ in range(draws):
            times_Q = np.zeros(questions, dtype=np.int64)
            for half in (half for half in halves if len(half)):
                times_Q += np.bincount(generator.choice(half, size=len(half)), minlength=questions)
            yield self._deal(self._own(), np.tile(times_Q, (vectors, 1)), half_Q)

    def gram(self, cells: Cells, weights: csr_array, dtype: type[np.floating]) -> tuple[Floats, Floats]:
        """Gram matrix ``(H, H)`` of the halves' vectors, and the rollouts in each ``(H,)``."""
        vector_HD, rollouts_H = cells.vectors(weights.astype(dtype))
        vector_HD = np.nan_to_num(vector_HD, copy=False)
        return (vector_HD @ vector_HD.T).astype(np.float64), rollouts_H

    def measure(self, gram_HH: Floats, rollouts_H: Floats, drawn_R: NDArray[np.intp] | None = None) -> Measures:
        """The measures of the halves' vectors. ``drawn_R``: roles drawn with replacement."""
        vectors = len(self.count_VQ)
        rollouts_2V = rollouts_H.reshape(2, vectors)
        total_V = rollouts_2V.sum(axis=0)
        present = 1 + np.flatnonzero(total_V[1:] > 0)
        drawn = present - 1 if drawn_R is None else drawn_R
        if not total_V[0] or len(np.unique(drawn)) < 2:
            nothing = np.full(vectors - 1, math.nan)
            return Measures(cos_axis_pc1=math.nan, kind_auc=math.nan, rank_correlation=math.nan, position_R=nothing)
        # A vector over all questions is the mean of its halves by their rollouts.
        share_2V = rollouts_2V / np.maximum(total_V, 1)
        joint_VH = np.concatenate([np.diag(share_V) for share_V in share_2V], axis=1)
        geometry = axis_geometry(joint_VH @ gram_HH @ joint_VH.T, drawn)
        auc = rank = math.nan
        if (rollouts_H > 0).all():
            halves = (slice(0, vectors), slice(vectors, None))
            placed = np.stack(
                [
                    held_out_positions(gram_HH[held, fit], gram_HH[fit, fit], drawn)[drawn]
                    for fit, held in (halves, halves[::-1])
                ]
            )
            rank = float(rank_correlation(placed[0], placed[1]))
            kind = np.array(self.kinds)[drawn]
            positive, negative = kind == self.config.positive_kind, kind == self.config.negative_kind
            if positive.any() and negative.any():
                auc = float(rank_auc(placed, positive, negative).mean())
        return Measures(
            cos_axis_pc1=geometry.cos_axis_pc1,
            kind_auc=auc,
            rank_correlation=rank,
            position_R=np.where(total_V[1:] > 0, geometry.position_R, np.nan),
        )

    def _halves(self) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Every other question that `default` and some role answered, and the rest."""
        asked = np.flatnonzero((self.count_VQ[0] > 0) & (self.count_VQ[1:] > 0).any(axis=0))
        other = np.setdiff1d(np.arange(self.count_VQ.shape[1]), asked)
        first, second = asked[0::2], asked[1::2]
        if len(second) < 2:
            return np.arange(self.count_VQ.shape[1]), np.empty(0, dtype=np.intp)
        # Questions that say nothing of the axis still belong to the roles' vectors.
        return np.sort(np.concatenate([first, other[0::2]])), np.sort(np.concatenate([second, other[1::2]]))

    def _own(self) -> NDArray[np.intp]:
        """``(V, Q)``: every vector takes its own answers."""
        vectors, questions = self.count_VQ.shape
        return np.tile(np.arange(vectors)[:, None], questions)

    def _half_of_question(self) -> NDArray[np.intp]:
        """``(Q,)``: 1 for the questions of the second half."""
        half_Q = np.zeros(self.count_VQ.shape[1], dtype=np.intp)
        half_Q[self._halves()[1]] = 1
        return half_Q

    def _deal(self, taker_VQ: NDArray[np.intp], times_VQ: Floats, half_Q: NDArray[np.intp]) -> csr_array:
        """Weights ``(H, C)`` that give the answers of cell (v, q) to vector ``taker_VQ[v, q]`` of q's half."""
        vectors, questions = self.count_VQ.shape
        row_VQ = taker_VQ + half_Q * vectors
        used = (self.count_VQ > 0) & (times_VQ > 0)
        cell_VQ = np.arange(vectors * questions).reshape(vectors, questions)
        shape = (2 * vectors, vectors * questions)
        return csr_array((times_VQ[used].astype(np.float64), (row_VQ[used], cell_VQ[used])), shape=shape)


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


def _intervals(observed: Measures, draws: Sequence[Measures], items: int) -> tuple[Measures, Measures]:
    ends: tuple[dict[str, Floats], dict[str, Floats]] = ({}, {})
    for name in MEASURED:
        values = np.array([getattr(draw, name) for draw in draws])
        found = basic_interval(np.asarray(getattr(observed, name)), values, items)
        for end, value in zip(ends, found, strict=True):
            end[name] = np.clip(value, *RANGES[name]) if name in RANGES else value
    low, high = (Measures(**end) for end in ends)  # type: ignore[arg-type]
    return low, high


def _quantiles(draws: Sequence[Measures]) -> Measures:
    """The quantile of each measure's null, over the draws that have it."""
    found = {name: _quantile(np.array([getattr(draw, name) for draw in draws]), QUANTILE) for name in MEASURED}
    return Measures(**found)  # type: ignore[arg-type]


def rank_auc(positions: Floats, is_positive: NDArray[np.bool_], is_negative: NDArray[np.bool_]) -> Floats:
    """ROC AUC over the last axis (roles), from the rank sum of the positives (Mann-Whitney)."""
    chosen = np.concatenate([positions[..., is_positive], positions[..., is_negative]], axis=-1)
    count, others = int(is_positive.sum()), int(is_negative.sum())
    rank_sum = rankdata(chosen, axis=-1)[..., :count].sum(axis=-1)
    area: Floats = (rank_sum - count * (count + 1) / 2) / (count * others)
    return area
