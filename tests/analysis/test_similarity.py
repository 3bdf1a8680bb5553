"""The measures of likeness: what they must not depend on, and what scipy says."""

import numpy as np
import pytest
import scipy.spatial
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from personaspace.analysis import similarity

SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.integers(4, 12)


def turned(x_RD: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The same arrangement, turned, mirrored, scaled and shifted."""
    D = x_RD.shape[1]
    turn_DD = np.linalg.qr(generator.normal(size=(D, D)))[0]
    return 3.5 * x_RD @ turn_DD + generator.normal(size=D)


@given(seed=SEEDS, groups=st.lists(st.sampled_from("abc"), min_size=1, max_size=12))
def test_relabellings_deal_every_place_once_and_within_groups(seed: int, groups: list[str]) -> None:
    relabelled_PR = similarity.relabellings(groups, 20, np.random.default_rng(seed))
    assert (np.sort(relabelled_PR, axis=1) == np.arange(len(groups))).all()
    assert (np.array(groups)[relabelled_PR] == groups).all()


def test_relabellings_are_uniform_within_a_group() -> None:
    relabelled_PR = similarity.relabellings(["a", "b", "a", "a", "b"], 6000, np.random.default_rng(0))
    counts = [np.sum(relabelled_PR[:, 0] == place) for place in (0, 2, 3)]
    assert scipy.stats.chisquare(counts).pvalue > 0.001


@given(seed=SEEDS, roles=SIZES)
def test_cka_and_procrustes_see_the_same_in_what_is_only_turned(seed: int, roles: int) -> None:
    generator = np.random.default_rng(seed)
    x_RD = generator.normal(size=(roles, 3))
    y_RD = turned(x_RD, generator)
    assert similarity.procrustes_similarity(x_RD, y_RD) == pytest.approx(1)
    grams = [similarity.centred_gram(x)[None] for x in (x_RD, y_RD)]
    assert similarity.linear_cka(*grams) == pytest.approx(1)


@given(seed=SEEDS, roles=SIZES)
def test_measures_agree_with_scipy_and_are_symmetric(seed: int, roles: int) -> None:
    generator = np.random.default_rng(seed)
    x_RC, y_RC = generator.normal(size=(2, roles, 3))
    found = similarity.procrustes_similarity(x_RC, y_RC)
    assert found == pytest.approx(1 - scipy.spatial.procrustes(x_RC, y_RC)[2])
    assert found == pytest.approx(similarity.procrustes_similarity(y_RC, x_RC))
    x_R, y_R = x_RC[:, 0], y_RC[:, 0]
    assert similarity.correlation(x_R, y_R) == pytest.approx(scipy.stats.pearsonr(x_R, y_R)[0])
    assert similarity.rank_correlation(x_R, y_R) == pytest.approx(scipy.stats.spearmanr(x_R, y_R)[0])
    gram_RR, other_RR = (similarity.centred_gram(x) for x in (x_RC, y_RC))
    cka = similarity.linear_cka(gram_RR[None], other_RR[None])[0, 0]
    assert -1e-12 <= cka <= 1 + 1e-12
    # The definition by features: the cross-covariance against each own one.
    x, y = (z - z.mean(axis=0) for z in (x_RC, y_RC))
    direct = np.linalg.norm(y.T @ x) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))
    assert cka == pytest.approx(direct)


@given(seed=SEEDS, roles=SIZES)
def test_many_relabellings_at_once_are_what_one_by_one_gives(seed: int, roles: int) -> None:
    generator = np.random.default_rng(seed)
    x_RC, y_RC = generator.normal(size=(2, roles, 2))
    dealt_PR = similarity.relabellings([""] * roles, 5, generator)
    at_once = similarity.procrustes_similarity(x_RC, y_RC[dealt_PR])
    assert at_once == pytest.approx([float(similarity.procrustes_similarity(x_RC, y_RC[p])) for p in dealt_PR])
    at_once = similarity.rank_correlation(x_RC[:, 0], y_RC[dealt_PR, 0])
    assert at_once == pytest.approx([float(similarity.rank_correlation(x_RC[:, 0], y_RC[p, 0])) for p in dealt_PR])


@given(seed=SEEDS, order=st.permutations(range(4)))
def test_matching_finds_components_in_any_order_and_sign(seed: int, order: list[int]) -> None:
    generator = np.random.default_rng(seed)
    x_RC = scipy.stats.zscore(np.linalg.qr(generator.normal(size=(9, 5)))[0][:, 1:])
    signs = generator.choice([-1.0, 1.0], 4)
    matching = similarity.match_components(x_RC, (x_RC * signs)[:, order])
    assert [order[of] for of in matching.of_C] == [0, 1, 2, 3]
    assert matching.correlation_C == pytest.approx(signs)


def test_fewer_components_leave_some_without_a_partner() -> None:
    x_RC = np.random.default_rng(0).normal(size=(8, 3))
    matching = similarity.match_components(x_RC, x_RC[:, 1:2])
    assert matching.of_C.tolist() == [-1, 0, -1]
    assert np.isnan(matching.correlation_C).tolist() == [True, False, True]


def test_offset_cosines_compare_every_role_with_every_other() -> None:
    x_RD = np.random.default_rng(0).normal(size=(6, 4))
    cosine_RR = similarity.offset_cosines(x_RD, 2 * x_RD + 7)
    assert np.diag(cosine_RR) == pytest.approx(1)
    assert cosine_RR == pytest.approx(cosine_RR.T)


def test_what_does_not_vary_gives_no_number() -> None:
    same_R, x_R = np.full(5, 0.1), np.arange(5.0)
    assert np.isnan(similarity.correlation(same_R, x_R))
    assert np.isnan(similarity.rank_correlation(same_R, x_R))
    assert np.isnan(similarity.procrustes_similarity(same_R[:, None], x_R[:, None]))
    assert np.isnan(similarity.centred_gram(same_R[:, None])).all()
