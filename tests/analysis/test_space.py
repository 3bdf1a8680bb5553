"""Axis and persona space of one layer."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from personaspace.analysis.space import align_layers, fit_space


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


def test_layers_continue_each_other_and_pc1_stays() -> None:
    default_D, role_RD, _ = planted(3)
    space = fit_space(default_D, role_RD, components=4)
    mirrored = replace(space, component_KD=-space.component_KD)
    first, second = align_layers([space, mirrored])
    assert first is space
    np.testing.assert_array_equal(second.component_KD[0], mirrored.component_KD[0])
    np.testing.assert_array_equal(second.component_KD[1:], space.component_KD[1:])
