"""What the report says of activation caps: prepared here, laid out in section.html.j2."""

from dataclasses import dataclass

import plotly.graph_objects as go
import xarray as xr

from personaspace.analysis.caps.figures import cap_thresholds
from personaspace.analysis.caps.ranges import written
from personaspace.analysis.caps.thresholds import SITE, cap_ranges, compute_caps
from personaspace.analysis.quality.words import percent
from personaspace.store.objects import Folder


@dataclass(frozen=True, kw_only=True, slots=True)
class CapSection:
    """The section on caps, ready to be laid out."""

    figure: go.Figure
    count: int
    """Rollouts that the thresholds are of."""
    groups: tuple[str, ...]
    """In the order of the shares in each cell."""
    percentiles: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    """For each suggested range of layers: its name, and what each percentile's thresholds touch."""


def cap_section(folder: Folder, space: xr.Dataset) -> CapSection | None:
    """The section for the run's latest fit; None where a cap can't be: other sites, or a layer without an axis."""
    if not str(space.attrs["array"]).startswith(SITE) or not (space["axis_norm"] > 0).all():
        return None
    caps = compute_caps(folder)
    shares = caps["touched_anywhere"].transpose("range", "percentile", "group").values.tolist()
    cells = [[" / ".join(map(percent, share_G)) for share_G in share_PG] for share_PG in shares]
    return CapSection(
        figure=cap_thresholds(caps),
        count=int(caps.attrs["over_count"]),
        groups=tuple(caps["group"].values.tolist()),
        percentiles=tuple(f"p{percentile:g}" for percentile in caps["percentile"].values.tolist()),
        rows=tuple((written(layers), *row) for layers, row in zip(cap_ranges(caps), cells, strict=True)),
    )
