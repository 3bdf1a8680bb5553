"""Charts over the layers: all measures at a glance, each of them with its null and interval, and explained variance.

Shape suffixes: L layers, C components, M measures.
"""

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from personaspace.analysis.pages.charts import AMBER, BAND, BLUE, BLUE_BAND, INK, MUTED, PAPER, chart, line, plain
from personaspace.analysis.report.figures import layer_index, variance
from personaspace.analysis.report.measures import MEASURES, Measure


def overview(space: xr.Dataset) -> go.Figure:
    """Layers x measures as a heat map, the darker the farther from chance; both chosen layers marked."""
    layers = space["layer"].values.tolist()
    shown = [measure for measure in MEASURES if np.isfinite(space[measure.name]).any()]
    value_ML = [space[measure.name].values.astype(np.float64) for measure in shown]
    share_ML = [
        np.abs(value_L - measure.chance) / (1 - measure.chance)
        for measure, value_L in zip(shown, value_ML, strict=True)
    ]
    heat = go.Heatmap(
        x=layers,
        y=list(range(len(shown))),
        text=[[measure.label] * len(layers) for measure in shown],
        z=[plain(share_L, 3) for share_L in share_ML],
        customdata=[plain(value_L, 3) for value_L in value_ML],
        zmin=0,
        zmax=1,
        colorscale=[[0, PAPER], [1, BLUE]],
        showscale=False,
        xgap=1,
        ygap=3,
        hovertemplate="layer %{x}<br>%{text}: %{customdata:.2f}<extra></extra>",
    )
    marks = {"mode": "markers+text", "hoverinfo": "skip", "showlegend": False, "cliponaxis": False}
    traces: list[object] = [heat]
    target, suggested = (int(space.attrs[name]) for name in ("target_layer", "suggested_layer"))
    chosen = {target: "target", suggested: "target, suggested" if suggested == target else "suggested"}
    for layer, text in chosen.items():
        side = "left" if layer > np.mean(layers) else "right"
        mark = {"symbol": "triangle-down", "size": 10, "color": INK}
        place = {"x": [layer], "y": [len(shown) - 0.35], "text": [f" {text} "], "textposition": f"middle {side}"}
        traces.append(go.Scatter(**place, **marks, marker=mark, textfont={"color": MUTED}))
    ticks = {"tickvals": list(range(len(shown))), "ticktext": [measure.label for measure in shown]}
    yaxis = {"showgrid": False, "range": [-0.5, len(shown)], "zeroline": False, **ticks}
    xaxis = {"title": {"text": "layer"}, "showgrid": False, "zeroline": False}
    return chart(traces, height=110 + 34 * len(shown), xaxis=xaxis, yaxis=yaxis, margin={"l": 60, "t": 12})


def evidence(space: xr.Dataset, measure: Measure) -> go.Figure | None:
    """The measure per layer with its interval, above its null's band; None when it was not computed."""
    value_L, layers = space[measure.name].values.astype(np.float64), space["layer"].values.tolist()
    if not np.isfinite(value_L).any():
        return None
    shown = {"hoverinfo": None, "hovertemplate": "%{y:.2f}"}
    traces = [line(layers, [measure.chance] * len(layers), MUTED, 0, showlegend=False)]
    if measure.null is not None:
        null = {"fill": "tonexty", "fillcolor": BAND, "name": "null, 99th percentile", "dash": "dot", **shown}
        traces.append(line(layers, plain(space[measure.null].values), MUTED, 1, **null))
    lowest = [measure.chance, float(np.nanmin(value_L))]
    if f"{measure.name}_interval" in space:
        interval = space[f"{measure.name}_interval"].sel(resampled="questions")
        low_L, high_L = (interval.sel(bound=bound).values.astype(np.float64) for bound in ("low", "high"))
        traces.append(line(layers, plain(low_L), BLUE, 0, showlegend=False))
        band = {"fill": "tonexty", "fillcolor": BLUE_BAND, "name": "95% interval over questions"}
        traces.append(line(layers, plain(high_L), BLUE, 0, **band))
        lowest.append(float(np.nanmin(low_L)) if np.isfinite(low_L).any() else 0.0)
    if measure.random is not None:
        random = {"name": "random directions, 99th percentile", "dash": "dash", **shown}
        traces.append(line(layers, plain(space[measure.random].values), AMBER, 1.5, **random))
    own = {"mode": "lines+markers", "marker": {"size": 5}, "name": measure.label, **shown}
    traces.append(line(layers, plain(value_L), BLUE, 2.5, **own))
    return _per_layer(space, traces, min(lowest) - 0.06, 1.04)


def _per_layer(space: xr.Dataset, traces: list[go.Scatter], low: float, high: float, **yaxis: object) -> go.Figure:
    target = int(space.attrs["target_layer"])
    side = "left" if target > space["layer"].values.mean() else "right"  # away from the edge of the chart
    note = {"mode": "lines+text", "text": ["", f" target {target} ", ""], "textposition": f"middle {side}"}
    y = [low, low + 0.03 * (high - low), high]
    traces.append(line([target] * 3, y, MUTED, 1, textfont={"color": MUTED}, showlegend=False, **note))
    xaxis = {"title": {"text": "layer"}, "unifiedhovertitle": {"text": "layer %{x}"}}
    yaxis = {"range": [low, high], "zeroline": False} | yaxis
    return chart(traces, height=290, hovermode="x unified", xaxis=xaxis, yaxis=yaxis)


def scree(space: xr.Dataset, layer: int) -> go.Figure:
    """Explained variance of each component at one layer."""
    ratio_C = variance(space)[layer_index(space, layer)]
    bar = go.Bar(x=list(range(1, len(ratio_C) + 1)), y=plain(ratio_C), marker={"color": BLUE}, hoverinfo="y")
    xaxis, yaxis = {"title": {"text": "component"}, "dtick": 1}, {"tickformat": ".0%", "hoverformat": ".1%"}
    return chart([bar], height=290, xaxis=xaxis, yaxis=yaxis)


def cumulative_variance(space: xr.Dataset) -> go.Figure:
    """Variance that the first 1, 2, 3, 5 and 10 components explain together, per layer."""
    total_LC, layers = variance(space).cumsum(axis=1), space["layer"].values.tolist()
    shown = {"mode": "lines+text", "textposition": "middle right", "cliponaxis": False, "showlegend": False}
    shown |= {"hoverinfo": None, "hovertemplate": "%{y:.1%}"}
    traces = []
    for count in (c for c in (1, 2, 3, 5, 10) if c <= total_LC.shape[1]):
        y, text = plain(total_LC[:, count - 1]), [""] * (len(layers) - 1) + [str(count)]
        traces.append(line(layers, y, BLUE, 1 + 1.5 / count, text=text, name=f"first {count}", **shown))
    return _per_layer(space, traces, 0, 1.06 * float(total_LC.max()), tickformat=".0%").update_layout(margin_r=28)
