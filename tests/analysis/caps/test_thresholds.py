"""Capping thresholds: their sign, unit and percentiles, and that files of them cap as the paper's formula does."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from personaspace.analysis.caps.thresholds import (
    cap_ranges,
    capping_config,
    compute_caps,
    raw_projections,
    rollout_groups,
)
from personaspace.store import open_run
from personaspace.store.errors import InputError
from personaspace.store.formats.capping_json import read_capping_json, write_capping_json
from personaspace.store.formats.directions import CappingConfig
from personaspace.store.local import LocalFolder
from personaspace.store.manifest import require_manifest
from personaspace.store.space import open_space, save_space
from tests.analysis.caps.small_fit import DROPPED, LAYOUT, write_fitted

Floats = NDArray[np.float64]
RANGES = [range(4, 7), range(7, 8)]
PERCENTILES = (1.0, 25.0, 50.0, 75.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> LocalFolder:
    folder = LocalFolder(tmp_path_factory.mktemp("caps") / "run")
    write_fitted(folder)
    return folder


@pytest.fixture(scope="module")
def caps(folder: LocalFolder) -> xr.Dataset:
    return compute_caps(folder, ranges=RANGES)


def activations(folder: LocalFolder) -> Floats:
    """Stored activations of the rollouts that the fit used, ``(N, L, D)``."""
    rows = open_space(folder)["rollout_row"].values
    x_NLD: Floats = open_run(folder)["resid_post_mean"].isel(rollout=rows).values.astype(np.float64)
    return x_NLD


def save_text(folder: LocalFolder, space: xr.Dataset) -> None:
    """Save a fit that was opened, its texts as fits write them."""
    texts = {
        name: space[name].astype(np.dtypes.StringDType()) for name in space.coords if space[name].dtype.kind in "UO"
    }
    save_space(folder, space.assign_coords(texts))


def unit_axis(folder: LocalFolder, layer: int) -> Floats:
    axis_D = open_space(folder)["axis"].sel(layer=layer).values.astype(np.float64)
    unit_D: Floats = axis_D / np.linalg.norm(axis_D)
    return unit_D


def paper_cap(h_TD: Floats, v_D: Floats, tau: float) -> Floats:
    """Equation 1 of the paper, v towards the Assistant."""
    capped: Floats = h_TD - np.minimum(h_TD @ v_D - tau, 0)[:, None] * v_D
    return capped


def reference_cap(h_TD: Floats, vector_D: NDArray[Any], cap: float, epsilon: float = 0.0) -> Floats:
    """What the reference project's steering does with an intervention of a capping config."""
    v_D = vector_D.astype(np.float64) / (np.linalg.norm(vector_D.astype(np.float64)) + epsilon)
    capped: Floats = h_TD - np.maximum(h_TD @ v_D - cap, 0)[:, None] * v_D
    return capped


def read(file: Path) -> CappingConfig:
    if file.suffix == ".json":
        return read_capping_json(file)
    torch_files = pytest.importorskip("personaspace.store.formats.torch_files")
    config: CappingConfig = torch_files.read_capping(file)
    return config


def write(file: Path, config: CappingConfig) -> None:
    if file.suffix == ".json":
        write_capping_json(file, config)
    else:
        pytest.importorskip("personaspace.store.formats.torch_files").write_capping(file, config)


@pytest.mark.parametrize("ending", [".json", ".pt"])
def test_a_file_leaves_the_residual_of_the_papers_formula(
    folder: LocalFolder, caps: xr.Dataset, tmp_path: Path, ending: str
) -> None:
    write(tmp_path / f"capping{ending}", capping_config(open_space(folder), caps))
    config = read(tmp_path / f"capping{ending}")
    assert list(config.experiments)[:2] == ["layers_4:7-p0.01", "layers_4:7-p0.25"]
    generator = np.random.default_rng(0)
    for place, percentile in enumerate(PERCENTILES):
        interventions = config.caps(list(config.experiments)[place])
        assert [cap.layer for cap in interventions] == [4, 5, 6]
        for cap in interventions:
            h_TD = 3 * generator.normal(size=(200, LAYOUT.hidden))
            v_D = unit_axis(folder, cap.layer)
            tau = float(caps["threshold"].sel(percentile=percentile, layer=cap.layer))
            expected_TD = paper_cap(h_TD, v_D, tau)
            np.testing.assert_array_equal(reference_cap(h_TD, cap.vector_D, cap.cap), expected_TD)
            # The reference adds 1e-8 to the norm that it divides by.
            np.testing.assert_allclose(reference_cap(h_TD, cap.vector_D, cap.cap, 1e-8), expected_TD, rtol=0, atol=1e-6)
            touched_T = h_TD @ v_D < tau
            assert 0 < touched_T.sum() < 200
            np.testing.assert_array_equal(expected_TD[~touched_T], h_TD[~touched_T])
            np.testing.assert_allclose(expected_TD[touched_T] @ v_D, tau, atol=1e-12)


