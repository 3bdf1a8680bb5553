"""The evidence: high where a structure was planted, at its null where there is none, and intervals that hold."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score

from personaspace.analysis.cells import Cells
from personaspace.analysis.config import AnalysisConfig
from personaspace.analysis.evidence import Evidence, gather_evidence, rank_auc
from personaspace.analysis.similarity import rank_correlation
from personaspace.analysis.space import fit_space

ROLES, QUESTIONS, HIDDEN = 20, 12, 24
KINDS = ["professional"] * 8 + ["everyday"] * 4 + ["fantastical"] * 8
FEW_DRAWS = AnalysisConfig(permutations=20, bootstrap=20)
QUICK = AnalysisConfig(permutations=100, bootstrap=40)


def cells(mean_VQD: np.ndarray, count_VQ: np.ndarray) -> Cells:
    """Cells with these means, `default` first."""
    mean_CD = np.nan_to_num(mean_VQD.reshape(-1, mean_VQD.shape[-1]))
    shift_D = mean_CD.mean(0).astype(np.float32)
    sum_CD = (mean_CD - shift_D) * count_VQ.reshape(-1, 1)
    return Cells(shift_D=shift_D, sum_CD=sum_CD.astype(np.float32), count_C=count_VQ.ravel())


def planted(
    strength: float, seed: int, *, questions: int = QUESTIONS, default_rollouts: int = 8
) -> tuple[np.ndarray, np.ndarray]:
    """Means ``(1 + ROLES, questions, HIDDEN)`` and counts: noise, questions that matter, and roles placed along a
    direction with this strength; default at its end.
    """
    generator = np.random.default_rng(seed)
    direction_D = generator.normal(size=HIDDEN)
    direction_D /= np.linalg.norm(direction_D)
    question_QD = generator.normal(size=(questions, HIDDEN))
    place_V = np.concatenate([[1.5 * strength], np.linspace(strength, -strength, ROLES)])
    noise_VQD = generator.normal(size=(ROLES + 1, questions, HIDDEN))
    count_VQ = np.ones((ROLES + 1, questions), dtype=np.int64)
    count_VQ[0] = default_rollouts
    return noise_VQD + question_QD + place_V[:, None, None] * direction_D, count_VQ


def evidence_of(
    mean_VQD: np.ndarray, count_VQ: np.ndarray, kinds: list[str] = KINDS, config: AnalysisConfig = QUICK
) -> Evidence:
    return gather_evidence(cells(mean_VQD, count_VQ), len(mean_VQD) - 1, count_VQ.shape[1], kinds, config)


def test_a_planted_axis_is_far_above_every_null() -> None:
    evidence = evidence_of(*planted(3.0, seed=1))
    observed, null = evidence.observed, evidence.null_p99
    assert observed.kind_auc > 0.95 > null.kind_auc
    assert observed.rank_correlation > 0.8 > null.rank_correlation
    assert observed.cos_axis_pc1 > 0.8
    assert observed.cos_axis_pc1 > null.cos_axis_pc1


def test_pure_noise_is_rarely_above_its_null() -> None:
    found = [evidence_of(*planted(0.0, seed=seed)) for seed in range(20)]
    for name in ("kind_auc", "rank_correlation", "cos_axis_pc1"):
        assert sum(getattr(each.observed, name) > getattr(each.null_p99, name) for each in found) <= 3
    assert np.mean([each.observed.kind_auc for each in found]) == pytest.approx(0.5, abs=0.1)


def test_measures_from_inner_products_are_those_of_the_vectors() -> None:
    """Against scikit-learn's PCA and plain projections, with unequal counts."""
    mean_VQD, count_VQ = planted(2.0, seed=7)
    count_VQ = np.random.default_rng(7).integers(1, 4, size=count_VQ.shape)
    observed = evidence_of(mean_VQD, count_VQ).observed
    weighted = mean_VQD * count_VQ[:, :, None]
    vector_VD = weighted.sum(1) / count_VQ.sum(1)[:, None]
    axis_D = vector_VD[0] - vector_VD[1:].mean(0)
    pc1_D = PCA(1).fit(vector_VD[1:]).components_[0]
    assert observed.cos_axis_pc1 == pytest.approx(abs(axis_D @ pc1_D) / np.linalg.norm(axis_D), rel=1e-5)
    place_R = (vector_VD[1:] - vector_VD[1:].mean(0)) @ axis_D / (axis_D @ axis_D)
    np.testing.assert_allclose(observed.position_R, place_R, rtol=1e-4, atol=1e-5)

    halves = [weighted[:, start::2].sum(1) / count_VQ[:, start::2].sum(1)[:, None] for start in (0, 1)]
    placed = [held_VD[1:] @ (fit_VD[0] - fit_VD[1:].mean(0)) for fit_VD, held_VD in (halves, halves[::-1])]
    assert observed.rank_correlation == pytest.approx(spearmanr(*placed).statistic)
    chosen = [kind != "everyday" for kind in KINDS]
    is_positive = np.array([kind == "professional" for kind in KINDS])[chosen]
    assert observed.kind_auc == pytest.approx(np.mean([roc_auc_score(is_positive, x_R[chosen]) for x_R in placed]))


