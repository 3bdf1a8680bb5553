"""What the report says of caps: the shares of the thresholds, and the chart on the page."""

from collections.abc import Callable
from typing import Any

import pytest
import xarray as xr

from personaspace.analysis.caps.section import cap_section
from personaspace.analysis.caps.thresholds import compute_caps
from personaspace.analysis.quality.words import percent
from personaspace.store.local import LocalFolder
from personaspace.store.space import open_space
from tests.analysis.browsing import NARROW, WIDE, text_of
from tests.analysis.caps.small_fit import write_fitted
from tests.analysis.report.rendered import render


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> LocalFolder:
    folder = LocalFolder(tmp_path_factory.mktemp("caps") / "run")
    write_fitted(folder)
    return folder


@pytest.fixture(scope="module")
def space(folder: LocalFolder) -> xr.Dataset:
    return open_space(folder).load()


def test_rows_are_the_shares_of_the_suggested_ranges(folder: LocalFolder, space: xr.Dataset) -> None:
    section = cap_section(folder, space)
    assert section is not None
    assert section.percentiles == ("p1", "p25", "p50", "p75")
    assert [row[0] for row in section.rows] == ["6", "6-7"]
    touched = compute_caps(folder)["touched_anywhere"].sel(range="6:8", percentile=25)
    assert section.rows[1][2] == " / ".join(percent(float(share)) for share in touched.sel(group=list(section.groups)))
    text = text_of(render(space, caps=section))
    assert f"leaves a quarter of all {section.count} rollouts alone" in text
    assert f"rollouts of {' / '.join(section.groups)} whose mean lies below" in text


def test_other_sites_and_layers_without_an_axis_have_none(folder: LocalFolder, space: xr.Dataset) -> None:
    assert cap_section(folder, space.assign_attrs(array="mlp_out_mean")) is None
    assert cap_section(folder, space.assign(axis_norm=0 * space["axis_norm"])) is None
    assert "Where caps would begin" not in text_of(render(space))


@pytest.mark.browser
@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["wide", "narrow"])
def test_the_chart_is_drawn_and_fits(
    folder: LocalFolder, space: xr.Dataset, open_page: Callable[..., Any], viewport: dict[str, int]
) -> None:
    tab = open_page(render(space, caps=cap_section(folder, space)), viewport=viewport)
    assert tab.locator("#caps .main-svg").first.bounding_box()["width"] <= viewport["width"]
    assert tab.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    assert tab.evaluate("$('caps').data.filter(trace => trace.meta.part === 'threshold').length") == 4