def test_away_from_the_assistant_is_capped_and_towards_it_is_not(folder: LocalFolder, caps: xr.Dataset) -> None:
    [cap] = capping_config(open_space(folder), caps).caps("layers_7:8-p0.5")
    v_D = unit_axis(folder, 7)
    far_TD = np.stack([-100 * v_D, 100 * v_D])
    away_D, towards_D = reference_cap(far_TD, cap.vector_D, cap.cap)
    assert away_D @ v_D == pytest.approx(-cap.cap)
    np.testing.assert_array_equal(towards_D, far_TD[1])


def test_projections_are_those_of_a_pass_over_the_activations(folder: LocalFolder) -> None:
    x_NLD = activations(folder)
    assert len(x_NLD) == 59
    for layer, raw_N, (default_mean, role_mean) in raw_projections(open_space(folder), open_run(folder)):
        direct_N = x_NLD[:, layer] @ unit_axis(folder, layer)
        np.testing.assert_allclose(raw_N, direct_N, rtol=0, atol=1e-6 * direct_N.std())
        assert default_mean == pytest.approx(direct_N[:20].mean(), abs=1e-5)
        assert role_mean == pytest.approx((direct_N[20:39].mean() + direct_N[39:].mean()) / 2, abs=1e-5)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), offset=st.floats(0, 1e4))
def test_projections_survive_float32_and_a_large_mean(seed: int, offset: float) -> None:
    """What a fit stores of activations far from the origin, rounded as a fit rounds it."""
    generator = np.random.default_rng(seed)
    roles, rollouts, hidden = 12, 30, 128
    place_D = np.zeros(hidden)
    place_D[[3, 50]] = offset, -offset
    shift_RD = 0.5 * generator.normal(size=(roles, 1, hidden))
    x_RND = (place_D + shift_RD + generator.normal(size=(roles, rollouts, hidden))).astype(np.float32).astype(float)
    mean_RD = x_RND.mean(axis=1)
    origin_D = mean_RD[1:].mean(axis=0)
    axis_D = mean_RD[0] - origin_D
    x_ND = x_RND.reshape(-1, hidden)
    stored = {
        "axis": (("layer", "hidden"), axis_D[None]),
        "rollout_position": (("rollout", "layer"), ((x_ND - origin_D) @ axis_D / (axis_D @ axis_D))[:, None]),
    }
    space = xr.Dataset({name: (dims, values.astype(np.float32)) for name, (dims, values) in stored.items()})
    space = space.assign_coords(layer=[0], rollout_row=("rollout", np.arange(len(x_ND)))).assign_attrs(array="x")
    x_NLD = xr.DataArray(x_ND[:, None].astype(np.float32), dims=("rollout", "layer", "hidden"), coords={"layer": [0]})
    [(_, raw_N, _)] = raw_projections(space, xr.Dataset({"x": x_NLD.chunk(rollout=rollouts)}))
    v_D = space["axis"].values[0].astype(float)
    direct_N = x_ND @ (v_D / np.linalg.norm(v_D))
    assert np.abs(raw_N - direct_N).max() < 1e-6 * direct_N.std()


def test_a_percentile_is_the_share_that_is_left_alone(folder: LocalFolder, caps: xr.Dataset) -> None:
    x_NLD = activations(folder)
    for layer, raw_N, _ in raw_projections(open_space(folder), open_run(folder)):
        direct_N = x_NLD[:, layer] @ unit_axis(folder, layer)
        for percentile in PERCENTILES:
            here = caps.sel(percentile=percentile, layer=layer)
            # The reference's recipe: the percentile along the vector that points away.
            assert float(here["cap"]) == pytest.approx(np.percentile(-direct_N, percentile), abs=1e-5)
            assert float(here["threshold"]) == -float(here["cap"])
            for group, chosen in (("default", slice(20)), ("roles", slice(20, None))):
                share = float((raw_N[chosen] < float(here["threshold"])).mean())
                assert float(here["touched"].sel(group=group)) == share
            assert (raw_N > float(here["threshold"])).mean() == pytest.approx(percentile / 100, abs=1.5 / 59)


