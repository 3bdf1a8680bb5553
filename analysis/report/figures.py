"""Plotly figures of a persona space: pure functions of the dataset that the report, or a notebook, draws.

Every figure is complete for the layer it is asked for, on a transparent ground and in the light palette. The report
refills `x`, `y`, `z`, `marker.color` and the tick labels for another layer and swaps colours; the `meta` of a trace
says which part of the chart it is. Shape suffixes: R roles and then default, L layers, C components, N rollouts.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from numpy.typing import NDArray

from personaspace.analysis.pages.charts import (
    AWAY_DEEP,
    BLUE,
    INK,
    MIDDLE,
    MUTED,
    PAPER,
    STRIP,
    TOWARDS_DEEP,
    VERMILLION,
    Floats,
    chart,
    kind_styles,
    label,
    line,
    plain,
    quoted,
    wrapped,
)

MAP_HOVER = "<b>%{customdata[0]}</b> (%{customdata[1]})<br>position %{customdata[3]:.2f}<br>%{customdata[2]}"
POSITION_SCALE = [[0.0, AWAY_DEEP], [0.25, VERMILLION], [0.5, MIDDLE], [0.75, BLUE], [1.0, TOWARDS_DEEP]]
STRIP_LIMIT = 5000
"""Up to this many rollouts are drawn one by one behind the ranking; beyond it, as quantiles."""
QUANTILES = (0.05, 0.25, 0.75, 0.95)


def layer_index(space: xr.Dataset, layer: int) -> int:
    """Where the layer lies along the dimension `layer`."""
    layers = [int(value) for value in space["layer"].values]
    if layer not in layers:
        raise ValueError(f"Layer {layer} is not in this space. Choose one of its layers: {layers}.")
    return layers.index(layer)


def map_scores(space: xr.Dataset) -> Floats:
    """Coordinates that the map draws, (layer, 3, role and then default); zero where there is no such component."""
    roles_LCR = space["role_score"].transpose("layer", "component", "role").values[:, :3]
    default_LC = space["default_score"].transpose("layer", "component").values[:, :3]
    score_LCR = np.concatenate([roles_LCR, default_LC[:, :, None]], axis=2).astype(np.float64)
    return np.pad(score_LCR, ((0, 0), (0, 3 - score_LCR.shape[1]), (0, 0)))


def positions(space: xr.Dataset) -> Floats:
    """Positions on the axis, (layer, role and then default)."""
    position_LR = space["role_position"].transpose("layer", "role").values.astype(np.float64)
    return np.pad(position_LR, ((0, 0), (0, 1)), constant_values=1.0)


def reach(space: xr.Dataset) -> Floats:
    """How far the 95% interval over questions reaches beyond each position, (layer, up and down, role and then
    default).

    NaN where there is no interval; `default` is at 1 by definition.
    """
    position_LR = positions(space)
    interval = space["role_position_interval"].sel(resampled="questions")
    ends_LBR = interval.sel(bound=["high", "low"]).transpose("layer", "bound", "role").values.astype(np.float64)
    reach_LBR = (ends_LBR - position_LR[:, None, :-1]) * np.array([1, -1])[:, None]
    # The interval of a draw may end on the other side of the position by a rounding error.
    return np.pad(np.maximum(reach_LBR, 0), ((0, 0), (0, 0), (0, 1)), constant_values=np.nan)


def rollout_rows(space: xr.Dataset) -> NDArray[np.int64]:
    """Row of each rollout's role; the number of roles stands for `default`, -1 for a role that is not there."""
    rows = {str(role): row for row, role in enumerate([*space["role"].values, "default"])}
    return np.array([rows.get(str(role), -1) for role in space["rollout_role"].values], dtype=np.int64)


def rollout_quantiles(space: xr.Dataset) -> Floats:
    """Quantiles of the rollouts' positions, (layer, role and then default, quantile)."""
    rows, position_NL = rollout_rows(space), space["rollout_position"].transpose("rollout", "layer").values
    quantiles_LRQ = np.full((space.sizes["layer"], space.sizes["role"] + 1, len(QUANTILES)), np.nan)
    for row in np.unique(rows[rows >= 0]):
        quantiles_LRQ[:, row] = np.nanquantile(position_NL[rows == row], QUANTILES, axis=0).T
    return quantiles_LRQ


def component_title(space: xr.Dataset, layer: int, component: int) -> str:
    """Axis title such as "PC1 (23.1% of variance)"."""
    if component >= space.sizes["component"]:
        return f"PC{component + 1} (not computed)"
    return f"PC{component + 1} ({variance(space)[layer_index(space, layer), component]:.1%} of variance)"


