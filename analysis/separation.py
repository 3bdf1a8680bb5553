"""How well the axis tells `default` from the roles, rollout by rollout, on questions that it has not seen.

Cross-validation by scikit-learn, grouped by question: the axis of each fold is fitted on the other folds' questions.
Shape suffixes: N rollouts, V = R + 1 vectors, Q questions, F folds, D hidden, B draws.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata, spearmanr
from sklearn.model_selection import GroupKFold

from personaspace.analysis.cells import Cells, selection
from personaspace.analysis.evidence import basic_interval

FOLDS = 5
Floats = NDArray[np.floating]


@dataclass(frozen=True, kw_only=True, slots=True)
class Folds:
    """Axes that were fitted without the questions of one fold each."""

    fold_Q: NDArray[np.intp]
    """The fold of each question; -1 for those that `default` or all roles lack."""
    axis_FD: Floats
    """Scaled so that the step from the mean role to `default` has length 1."""

    def places(self, x_ND: NDArray[np.float32], question_N: NDArray[np.integer]) -> Floats:
        """Each rollout's place ``(N,)`` on the axis of its own question's fold; NaN where there is none.

        ``x_ND`` may be less any point, the same for all: places are compared only with each other.
        """
        place_NF = x_ND @ self.axis_FD.T.astype(x_ND.dtype)
        fold_N = self.fold_Q[question_N]
        place_N: Floats = np.where(fold_N >= 0, place_NF[np.arange(len(x_ND)), fold_N], np.nan)
        return place_N


def fit_folds(cells: Cells, roles: int, questions: int) -> Folds | None:
    """The axes of all folds, or None where fewer than two questions have `default` and a role."""
    count_VQ = cells.count_C[: (1 + roles) * questions].reshape(1 + roles, questions)
    asked = np.flatnonzero((count_VQ[0] > 0) & (count_VQ[1:] > 0).any(axis=0))
    if len(asked) < 2:
        return None
    fold_Q = np.full(questions, -1, dtype=np.intp)
    axes = []
    splitter = GroupKFold(n_splits=min(FOLDS, len(asked)))
    for fold, (train, test) in enumerate(splitter.split(asked, groups=asked)):
        fold_Q[asked[test]] = fold
        chosen = [vector * questions + asked[train] for vector in range(1 + roles)]
        vector_VD, rollouts_V = cells.vectors(selection(chosen, len(cells.count_C)))
        axis_D = vector_VD[0] - vector_VD[1:][rollouts_V[1:] > 0].mean(axis=0)
        axes.append(axis_D / (axis_D @ axis_D))
    return Folds(fold_Q=fold_Q, axis_FD=np.stack(axes))


@dataclass(frozen=True, kw_only=True, slots=True)
class Separation:
    """ROC AUC of `default` against role rollouts, and 95% intervals by what was resampled."""

    auc: float
    interval: dict[str, tuple[float, float]]


def separation(
    place_N: Floats,
    role_N: NDArray[np.integer],
    question_N: NDArray[np.integer],
    folds: Folds,
    *,
    roles: int,
    draws: int,
    generator: np.random.Generator,
) -> Separation:
    """AUC of held-out places, folds apart. ``role_N``: 0 for `default`, 1 to ``roles``, -1 for what doesn't count.

    The AUC is a share of pairs (a `default` rollout, a role's rollout), so a bootstrap draw needs no new ranking,
    only the pairs that each role, and each pair of questions, has won.
    """
    questions = len(folds.fold_Q)
    won_R, pairs_R = np.zeros(roles), np.zeros(roles)
    won_QQ, pairs_QQ = np.zeros((questions, questions)), np.zeros((questions, questions))
    for fold in range(len(folds.axis_FD)):
        of_fold = (folds.fold_Q[question_N] == fold) & np.isfinite(place_N)
        own, others = np.flatnonzero(of_fold & (role_N == 0)), np.flatnonzero(of_fold & (role_N > 0))
        for question in np.unique(question_N[others]).tolist():
            members = others[question_N[others] == question]
            won_N = _won(place_N[own], place_N[members])
            np.add.at(won_QQ[:, question], question_N[own], won_N)
            np.add.at(pairs_QQ[:, question], question_N[own], len(members))
        for role in np.unique(role_N[others]).tolist():
            members = others[role_N[others] == role]
            won_R[role - 1] += _won(place_N[own], place_N[members]).sum()
            pairs_R[role - 1] += len(own) * len(members)
    times_BR = _draws(roles, draws, generator)
    times_BQ = np.zeros((draws, questions))
    asked = np.flatnonzero(folds.fold_Q >= 0)
    times_BQ[:, asked] = _draws(len(asked), draws, generator)
    with np.errstate(invalid="ignore", divide="ignore"):
        by_role = (times_BR @ won_R) / (times_BR @ pairs_R)
        by_question = np.einsum("bp,pq,bq->b", times_BQ, won_QQ, times_BQ, optimize=True)
        by_question /= np.einsum("bp,pq,bq->b", times_BQ, pairs_QQ, times_BQ, optimize=True)
        auc = np.asarray(won_R.sum() / pairs_R.sum())
    ends = {"roles": basic_interval(auc, by_role, roles), "questions": basic_interval(auc, by_question, len(asked))}
    clipped = {name: (float(np.clip(low, 0, 1)), float(np.clip(high, 0, 1))) for name, (low, high) in ends.items()}
    return Separation(auc=float(auc), interval=clipped)


def length_correlation(position_N: Floats, tokens_N: NDArray[np.integer], role_N: NDArray[np.integer]) -> Floats:
    """Spearman correlation of position and response length: over all rollouts, and within roles (ranks less their
    role's mean): ``(2,)``.
    """
    used = role_N >= 0
    of_role = role_N[used]
    ranks = [rankdata(values[used]) for values in (position_N, tokens_N)]
    if any(np.ptp(rank) == 0 for rank in ranks):
        return np.full(2, np.nan)
    overall = spearmanr(position_N[used], tokens_N[used]).statistic
    count = np.maximum(np.bincount(of_role), 1)
    within = [rank - (np.bincount(of_role, rank) / count)[of_role] for rank in ranks]
    norm = np.sqrt((within[0] ** 2).sum() * (within[1] ** 2).sum())
    return np.array([overall, (within[0] @ within[1]) / norm if norm else np.nan])


def _won(own_N: Floats, other_N: Floats) -> Floats:
    """How many of the others each lies above; a tie counts half."""
    ordered = np.sort(other_N)
    won_N: Floats = (np.searchsorted(ordered, own_N, "left") + np.searchsorted(ordered, own_N, "right")) / 2
    return won_N


def _draws(items: int, draws: int, generator: np.random.Generator) -> Floats:
    """How often each item is drawn, ``(B, items)``."""
    times: Floats = generator.multinomial(items, np.full(items, 1 / items), size=draws).astype(np.float64)
    return times