@pytest.mark.parametrize(("over", "rows"), [("roles", slice(20, None)), ("default", slice(20))])
def test_percentiles_over_some(folder: LocalFolder, over: Any, rows: slice) -> None:
    caps = compute_caps(folder, over=over, percentiles=[12.5])
    raw_N = activations(folder)[rows, 3] @ unit_axis(folder, 3)
    assert float(caps["cap"].sel(layer=3)[0]) == pytest.approx(np.percentile(-raw_N, 12.5), abs=1e-5)
    assert caps.attrs["over_count"] == len(raw_N)
    assert all(name.endswith("-p0.125") for name in capping_config(open_space(folder), caps).experiments)


def test_what_a_range_touches(caps: xr.Dataset) -> None:
    assert cap_ranges(caps) == RANGES
    single, touched = caps["touched_anywhere"].sel(range="7:8"), caps["touched"].sel(layer=7)
    xr.testing.assert_equal(single.drop_vars(["range", "range_start", "range_stop"]), touched.drop_vars("layer"))
    several, each = caps["touched_anywhere"].sel(range="4:7"), caps["touched"].sel(layer=[4, 5, 6])
    assert (several >= each.max("layer")).all()
    assert (several <= each.sum("layer")).all()
    assert (caps["touched"].diff("percentile") <= 0).all()
    assert (caps["projection"].diff("quantile") >= 0).all()


def test_groups_and_their_counts(folder: LocalFolder, tmp_path: Path) -> None:
    other = LocalFolder(tmp_path / "run")
    write_fitted(other)
    space = open_space(other).load()
    roles = space["rollout_role"].values.astype(np.dtypes.StringDType())
    roles[40:44], roles[44:50] = "calm.pos", "therapy"
    save_text(other, space.assign_coords(rollout_role=("rollout", roles)))
    group_N = rollout_groups(open_space(other), require_manifest(other))
    assert np.bincount(group_N + 1).tolist() == [6, 20, 29, 4]
    caps = compute_caps(other, percentiles=[50])
    assert caps["group"].values.tolist() == ["default", "roles", "traits"]
    assert caps["group_count"].values.tolist() == [20, 29, 4]
    assert caps.attrs["over_count"] == 53
    assert DROPPED not in space["rollout_row"].values


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"percentiles": [0]}, "caps --percentiles: 0; give percent above 0 and below 100, such as 25."),
        ({"percentiles": [100]}, "caps --percentiles: 100; give percent above 0 and below 100"),
        ({"percentiles": [float("nan")]}, "caps --percentiles: nan; give percent"),
        ({"percentiles": []}, "caps --percentiles: none is given; the paper's are 1 25 50 75."),
        ({"percentiles": [25, 25.0000001]}, "caps --percentiles: one is given twice; give each once."),
        ({"over": "traits"}, "caps --over: 'traits'; allowed are all, roles and default."),
        ({"ranges": [range(6, 9)]}, "caps --layers: 6-8; the fit has no layer 8, only 0 to 7."),
    ],
)
def test_refusals(folder: LocalFolder, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as refused:
        compute_caps(folder, **arguments)
    assert str(refused.value).startswith(message)


def test_no_caps_on_what_is_no_residual_stream(folder: LocalFolder, tmp_path: Path) -> None:
    other = LocalFolder(tmp_path / "run")
    write_fitted(other)
    space = open_space(other).load().assign_attrs(array="attn_out_mean")
    save_text(other, space)
    with pytest.raises(InputError, match="the fit is of attn_out_mean; caps act on the residual stream after a block"):
        compute_caps(other)


def test_no_caps_along_an_axis_of_zero(folder: LocalFolder) -> None:
    space = open_space(folder).load()
    space["axis"][3] = 0
    with pytest.raises(InputError, match="Layer 3: the axis is zero: default and roles are the same"):
        list(raw_projections(space, open_run(folder)))


def test_no_caps_without_a_fit(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run here"):
        compute_caps(LocalFolder(tmp_path / "nothing"))