def variance(space: xr.Dataset) -> Floats:
    """Explained variance ratios, (layer, component)."""
    return space["explained_variance_ratio"].transpose("layer", "component").values.astype(np.float64)


def persona_map(
    space: xr.Dataset, layer: int, *, components: Sequence[int] = (0, 1), responses: Mapping[str, str] | None = None
) -> go.Figure:
    """Roles and default in the space of two or three principal components, coloured by position on the axis."""
    at, flat, responses = layer_index(space, layer), len(components) == 2, responses or {}
    score_CR, position_R = map_scores(space)[at], positions(space)[at, :-1]
    kinds = [str(kind) for kind in space["role_kind"].values]
    cards: list[list[object]] = []
    for row, (role, kind) in enumerate(zip(space["role"].values, kinds, strict=True)):
        about = wrapped(str(space["role_description"].values[row]), 140) + quoted(responses.get(str(role)))
        count = f"{kind}, {int(space['role_count'].values[row])} rollouts"
        cards.append([label(str(role)), label(count), about, round(float(position_R[row]), 3), row])
    own_card = ["default", f"{space.attrs['default_count']} rollouts", quoted(responses.get("default")), 1, len(kinds)]
    span = round(float(np.nanmax(np.abs(position_R), initial=0.1)), 2)
    title = {"text": "position (0 mean role, 1 default)", "side": "top", "font": {"size": 12}}
    bar = {"orientation": "h", "thickness": 8, "lenmode": "pixels", "len": 230, "nticks": 5, "outlinewidth": 0}
    bar |= {"title": title, "x": 1, "xanchor": "right", "y": 1.01, "yanchor": "bottom"}
    styles = kind_styles(kinds)
    # 3-D charts know few of the symbols, so there the kinds share one.
    symbol = [styles[kind][1] for kind in kinds] if flat else "circle"
    marker = {"color": plain(position_R), "colorscale": POSITION_SCALE, "cmin": -span, "cmax": span, "colorbar": bar}
    marker |= {"symbol": symbol, "size": 11 if flat else 6, "line": {"width": 1, "color": INK if flat else MUTED}}
    own_marker: dict[str, object] = {"color": INK, "line": {"width": 1.5, "color": PAPER}, "size": 19 if flat else 9}
    own_marker["symbol"] = "star" if flat else "diamond"
    common: dict[str, object] = {"mode": "markers+text", "textposition": "top center", "textfont": {"size": 11}}
    common["hovertemplate"] = MAP_HOVER + "<extra></extra>"
    traces = []
    parts = (("roles", slice(-1), marker, cards), ("default", slice(-1, None), own_marker, [own_card]))
    for part, chosen, style, data in parts:
        place: dict[str, object] = {key: plain(score_CR[c, chosen]) for key, c in zip("xyz", components, strict=False)}
        place |= {"text": [str(card[0]) for card in data], "customdata": data, "meta": {"part": part}}
        traces.append((go.Scatter if flat else go.Scatter3d)(**place, **common, marker=style))
    titles = zip("xyz", [{"text": component_title(space, layer, c)} for c in components], strict=False)
    if flat:
        free = {"zeroline": False, "fixedrange": False}
        axes = {f"{key}axis": free | {"title": title} for key, title in titles}
        return chart(traces, height=600, showlegend=False, dragmode="zoom", margin_t=30, **axes)
    grid = {"gridcolor": MUTED, "zerolinecolor": MUTED, "color": INK, "showbackground": False}
    scene: dict[str, object] = {f"{key}axis": grid | {"title": title} for key, title in titles}
    scene |= {"aspectmode": "cube", "camera": {"eye": {"x": 1.3, "y": -1.5, "z": 0.6}, "center": {"z": -0.12}}}
    return chart(traces, height=600, showlegend=False, scene=scene, margin={"l": 0, "r": 0, "t": 30, "b": 0})