def test_same_seed_same_numbers() -> None:
    first, second = (evidence_of(*planted(1.0, seed=2)) for _ in range(2))
    assert first.observed.kind_auc == second.observed.kind_auc
    assert first.null_p99.cos_axis_pc1 == second.null_p99.cos_axis_pc1
    np.testing.assert_array_equal(
        first.intervals["questions"][0].position_R, second.intervals["questions"][0].position_R
    )


def test_empty_cells_are_left_out() -> None:
    mean_VQD, count_VQ = planted(3.0, seed=3)
    count_VQ[1::3, 1] = 0
    mean_VQD[1::3, 1] = np.nan
    evidence = evidence_of(mean_VQD, count_VQ)
    for measures in (evidence.observed, evidence.null_p99, *evidence.intervals["questions"]):
        assert np.isfinite([measures.kind_auc, measures.cos_axis_pc1, measures.rank_correlation]).all()
        assert np.isfinite(measures.position_R).all()
    assert evidence.observed.kind_auc > 0.95


def test_without_kinds_or_with_too_few_questions_there_is_no_held_out_number() -> None:
    mean_VQD, count_VQ = planted(3.0, seed=4)
    nameless = evidence_of(mean_VQD, count_VQ, kinds=["unknown"] * ROLES)
    assert np.isnan(nameless.observed.kind_auc)
    assert np.isfinite(nameless.observed.rank_correlation)
    few = evidence_of(mean_VQD[:, :3], count_VQ[:, :3])
    assert np.isnan(few.observed.rank_correlation)
    assert np.isfinite(few.observed.cos_axis_pc1)


@pytest.mark.slow
def test_intervals_hold_what_many_more_questions_show() -> None:
    """At a nominal 95%, from 24 questions, with the truth from 240 others. Few questions make them a little short."""
    held: dict[str, list[float]] = {"position_R": [], "cos_axis_pc1": [], "kind_auc": []}
    for seed in range(30):
        mean_VQD, count_VQ = planted(1.0, seed=seed, questions=264)
        truth = evidence_of(mean_VQD[:, 24:], count_VQ[:, 24:], config=FEW_DRAWS).observed
        config = replace(FEW_DRAWS, bootstrap=200)
        low, high = evidence_of(mean_VQD[:, :24], count_VQ[:, :24], config=config).intervals["questions"]
        for name, shares in held.items():
            value = getattr(truth, name)
            shares.append(float(np.mean((getattr(low, name) <= value) & (value <= getattr(high, name)))))
    assert np.mean(held["position_R"]) > 0.8
    assert np.mean(held["cos_axis_pc1"]) > 0.85
    assert np.mean(held["kind_auc"]) > 0.85


def test_intervals_shrink_with_more_questions_and_hold_the_observed_value() -> None:
    widths = []
    for questions in (8, 64):
        evidence = evidence_of(*planted(2.0, seed=5, questions=questions))
        low, high = evidence.intervals["questions"]
        inside = (low.position_R <= evidence.observed.position_R) & (evidence.observed.position_R <= high.position_R)
        assert inside.mean() > 0.9
        widths.append(float(np.mean(high.position_R - low.position_R)))
    assert widths[1] < 0.6 * widths[0]


def test_random_directions_have_the_stated_quantile() -> None:
    evidence = evidence_of(*planted(0.0, seed=5))
    draws = np.random.default_rng(0).normal(size=(20_000, 2, HIDDEN))
    draws /= np.linalg.norm(draws, axis=2, keepdims=True)
    cosines = np.abs((draws[:, 0] * draws[:, 1]).sum(1))
    assert evidence.cos_random_p99 == pytest.approx(np.quantile(cosines, 0.99), abs=0.02)


def test_measures_agree_with_scipy_and_sklearn() -> None:
    generator = np.random.default_rng(6)
    a, b = generator.integers(0, 6, size=(2, 30)).astype(float)
    assert rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic)
    positive = np.arange(30) % 3 == 0
    negative = np.arange(30) % 3 == 1
    chosen = positive | negative
    assert rank_auc(a, positive, negative) == pytest.approx(roc_auc_score(positive[chosen], a[chosen]))


def test_positions_are_those_of_the_space() -> None:
    mean_VQD, count_VQ = planted(2.0, seed=9)
    space = fit_space(mean_VQD[0].mean(0), mean_VQD[1:].mean(1), components=3)
    evidence = evidence_of(mean_VQD, count_VQ)
    place_R = (space.role_RD - space.origin_D) @ space.scale_D
    np.testing.assert_allclose(evidence.observed.position_R, place_R, atol=1e-5)
