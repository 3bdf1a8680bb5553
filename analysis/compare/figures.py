"""Figures of two runs side by side; the page refills the scatter for other layers."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from personaspace.analysis.compare.comparison import Measure, Pair
from personaspace.analysis.pages.charts import (
    AMBER,
    BAND,
    BLUE,
    INK,
    MUTED,
    PAPER,
    TOWARDS_DEEP,
    VERMILLION,
    chart,
    clip,
    kind_styles,
    label,
    line,
    plain,
)

NAME = 28
"""Characters of a run's name in a chart."""


def name(run: str) -> str:
    """A run's name as the charts write it."""
    return label(run, NAME)


def scatter(pair: Pair, all_kinds: Sequence[str]) -> go.Figure:
    """The roles' positions in the first run (x) and in the second (y), with the line on which nothing moves.

    ``all_kinds``: those of all runs of the comparison, so that a kind looks the same in every pair.
    """
    at = pair.data.isel(place=pair.at)
    x_R, y_R = at["position"].transpose("run", "role").values
    kinds = [str(kind) for kind in at["role_kind"].values]
    styles = kind_styles(all_kinds)
    cards = [[label(str(role)), label(kinds[row]), row] for row, role in enumerate(at["role"].values)]
    low, high = (float(bound) for bound in (min(x_R.min(), y_R.min(), 0) - 0.15, max(x_R.max(), y_R.max(), 1) + 0.15))
    marker = {"color": [styles[kind][0] for kind in kinds], "symbol": [styles[kind][1] for kind in kinds], "size": 10}
    own = {"color": INK, "symbol": "star", "size": 17, "line": {"width": 1.5, "color": PAPER}}
    common = {"mode": "markers+text", "textfont": {"size": 11}}
    hover = f"<b>%{{customdata[0]}}</b> (%{{customdata[1]}})<br>{name(pair.a.name)} %{{x:.2f}}<br>"
    hover += f"{name(pair.b.name)} %{{y:.2f}}<extra></extra>"
    traces = [
        line([low, high], [low, high], MUTED, 1, dash="dot", meta={"part": "same"}),
        go.Scatter(
            x=plain(x_R), y=plain(y_R), text=[card[0] for card in cards], customdata=cards, hovertemplate=hover,
            marker=marker | {"line": {"width": 1, "color": PAPER}}, meta={"part": "roles"}, **common,
        ),
        go.Scatter(
            x=[1], y=[1], text=["<b>default</b>"], textposition="bottom center", marker=own, hoverinfo="skip",
            meta={"part": "default"}, **common,
        ),
    ]  # fmt: skip
    axes = {
        "xaxis": {"title": {"text": f"position in {name(pair.a.name)}"}, "fixedrange": False, "range": [low, high]},
        "yaxis": {"title": {"text": f"position in {name(pair.b.name)}"}, "fixedrange": False, "range": [low, high]},
    }
    axes["yaxis"] |= {"scaleanchor": "x", "constrain": "domain"}
    axes["xaxis"] |= {"constrain": "domain"}
    return chart(traces, height=560, showlegend=False, dragmode="zoom", margin_t=10, **axes)


def curve(pair: Pair, measure: Measure) -> go.Figure | None:
    """A measure per layer of the first run above its nulls, the target layers marked; None where it is missing."""
    if measure.name not in pair.data:
        return None
    value, null = pair.data[measure.name].values, pair.data[f"{measure.name}_p99"]
    layers, others = pair.data["layer_a"].values.tolist(), pair.data["layer_b"].values.tolist()
    shown = {"hoverinfo": None, "hovertemplate": "%{y:.2f}"}
    any_null, kind_null = (null.sel(null=which).values for which in ("any", "kind"))
    floor = float(np.nanmin([*value, *any_null, 0.0])) - 0.06
    words = "random directions" if measure.name == "axis_cosine" else "relabelled roles"
    band = {"fill": "tonexty", "fillcolor": BAND, "name": f"{words}, 99th percentile", "dash": "dot", **shown}
    traces = [
        line(layers, [floor] * len(layers), MUTED, 0, showlegend=False),
        line(layers, plain(any_null), MUTED, 1, **band),
    ]
    if np.isfinite(kind_null).any():
        within = {"name": "relabelled within kinds, 99th percentile", "dash": "dash", **shown}
        traces.append(line(layers, plain(kind_null), AMBER, 1.5, **within))
    own = {"mode": "lines+markers", "marker": {"size": 5}, "name": "the two runs", **shown}
    if layers != others:
        own |= {"customdata": others, "hovertemplate": f"%{{y:.2f}} (layer %{{customdata}} of {name(pair.b.name)})"}
    traces.append(line(layers, plain(value), BLUE, 2.5, **own))
    traces += _marks(pair, floor)
    xaxis = _layer_axis(pair.a.name, layers)
    xaxis["unifiedhovertitle"] = {"text": f"layer %{{x}} of {name(pair.a.name)}"}
    yaxis = {"range": [floor, 1.04], "zeroline": False}
    # A run may have few layers, far apart: the nearest one answers.
    return chart(traces, height=290, hovermode="x unified", hoverdistance=-1, xaxis=xaxis, yaxis=yaxis)