def ranking(space: xr.Dataset, layer: int) -> go.Figure:
    """Roles in order of their position on the axis, default on top, with the rollouts' own positions behind."""
    at, n = layer_index(space, layer), space.sizes["role"]
    position_R = positions(space)[at]
    order = [*np.argsort(position_R[:n], kind="stable").tolist(), n]
    height_R = np.argsort(order)
    names = [label(str(role)) for role in space["role"].values] + ["<b>default</b>"]
    y = np.repeat(height_R, 3).tolist()  # start, end and gap of each row's line
    # Lines of reference are traces, because Plotly draws a shape behind the grid.
    more = {"showlegend": False, "meta": {"part": "rule"}}
    traces = [line([x, x], [-0.8, n + 0.8], MUTED, 1, dash=dash, **more) for x, dash in ((0, "solid"), (1, "dot"))]
    if space.sizes["rollout"] <= STRIP_LIMIT:
        rows = rollout_rows(space)
        x = plain(space["rollout_position"].isel(layer=at).values[rows >= 0], 3)
        tick = {"symbol": "line-ns-open", "size": 9, "color": STRIP, "line": {"width": 1}}
        strip = {"x": x, "y": height_R[rows[rows >= 0]].tolist(), "marker": tick, "mode": "markers"}
        traces.append(go.Scatter(**strip, hoverinfo="skip", name="one rollout", meta={"part": "strip"}))
    else:
        quantiles_RQ = np.pad(rollout_quantiles(space)[at], ((0, 0), (0, 1)), constant_values=np.nan)
        for low, high, width, name in ((0, 3, 2, "5 to 95% of rollouts"), (1, 2, 7, "25 to 75% of rollouts")):
            x = plain(quantiles_RQ[:, [low, high, -1]].ravel())
            traces.append(line(x, y, STRIP, width, name=name, meta={"part": "band", "band": [low, high]}))
    x = plain(np.stack([np.zeros(n), position_R[:n], np.full(n, np.nan)], axis=1).ravel())
    traces.append(line(x, y[: 3 * n], MIDDLE, 1.5, showlegend=False, meta={"part": "stem"}))
    kinds = np.array([str(kind) for kind in space["role_kind"].values])
    groups = [(label(k), *style, np.flatnonzero(kinds == k)) for k, style in kind_styles(kinds.tolist()).items()]
    for name, colour, symbol, members in [*groups, ("default", INK, "star", np.array([n]))]:
        marker = {"color": colour, "symbol": symbol, "size": 15 if symbol == "star" else 10, "line": {"color": PAPER}}
        dots = {"x": plain(position_R[members]), "y": height_R[members].tolist(), "mode": "markers"}
        dots |= {"customdata": [names[row] for row in members], "meta": {"part": "dot", "roles": members.tolist()}}
        dots["hovertemplate"] = "%{customdata}: %{x:.2f}<extra>" + name + "</extra>"
        above, below = (plain(reach_R[members]) for reach_R in reach(space)[at])
        error = {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "color": MUTED}
        traces.append(go.Scatter(**dots, marker=marker, name=name, error_x=error | {"thickness": 1.5, "width": 4}))
    yaxis = {"tickvals": list(range(n + 1)), "ticktext": [names[row] for row in order], "range": [-0.8, n + 0.8]}
    height = 80 + (22 if n <= 60 else 16) * (n + 2)
    figure = chart(traces, height=height, yaxis=yaxis, margin={"l": 60, "t": 56, "b": 12})
    note = {"y": 1, "yref": "paper", "yanchor": "bottom", "yshift": 20, "showarrow": False}
    figure.add_annotation(x=0, text="mean role", xanchor="right", xshift=12, **note)
    figure.add_annotation(x=1, text="default", xanchor="left", xshift=-12, **note)
    return figure.update_layout(xaxis={"side": "top", "zeroline": False}, yaxis={"showgrid": False, "zeroline": False})


def trait_ranking(space: xr.Dataset, layer: int) -> go.Figure:
    """Traits by the cosine of their vector (positive pole less negative) with the axis, as bars from 0."""
    at, names = layer_index(space, layer), [label(str(trait)) for trait in space["trait"].values]
    cosine_T = space["trait_axis_cosine"].transpose("layer", "trait").values[at].astype(np.float64)
    order = np.argsort(cosine_T, kind="stable").tolist()
    places = {"y": list(range(len(order))), "x": plain(cosine_T[order])}
    hover = {"customdata": [names[row] for row in order], "hovertemplate": "%{customdata}: %{x:.2f}<extra></extra>"}
    bars = go.Bar(**places, **hover, orientation="h", marker={"color": BLUE}, width=0.6)
    yaxis = {"tickvals": places["y"], "ticktext": [names[row] for row in order], "showgrid": False}
    xaxis = {"side": "top", "title": {"text": "cosine with the axis"}}
    return chart([bars], height=90 + 18 * len(order), xaxis=xaxis, yaxis=yaxis, margin={"l": 60, "t": 64, "b": 12})
