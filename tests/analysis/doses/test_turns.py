"""Conversations turn by turn, at planted places."""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from personaspace.analysis.doses.turns import read_turns, turns_of
from personaspace.analysis.drift.run import drift_of
from personaspace.analysis.drift.trajectories import trajectories
from tests.analysis.drift.talk_runs import write_fitted_run, write_talk_run
from tests.analysis.drift.talks import a_space, spans_of


def test_means_intervals_and_shares() -> None:
    ways = [[1.0, 0.6, 0.2], [0.8, 0.4, 0.3], [0.9, 0.8, float("nan")]]
    space = a_space()
    drift = trajectories(spans_of(ways, space), space)
    drift.attrs["target_layer"] = 2
    turns = turns_of(drift)
    low = turns.low
    assert (turns.layer, low) == (2, pytest.approx(0.55, abs=0.01))
    np.testing.assert_allclose(turns.mean_T, [0.9, 0.6, 0.25])
    np.testing.assert_allclose(turns.inside_T, [1, 2 / 3, 0])
    reach = stats.t.ppf(0.975, 2) * np.std([0.6, 0.4, 0.8], ddof=1) / np.sqrt(3)
    np.testing.assert_allclose(turns.interval_T2[1], [0.6 - reach, 0.6 + reach])
    assert (turns.movement.conversations, turns.movement.left) == (3, 2)


def test_of_a_run_in_the_space_of_another(tmp_path: Path) -> None:
    space = write_fitted_run(tmp_path / "fitted", talks=False)
    turns = read_turns(write_talk_run(tmp_path / "talks", roles=False), space)
    drift = drift_of(tmp_path / "talks", space)
    at = drift.sel(layer=drift.attrs["target_layer"])
    np.testing.assert_allclose(turns.mean_T, at["position"].mean("conversation"))
    assert turns.movement.conversations == drift.sizes["conversation"] == 3
    assert (turns.low, turns.high) == tuple(at["default_position"].values)