def _layer_axis(run: str, layers: Sequence[int]) -> dict[str, object]:
    return {"title": {"text": f"layer of {name(run)}"}, "dtick": max(1, round((layers[-1] - layers[0]) / 30) * 5)}


def _marks(pair: Pair, floor: float) -> list[go.Scatter]:
    """The layer that the comparison is about, and the target of the second run where that is another one."""
    layers, others = pair.data["layer_a"].values.tolist(), pair.data["layer_b"].values.tolist()
    marks = {layers[pair.at]: f"layer {layers[pair.at]}"}
    if pair.b.target in others and (theirs := layers[others.index(pair.b.target)]) not in marks:
        marks[theirs] = f"target of {clip(pair.b.name, 14)}"
    middle = (layers[0] + layers[-1]) / 2
    traces: list[go.Scatter] = []
    for at, text in marks.items():
        note = {"mode": "lines+text", "text": ["", f" {label(text)} ", ""], "textfont": {"color": MUTED}}
        note["textposition"] = "middle left" if at > middle else "middle right"  # away from the edge of the chart
        height = floor + 0.05 * (1 + 1.3 * len(traces)) * (1.04 - floor)
        traces.append(line([at] * 3, [floor, height, 1.04], MUTED, 1, showlegend=False, **note))
    return traces


def cka_map(pair: Pair) -> go.Figure:
    """Linear CKA of every layer of the first run (x) with every layer of the second (y)."""
    cka = pair.data["cka_layers"].transpose("layer_of_b", "layer_of_a").values
    layers, others = pair.data["layer_of_a"].values.tolist(), pair.data["layer_of_b"].values.tolist()
    names = name(pair.a.name), name(pair.b.name)
    hover = f"{names[0]} layer %{{x}}<br>{names[1]} layer %{{y}}<br>CKA %{{z:.2f}}<extra></extra>"
    bar = {"thickness": 10, "outlinewidth": 0, "title": {"text": "CKA", "font": {"size": 12}}}
    low = float(np.floor(np.nanmin(cka, initial=1.0) * 20) / 20)
    heat = go.Heatmap(
        x=layers, y=others, z=[plain(row, 3) for row in cka], zmin=low, zmax=1, hovertemplate=hover, colorbar=bar,
        colorscale=[[0, PAPER], [0.5, BLUE], [1, TOWARDS_DEEP]],
    )  # fmt: skip
    mark = {"symbol": "circle-open", "size": 12, "color": VERMILLION, "line": {"width": 2.5}}
    at = go.Scatter(x=[pair.layers[0]], y=[pair.layers[1]], mode="markers", marker=mark, hoverinfo="skip")
    pairs = line(pair.data["layer_a"].values.tolist(), pair.data["layer_b"].values.tolist(), VERMILLION, 1, dash="dot")
    axes = {"xaxis": _layer_axis(pair.a.name, layers), "yaxis": _layer_axis(pair.b.name, others)}
    square = {"showgrid": False, "zeroline": False, "constrain": "domain"}
    axes = {key: axis | square for key, axis in axes.items()}
    if abs(len(layers) - len(others)) <= min(len(layers), len(others)):
        axes["yaxis"] |= {"scaleanchor": "x"}
    return chart([heat, pairs, at], height=520, showlegend=False, margin_t=10, **axes)
