"""What a fit can be told: whose scores count, how much memory, which scheduler."""

import dataclasses
from pathlib import Path

import dask
import numpy as np
import pytest
import xarray as xr
from distributed import Client, LocalCluster

from personaspace.analysis.config import AnalysisConfig
from personaspace.analysis.fit import compute_space, fit
from personaspace.store.errors import InputError
from personaspace.store.lease import acquire
from personaspace.store.local import LocalFolder
from personaspace.store.scores import Score, commit_scores
from personaspace.store.space import open_space
from tests.analysis.test_fit import LAYOUT, ROLES, write

QUICK = AnalysisConfig(permutations=20, bootstrap=20)


@pytest.fixture
def folder(tmp_path: Path) -> LocalFolder:
    return LocalFolder(tmp_path / "run")


def judge(folder: LocalFolder, name: str, scores: dict[int, float]) -> None:
    with acquire(folder, timeout=60, say=print) as lease:
        for unit in range(5):
            found = [Score(row=row, score=scores[row]) for row in LAYOUT.unit_row_range(unit) if row in scores]
            commit_scores(lease.fence, LAYOUT, name, unit, found)


def test_only_fully_played_rollouts_make_the_axis_and_somewhat_played_ones_vectors_of_their_own(
    folder: LocalFolder,
) -> None:
    values = write(folder).astype(np.float64)
    fully = dict.fromkeys(range(6, 30), 3.0)
    judge(folder, "first", fully | {8: 2.0, 9: 2.0, 10: 1.0, 12: 0.0})
    space = fit(folder, QUICK)
    assert list(space["role"].values) == [*ROLES[1:], "pirate (somewhat)"]
    assert list(space["role_level"].values) == [*["fully"] * 4, "somewhat"]
    assert list(space["role_count"].values) == [2, 5, 6, 6, 2]
    assert space.attrs["filter"] == "scores of first: 3 is fully, 2 somewhat"
    pirate, ghost = values[[6, 11]].mean(0), values[13:18].mean(0)
    np.testing.assert_allclose(space["role_vector"][0], pirate, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(space["role_vector"][4], values[8:10].mean(0), rtol=1e-5, atol=1e-6)
    core = np.stack([pirate, ghost, values[18:24].mean(0), values[24:].mean(0)])
    np.testing.assert_allclose(space["axis"], values[:6].mean(0) - core.mean(0), rtol=1e-5, atol=1e-5)
    assert np.isfinite(space["role_position_interval"][:4]).all()
    assert np.isnan(space["role_position_interval"][4]).all(), "the axis does not rest on it"
    assert space.sizes["rollout"] == 29, "every rollout has its place, whatever its score"

    everything = fit(folder, dataclasses.replace(QUICK, unfiltered=True))
    assert list(everything["role"].values) == ROLES[1:]
    assert list(everything["role_count"].values) == [5, 6, 6, 6]
    assert everything.attrs["filter"] == "none, although scores were there: analysis.unfiltered"


def test_of_two_judges_one_has_to_be_named(folder: LocalFolder) -> None:
    write(folder)
    for name in ("first", "second"):
        judge(folder, name, dict.fromkeys(range(30), 3.0))
    with pytest.raises(InputError) as error:
        fit(folder, QUICK)
    assert str(error.value) == (
        f"{folder.url}: has scores of first, second. Say whose count: --analysis.scores first; or take every rollout: "
        "--analysis.unfiltered."
    )
    with pytest.raises(InputError, match="no persona space yet"):
        open_space(folder)
    with pytest.raises(
        InputError, match=r"^analysis\.scores: 'third' has scored nothing in .*; there are scores of first"
    ):
        fit(folder, dataclasses.replace(QUICK, scores="third"))
    assert fit(folder, dataclasses.replace(QUICK, scores="second")).attrs["filter"].startswith("scores of second")


def test_intervals_hold_the_positions_and_components_their_share(folder: LocalFolder) -> None:
    write(folder)
    space = fit(folder, QUICK)
    assert space["role_position_interval"].dims == ("role", "layer", "resampled", "bound")
    low, high = (space["role_position_interval"].sel(bound=bound) for bound in ("low", "high"))
    assert ((low <= space["role_position"]) & (space["role_position"] <= high)).mean() > 0.9
    assert (space["default_auc"] > 0.9).all()
    assert (space["components_needed"].sel(variance=0.7) == 1).all()
    np.testing.assert_allclose(abs(space["role_component_cosine"].sel(component=0)), 1, atol=0.05)
    np.testing.assert_allclose(np.linalg.norm(space["rollout_component_vector"], axis=-1), 1, rtol=1e-5)
    assert (space["rollout_pc1_axis_cosine"] > 0.99).all()
    assert space.attrs["suggested_layer"] in (0, 1)
    assert space.attrs["suggested_layer_reason"].startswith("farthest above the nulls (cos_axis_pc1 1.00")


def test_a_memory_too_small_is_refused_before_anything_is_read(folder: LocalFolder) -> None:
    write(folder)
    with pytest.raises(
        InputError, match=r"^analysis\.memory: 0\.00 GB; one layer takes 0\.\d\d GB while it is fitted\."
    ):
        fit(folder, dataclasses.replace(QUICK, memory=1e-6))


def test_threads_processes_and_split_rows_give_the_same(folder: LocalFolder) -> None:
    write(folder)
    with dask.config.set(scheduler="synchronous"):
        alone = compute_space(folder, QUICK)
    threads = compute_space(folder, QUICK)
    workers = LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None)
    with workers as cluster, Client(cluster):
        processes = compute_space(folder, QUICK)
    for other in (threads, processes):
        xr.testing.assert_allclose(alone.drop_attrs(), other.drop_attrs(), rtol=1e-5, atol=1e-5)
