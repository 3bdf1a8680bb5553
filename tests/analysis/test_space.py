"""Axis and persona space of one layer."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from personaspace.analysis.space import VARIANCE_THRESHOLDS, fit_space, layer_signs


def planted(seed: int, roles: int = 12, hidden: int = 20) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Default and role vectors along one known direction, with a little noise."""
    generator = np.random.default_rng(seed)
    direction_D = generator.normal(size=hidden)
    direction_D /= np.linalg.norm(direction_D)
    offset_D = 5 * generator.normal(size=hidden)
    place_R = np.linspace(-3, 3, roles)
    role_RD = offset_D + place_R[:, None] * direction_D + 0.01 * generator.normal(size=(roles, hidden))
    return offset_D + 4 * direction_D, role_RD, direction_D


@given(seed=st.integers(0, 2**32 - 1))
def test_axis_and_pc1_find_the_planted_direction_and_point_to_default(seed: int) -> None:
    default_D, role_RD, direction_D = planted(seed)
    space = fit_space(default_D, role_RD, components=3)
    assert space.axis_D @ direction_D / np.linalg.norm(space.axis_D) > 0.999
    assert space.component_KD[0] @ direction_D > 0.999
    assert space.component_KD[0] @ space.axis_D > 0


def test_axis_is_default_minus_mean_of_role_vectors_and_positions_are_scaled_by_it() -> None:
    default_D, role_RD, _ = planted(0)
    space = fit_space(default_D, role_RD, components=3)
    np.testing.assert_allclose(space.axis_D, default_D - role_RD.mean(0))
    assert (default_D - space.origin_D) @ space.scale_D == pytest.approx(1)
    assert (role_RD.mean(0) - space.origin_D) @ space.scale_D == pytest.approx(0, abs=1e-12)


def test_default_takes_no_part_in_the_pca() -> None:
    default_D, role_RD, _ = planted(1)
    near, far = (fit_space(default_D * factor, role_RD, components=3) for factor in (1, 100))
    np.testing.assert_allclose(np.abs(near.component_KD), np.abs(far.component_KD))


def test_components_are_orthonormal_sorted_and_limited_by_the_roles() -> None:
    default_D, role_RD, _ = planted(2, roles=4)
    space = fit_space(default_D, role_RD, components=10)
    assert space.component_KD.shape[0] == 3
    np.testing.assert_allclose(space.component_KD @ space.component_KD.T, np.eye(3), atol=1e-12)
    assert (np.diff(space.variance_ratio_K) <= 0).all()
    assert space.variance_ratio_K.sum() == pytest.approx(1)
    largest = np.take_along_axis(space.component_KD, np.abs(space.component_KD).argmax(1)[:, None], 1)
    assert (largest[1:] > 0).all()


def test_layers_continue_each_other_and_pc1_keeps_its_sign() -> None:
    default_D, role_RD, _ = planted(3)
    component_KD = fit_space(default_D, role_RD, components=4).component_KD
    mirrored_KD = -component_KD
    turned_KD = component_KD * np.array([1, -1, 1, 1])[:, None]
    signs = layer_signs([component_KD, mirrored_KD, turned_KD])
    assert signs.tolist() == [[1, 1, 1, 1], [1, -1, -1, -1], [1, -1, 1, 1]]


def test_needed_components_hold_the_stated_share_of_the_variance() -> None:
    generator = np.random.default_rng(4)
    role_RD = generator.normal(size=(30, 12)) * np.linspace(4, 1, 12)
    space = fit_space(role_RD.mean(0) + 1, role_RD, components=12)
    for threshold, needed in zip(VARIANCE_THRESHOLDS, space.needed_T, strict=True):
        assert space.variance_ratio_K[:needed].sum() >= threshold > space.variance_ratio_K[: needed - 1].sum()


def test_the_axis_rests_on_the_core_and_the_components_on_all() -> None:
    default_D, role_RD, _ = planted(5)
    core = np.arange(8)
    space = fit_space(default_D, role_RD, components=3, core=core)
    np.testing.assert_allclose(space.axis_D, default_D - role_RD[:8].mean(0))
    np.testing.assert_allclose(space.origin_D, role_RD[:8].mean(0))
    whole = fit_space(default_D, role_RD, components=3)
    np.testing.assert_allclose(np.abs(space.component_KD), np.abs(whole.component_KD))


def test_standardised_components_read_the_scaled_dimensions() -> None:
    """A dimension that is 100 times as large leads the plain PCA, and has no more weight than others in this one."""
    generator = np.random.default_rng(6)
    role_RD = generator.normal(size=(40, 6))
    role_RD[:, 1] += 2 * role_RD[:, 2]
    scaled_RD = role_RD * np.array([100, 1, 1, 1, 1, 1])
    plain = fit_space(scaled_RD[0], scaled_RD, components=2)
    assert abs(plain.component_KD[0, 0]) > 0.99
    standardised = fit_space(scaled_RD[0], scaled_RD, components=2, standardise=True)
    np.testing.assert_allclose(np.linalg.norm(standardised.component_KD, axis=1), 1)
    unscaled = fit_space(role_RD[0], role_RD, components=2, standardise=True)
    np.testing.assert_allclose(standardised.variance_ratio_K, unscaled.variance_ratio_K)
    score_R = (scaled_RD - scaled_RD.mean(0)) @ standardised.component_KD[0]
    expected_R = (role_RD - role_RD.mean(0)) @ unscaled.component_KD[0]
    assert abs(np.corrcoef(score_R, expected_R)[0, 1]) > 1 - 1e-9
