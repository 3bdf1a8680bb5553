"""The evidence: high where a structure was planted, at its null where there is none."""

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from personaspace.analysis.cells import Cells
from personaspace.analysis.config import AnalysisConfig
from personaspace.analysis.evidence import Evidence, _auc, _spearman, gather_evidence
from personaspace.analysis.space import fit_space

ROLES, QUESTIONS, HIDDEN = 20, 12, 24
KINDS = ["professional"] * 8 + ["everyday"] * 4 + ["fantastical"] * 8


def cells(mean_RQD: np.ndarray, rollouts: int = 1) -> Cells:
    return Cells(mean_RQD=mean_RQD, count_RQ=np.full(mean_RQD.shape[:2], rollouts))


def evidence_of(default: Cells, roles: Cells, kinds: list[str] = KINDS, seed: int = 0) -> Evidence:
    space = fit_space(default.role_means()[0], roles.role_means(), components=3)
    return gather_evidence(space, default, roles, kinds, AnalysisConfig(permutations=100, seed=seed))


def rollouts(strength: float, seed: int) -> tuple[Cells, Cells]:
    """Noise, questions that matter, and roles placed along a direction with this strength; default at its end."""
    generator = np.random.default_rng(seed)
    direction_D = generator.normal(size=HIDDEN)
    direction_D /= np.linalg.norm(direction_D)
    question_QD = generator.normal(size=(QUESTIONS, HIDDEN))
    place_R = np.linspace(strength, -strength, ROLES)
    noise_RQD = generator.normal(size=(ROLES + 1, QUESTIONS, HIDDEN))
    mean_RQD = noise_RQD + question_QD + np.append(place_R, 1.5 * strength)[:, None, None] * direction_D
    return cells(mean_RQD[-1:], rollouts=8), cells(mean_RQD[:-1])


def test_a_planted_axis_is_far_above_every_null() -> None:
    evidence = evidence_of(*rollouts(3.0, seed=1))
    assert evidence.auc > 0.95 > evidence.auc_null_p99
    assert evidence.rank_correlation > 0.8 > evidence.rank_correlation_null_p99
    assert evidence.cos_axis_pc1 > 0.8
    assert evidence.cos_axis_pc1 > evidence.cos_null_p99


def test_pure_noise_is_rarely_above_its_null() -> None:
    found = [evidence_of(*rollouts(0.0, seed=seed), seed=seed) for seed in range(20)]
    assert sum(evidence.auc > evidence.auc_null_p99 for evidence in found) <= 3
    assert sum(evidence.rank_correlation > evidence.rank_correlation_null_p99 for evidence in found) <= 3
    assert sum(evidence.cos_axis_pc1 > evidence.cos_null_p99 for evidence in found) <= 3
    assert np.mean([evidence.auc for evidence in found]) == pytest.approx(0.5, abs=0.1)


def test_same_seed_same_numbers() -> None:
    default, roles = rollouts(1.0, seed=2)
    assert evidence_of(default, roles) == evidence_of(default, roles)


def test_empty_cells_are_left_out() -> None:
    default, roles = rollouts(3.0, seed=3)
    mean_RQD, count_RQ = roles.mean_RQD.copy(), roles.count_RQ.copy()
    mean_RQD[::3, 1], count_RQ[::3, 1] = np.nan, 0
    evidence = evidence_of(default, Cells(mean_RQD=mean_RQD, count_RQ=count_RQ))
    assert all(np.isfinite(getattr(evidence, name)) for name in Evidence.__dataclass_fields__)
    assert evidence.auc > 0.95


def test_without_kinds_or_with_too_few_questions_there_is_no_held_out_number() -> None:
    default, roles = rollouts(3.0, seed=4)
    nameless = evidence_of(default, roles, kinds=["unknown"] * ROLES)
    assert np.isnan(nameless.auc)
    assert np.isfinite(nameless.rank_correlation)
    few = evidence_of(default.questions(np.arange(3)), roles.questions(np.arange(3)))
    assert np.isnan(few.rank_correlation)
    assert np.isfinite(few.cos_axis_pc1)


def test_random_directions_have_the_stated_quantile() -> None:
    evidence = evidence_of(*rollouts(0.0, seed=5))
    draws = np.random.default_rng(0).normal(size=(20_000, 2, HIDDEN))
    draws /= np.linalg.norm(draws, axis=2, keepdims=True)
    cosines = np.abs((draws[:, 0] * draws[:, 1]).sum(1))
    assert evidence.cos_random_p99 == pytest.approx(np.quantile(cosines, 0.99), abs=0.02)


def test_measures_agree_with_scipy_and_sklearn() -> None:
    generator = np.random.default_rng(6)
    a, b = generator.integers(0, 6, size=(2, 30)).astype(float)
    assert _spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)
    positive = np.arange(30) % 3 == 0
    negative = np.arange(30) % 3 == 1
    chosen = positive | negative
    assert _auc(a, positive, negative) == pytest.approx(roc_auc_score(positive[chosen], a[chosen]))
