"""The figure of capping thresholds: how projections spread from layer to layer, and where caps would begin.

Drawn on the scale of the report's positions (0 the mean role, 1 default) since raw projections grow with depth; hovers
give raw thresholds too, in units of the residual stream. Shape suffixes: L layers, Q quantiles.
"""

from collections.abc import Sequence

import plotly.graph_objects as go
import xarray as xr

from personaspace.analysis.caps.thresholds import cap_ranges
from personaspace.analysis.pages.charts import AMBER, BAND, BLUE, GREEN, INK, VERMILLION, Floats, chart, line, plain

GROUP_COLOURS = {"default": BLUE, "roles": VERMILLION, "traits": GREEN}
DASHES = ("dash", "longdash", "dot", "dashdot")
BANDS = ((0.05, 0.95, 0.16), (0.25, 0.75, 0.3))
"""(lowest, highest quantile, opacity) of each band."""
BEST = 25.0
"""The paper's choice (section 5.1.1), which is drawn darker."""


def cap_thresholds(caps: xr.Dataset, *, percentiles: Sequence[float] | None = None) -> go.Figure:
    """Bands of each group's projections per layer, thresholds as lines, the ranges that are capped shaded.

    ``caps``: of `compute_caps`. ``percentiles``: some of its percentiles (default: all). Raises ValueError for one
    that it does not have.
    """
    known = caps["percentile"].values.tolist()
    chosen = known if percentiles is None else list(percentiles)
    absent = [percentile for percentile in chosen if percentile not in known]
    if absent:
        raise ValueError(f"Percentile {absent[0]:g} is not in these caps. Choose among its percentiles: {known}.")
    layers = caps["layer"].values.tolist()
    traces = []
    for group in caps["group"].values.tolist():
        traces += _bands(caps, group, layers)
    for number, percentile in enumerate(chosen):
        raw_L = caps["threshold"].sel(percentile=percentile).values
        shares_L = [caps["touched"].sel(group=group, percentile=percentile).values for group in caps["group"].values]
        colour, width, dash = (INK, 2, "solid") if percentile == BEST else (AMBER, 1.5, DASHES[number % len(DASHES)])
        more: dict[str, object] = {
            "mode": "lines+markers",
            "marker": {"size": 4},
            "dash": dash,
            "meta": {"part": "threshold"},
        }
        more |= {"customdata": list(zip(plain(raw_L), *(plain(share_L, 3) for share_L in shares_L), strict=True))}
        touched = ", ".join(
            f"%{{customdata[{place}]:.0%}} of {group}" for place, group in enumerate(caps["group"].values, 1)
        )
        more |= {"hoverinfo": None, "hovertemplate": f"%{{y:.2f}} (tau %{{customdata[0]}}; touches {touched})"}
        traces.append(line(layers, plain(_position(caps, raw_L)), colour, width, name=f"p{percentile:g}", **more))
    xaxis = {"title": {"text": "layer"}, "unifiedhovertitle": {"text": "layer %{x}"}}
    yaxis = {"title": {"text": "position (0 mean role, 1 default)"}, "zeroline": False}
    figure = chart(traces, height=380, hovermode="x unified", xaxis=xaxis, yaxis=yaxis)
    capped = sorted({layer for chosen in cap_ranges(caps) for layer in chosen})
    for start in (layer for layer in capped if layer - 1 not in capped):
        stop = next(layer for layer in range(start, capped[-1] + 2) if layer not in capped)
        figure.add_vrect(x0=start - 0.5, x1=stop - 0.5, fillcolor=BAND, line_width=0, layer="below")
    return figure


def _bands(caps: xr.Dataset, group: str, layers: list[int]) -> list[go.Scatter]:
    """The middle half and nine tenths of a group's projections, and their median."""
    colour = GROUP_COLOURS[group]
    projection_QL = caps["projection"].sel(group=group)
    traces = []
    for low, high, opacity in BANDS:
        edges = (_position(caps, projection_QL.sel(quantile=quantile).values) for quantile in (high, low))
        x, y = layers + layers[::-1], [*plain(next(edges)), *plain(next(edges))[::-1]]
        # The opacity is the trace's, so that the colour stays one that a dark page knows.
        area = {"fill": "toself", "fillcolor": colour, "opacity": opacity, "showlegend": False}
        traces.append(line(x, y, colour, 0, meta={"part": "band", "group": group, "high": high}, **area))
    middle = plain(_position(caps, projection_QL.sel(quantile=0.5).values))
    shown: dict[str, object] = {
        "hoverinfo": None,
        "hovertemplate": "%{y:.2f} (median)",
        "meta": {"part": "median", "group": group},
    }
    traces.append(line(layers, middle, colour, 2.5, name=group, **shown))
    return traces


def _position(caps: xr.Dataset, raw_L: Floats) -> Floats:
    mean_L, default_L = caps["role_mean"].values, caps["default_mean"].values
    position_L: Floats = (raw_L - mean_L) / (default_L - mean_L)
    return position_L
