"""The figure of thresholds over layers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from personaspace.analysis.caps.figures import cap_thresholds
from personaspace.analysis.caps.thresholds import compute_caps
from personaspace.analysis.pages.charts import CLEAR, DARK
from personaspace.store.local import LocalFolder
from personaspace.store.space import open_space
from tests.analysis.caps.small_fit import write_fitted


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> LocalFolder:
    folder = LocalFolder(tmp_path_factory.mktemp("caps") / "run")
    write_fitted(folder)
    return folder


def test_bands_medians_and_thresholds(folder: LocalFolder) -> None:
    caps = compute_caps(folder, ranges=[range(2, 4), range(3, 6), range(7, 8)])
    figure = cap_thresholds(caps)
    assert [trace.name for trace in figure.data if trace.name] == ["default", "roles", "p1", "p25", "p50", "p75"]
    position_N = open_space(folder)["rollout_position"].sel(layer=5).values.astype(np.float64)
    named: dict[str, Any] = {trace.name: trace for trace in figure.data if trace.name}
    assert named["default"].y[5] == pytest.approx(np.median(position_N[:20]), abs=1e-3)
    assert named["roles"].y[5] == pytest.approx(np.median(position_N[20:]), abs=1e-3)
    # On the scale of positions the axis points up, so 25 from the Assistant's end is 75 from below.
    assert named["p25"].y[5] == pytest.approx(np.quantile(position_N, 0.75), abs=1e-3)
    assert named["p25"].customdata[5][0] == pytest.approx(
        float(caps["threshold"].sel(percentile=25, layer=5)), rel=1e-3
    )
    assert [(shape.x0, shape.x1) for shape in figure.layout.shapes] == [(1.5, 5.5), (6.5, 7.5)]


def test_colours_that_a_dark_page_knows(folder: LocalFolder) -> None:
    figure = cap_thresholds(compute_caps(folder))
    used = {trace.line.color for trace in figure.data} | {trace.fillcolor for trace in figure.data if trace.fillcolor}
    used |= {shape.fillcolor for shape in figure.layout.shapes}
    assert used <= {*DARK, CLEAR}


def test_some_percentiles(folder: LocalFolder, tmp_path: Path) -> None:
    caps = compute_caps(folder)
    names = [trace.name for trace in cap_thresholds(caps, percentiles=[75, 25]).data if trace.name]
    assert names == ["default", "roles", "p75", "p25"]
    with pytest.raises(ValueError, match="Percentile 30 is not in these caps"):
        cap_thresholds(caps, percentiles=[30])
