"""Separation of default and roles on held-out questions, and what length has to do with it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from personaspace.analysis.cells import Cells
from personaspace.analysis.separation import Folds, fit_folds, length_correlation, separation

ROLES, QUESTIONS, HIDDEN = 6, 10, 8


def run(strength: float, seed: int = 0, samples: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray, Cells]:
    """Rollouts ``(N, HIDDEN)``, their role (0: default) and question, and their cells."""
    generator = np.random.default_rng(seed)
    role_N = np.repeat(np.arange(1 + ROLES), QUESTIONS * samples)
    question_N = np.tile(np.arange(QUESTIONS), (1 + ROLES) * samples)
    question_QD = generator.normal(size=(QUESTIONS, HIDDEN))
    x_ND = (generator.normal(size=(len(role_N), HIDDEN)) + question_QD[question_N]).astype(np.float32)
    x_ND[role_N == 0, 0] += strength
    cells = Cells.empty((1 + ROLES) * QUESTIONS, x_ND.mean(0))
    cells.add(x_ND, role_N * QUESTIONS + question_N)
    return x_ND, role_N, question_N, cells


def separate(strength: float, seed: int = 0) -> tuple[float, dict[str, tuple[float, float]]]:
    x_ND, role_N, question_N, cells = run(strength, seed)
    folds = fit_folds(cells, ROLES, QUESTIONS)
    assert folds is not None
    place_N = folds.places(x_ND - cells.shift_D, question_N)
    found = separation(
        place_N, role_N, question_N, folds, roles=ROLES, draws=200, generator=np.random.default_rng(seed)
    )
    return found.auc, found.interval


def test_a_default_of_its_own_is_told_from_the_roles_and_noise_is_not() -> None:
    auc, interval = separate(3.0)
    assert auc > 0.95
    assert interval["questions"][0] > 0.9
    aucs = [separate(0.0, seed)[0] for seed in range(10)]
    assert np.mean(aucs) == pytest.approx(0.5, abs=0.06), "in the sample it would be far above"


def test_the_axis_of_a_fold_has_not_seen_its_questions() -> None:
    x_ND, role_N, question_N, cells = run(1.0)
    folds = fit_folds(cells, ROLES, QUESTIONS)
    assert folds is not None
    assert sorted(folds.fold_Q.tolist()) == sorted([*range(5), *range(5)])
    for fold, axis_D in enumerate(folds.axis_FD):
        seen = folds.fold_Q[question_N] != fold
        means = [x_ND[seen & (role_N == role)].mean(0, dtype=np.float64) for role in range(1 + ROLES)]
        expected_D = means[0] - np.mean(means[1:], axis=0)
        np.testing.assert_allclose(axis_D, expected_D / (expected_D @ expected_D), rtol=1e-4, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), levels=st.integers(2, 50))
def test_the_auc_is_that_of_scikit_learn_within_folds(seed: int, levels: int) -> None:
    """Of all pairs within a fold, ties counting half."""
    generator = np.random.default_rng(seed)
    role_N, question_N = generator.integers(-1, 4, size=80), generator.integers(0, 6, size=80)
    role_N[:8], question_N[:8] = [0, 1] * 4, [0, 0, 1, 1, 2, 2, 3, 3]
    folds = Folds(fold_Q=np.array([0, 1, 0, 1, 0, -1]), axis_FD=np.zeros((2, 1)))
    place_N = generator.integers(0, levels, size=80).astype(float)
    found = separation(place_N, role_N, question_N, folds, roles=3, draws=20, generator=generator)
    won = pairs = 0.0
    for fold in (0, 1):
        members = (folds.fold_Q[question_N] == fold) & (role_N >= 0)
        own = role_N[members] == 0
        if own.all() or not own.any():
            continue
        pairs += own.sum() * (~own).sum()
        won += roc_auc_score(own, place_N[members]) * own.sum() * (~own).sum()
    assert found.auc == pytest.approx(won / pairs)
    assert all(0 <= low <= high <= 1 for low, high in found.interval.values())


def test_one_question_can_hold_nothing_out() -> None:
    cells = Cells.empty((1 + ROLES) * 1, np.zeros(HIDDEN, np.float32))
    cells.count_C[:] = 1
    assert fit_folds(cells, ROLES, 1) is None


def test_length_is_correlated_over_all_and_within_roles() -> None:
    generator = np.random.default_rng(0)
    role_N = np.repeat([0, 1, 2, -1], 100)
    tokens_N = (100 * (1 + role_N) + generator.integers(0, 50, size=400)).astype(np.int64)
    position_N = 10.0 * role_N - tokens_N / 50
    overall, within = length_correlation(position_N, tokens_N, role_N)
    used = role_N >= 0
    assert overall == pytest.approx(spearmanr(position_N[used], tokens_N[used]).statistic)
    assert overall > 0.5
    assert within < -0.9, "longer responses lie lower within each role"
