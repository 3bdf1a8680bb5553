"""The page of persona drift: every conversation's way through the persona space, turn by turn, with what was said.

`render_drift` is pure. All text is escaped; what the page's script shows of conversations it sets as text.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from markupsafe import Markup

from personaspace.analysis.drift.run import Talk
from personaspace.analysis.drift.tables import name_of
from personaspace.analysis.drift.trajectories import Movement, movements
from personaspace.analysis.pages import charts
from personaspace.analysis.pages.page import render_page

SHOWN = 120
"""Conversations that the page shows; of more, those with the largest drift and an even choice of the others."""
EXTREMES = 40
"""Of those, how many are there for their drift."""
SAID, ANSWERED = 500, 900
"""Characters of a turn that the page keeps."""
MARKER = '<meta name="generator" content="personaspace drift">'
"""By which a page of ours is told from any other file."""
HOVER = (
    "<b>%{meta.name}</b>, turn %{x}<br>%{y:.2f}, mean of %{customdata[2]} tokens<br>"
    "%{customdata[0]}%{customdata[1]}<extra></extra>"
)


def render_drift(drift: xr.Dataset, talks: Mapping[int, Talk], *, title: str) -> str:
    """The whole page. ``drift`` of ``drift_of``; ``talks`` has the texts of the conversations of ``choose``."""
    target = int(drift.attrs["target_layer"])
    shown = drift.isel(conversation=choose(drift))
    by_layer = {int(layer): movements(drift, int(layer)) for layer in drift["layer"].values}
    domains = list(dict.fromkeys(shown["domain"].values.tolist()))
    styles = charts.legend(domains) if len(domains) > 1 else []
    drawn = {"ways": _ways(shown, talks, target), **_per_layer(by_layer, target)}
    data = {
        "figures": {name: figure.to_plotly_json() for name, figure in drawn.items()},
        "dark": charts.DARK,
        "layers": drift["layer"].values.tolist(),
        "target": drift["layer"].values.tolist().index(target),
        "talks": [_talk(shown, talks, number) for number in range(shown.sizes["conversation"])],
        "measures": ["position", *(f"PC{number + 1}" for number in range(shown.sizes["component"]))],
        "values": _values(shown),
        "ranges": _ranges(shown),
        "moves": [_moves(shown.sel(layer=layer)) for layer in shown["layer"].values],
        "domains": domains,
        "summaries": [[_summary(movement) for movement in of_layer] for of_layer in by_layer.values()],
    }
    return render_page(
        "drift/drift.html.j2",
        title=title,
        marker=Markup(MARKER),
        drift=drift,
        target=target,
        summary=by_layer[target][0],
        kinds=styles,
        domains=domains,
        authors=sorted({talk.written_by for talk in talks.values()}),
        left_out=drift.sizes["conversation"] - shown.sizes["conversation"],
        data=data,
    )


def choose(drift: xr.Dataset) -> list[int]:
    """Places of the conversations that a page shows, in the order of the dataset."""
    drift_C = drift["drift"].sel(layer=drift.attrs["target_layer"]).values
    order = np.argsort(-np.abs(drift_C), kind="stable")
    if len(order) <= SHOWN:
        return list(range(len(order)))
    others = order[EXTREMES:]
    even = others[np.linspace(0, len(others) - 1, SHOWN - EXTREMES).round().astype(int)]
    return sorted({*order[:EXTREMES].tolist(), *even.tolist()})


def _ways(drift: xr.Dataset, talks: Mapping[int, Talk], layer: int) -> go.Figure:
    """Positions over turns at one layer: a line for each conversation over the default range."""
    at = drift.sel(layer=layer)
    low, high = at["default_position"].values.tolist()
    ends = [0.5, at.sizes["turn"] + 0.5]
    traces = [
        charts.line(ends, [low, low], charts.MUTED, 0, meta={"part": "low"}, showlegend=False),
        charts.line(ends, [high, high], charts.MUTED, 0, meta={"part": "high"}, fill="tonexty", fillcolor=charts.BAND),
    ]
    styles = charts.kind_styles(drift["domain"].values.tolist())
    for number in range(at.sizes["conversation"]):
        turns = _turns(drift, number)
        colour, symbol = styles[str(drift["domain"].values[number])]
        talk = talks[int(drift["conversation"].values[number])]
        cards = [[*_card(talk, turn), int(at["tokens"].values[number, turn])] for turn in turns]
        more: dict[str, Any] = {"mode": "lines+markers", "marker": {"symbol": symbol, "size": 7, "color": colour}}
        more |= {"customdata": cards, "hoverinfo": None, "hovertemplate": HOVER}
        more |= {"meta": {"part": "talk", "name": charts.label(name_of(drift, number), 60)}}
        y = charts.plain(at["position"].values[number, turns], 3)
        traces.append(charts.line([turn + 1 for turn in turns], y, colour, 1.5, **more))
    for number, domain in enumerate(dict.fromkeys(drift["domain"].values.tolist())):
        colour, _ = styles[domain]
        mean = {"meta": {"part": "mean", "domain": number}, "dash": "dash"}
        traces.append(charts.line([], [], colour, 3.5, **mean))
    xaxis = {"title": {"text": "turn of the assistant"}, "range": ends, "dtick": max(1, round(ends[1] / 15))}
    yaxis = {"title": {"text": ""}}
    return charts.chart(traces, height=470, xaxis=xaxis, yaxis=yaxis, showlegend=False, hovermode="closest")


def _per_layer(by_layer: Mapping[int, Sequence[Movement]], target: int) -> dict[str, go.Figure]:
    """Mean drift with its interval, and the shares of turns below the range, layer by layer."""
    layers, found = list(by_layer), [of_layer[0] for of_layer in by_layer.values()]

    def values(pick: Any) -> list[float | None]:
        return charts.plain(np.array([pick(movement) for movement in found], dtype=np.float64))

    shown = {"hoverinfo": None, "hovertemplate": "%{y:.2f}"}
    dots = {"mode": "lines+markers", "marker": {"size": 5}}
    low, high = values(lambda one: one.drift_interval[0]), values(lambda one: one.drift_interval[1])
    zero = charts.line(layers, [0] * len(layers), charts.MUTED, 1, showlegend=False)
    mean = [
        zero,
        charts.line(layers, low, charts.MUTED, 0, showlegend=False),
        charts.line(
            layers, high, charts.MUTED, 0, fill="tonexty", fillcolor=charts.BAND, name="95% interval", showlegend=True
        ),
        charts.line(layers, values(lambda one: one.drift), charts.BLUE, 2.5, name="mean drift", **shown, **dots),
    ]
    percent = {"hoverinfo": None, "hovertemplate": "%{y:.0%}"}
    first, later = values(lambda one: one.first_below), values(lambda one: one.later_below)
    below = [
        charts.line(layers, [0.05] * len(layers), charts.MUTED, 1, dash="dot", name="default rollouts", **percent),
        charts.line(layers, first, charts.BLUE, 2, name="first turns", **percent, **dots),
        charts.line(layers, later, charts.VERMILLION, 2, name="later turns", dash="dash", **percent, **dots),
    ]
    xaxis = {"title": {"text": "layer"}, "unifiedhovertitle": {"text": "layer %{x}"}}
    mark = {"type": "line", "x0": target, "x1": target, "y0": 0, "y1": 1, "yref": "paper", "layer": "below"}
    shapes = [mark | {"line": {"color": charts.MUTED, "width": 1, "dash": "dot"}}]
    common: dict[str, Any] = {"height": 290, "hovermode": "x unified", "xaxis": xaxis, "shapes": shapes}
    return {
        "drift-layers": charts.chart(mean, **common),
        "below-layers": charts.chart(below, **common, yaxis={"tickformat": ".0%", "range": [-0.03, 1.03]}),
    }


def _turns(drift: xr.Dataset, number: int) -> list[int]:
    """Turns that a conversation has."""
    present: list[int] = np.flatnonzero(drift["tokens"].values[number] > 0).tolist()
    return present


def _card(talk: Talk, turn: int) -> tuple[str, str]:
    said, answer = talk.turns[turn]
    return f"<b>User</b> {charts.wrapped(said, 220)}", f"<b>Answer</b> {charts.wrapped(answer, 330)}"


def _talk(drift: xr.Dataset, talks: Mapping[int, Talk], number: int) -> dict[str, Any]:
    talk, turns = talks[int(drift["conversation"].values[number])], _turns(drift, number)
    return {
        "name": name_of(drift, number),
        "domain": str(drift["domain"].values[number]),
        "topic": charts.clip(str(drift["topic"].values[number]), 400),
        "row": talk.row,
        "system": charts.clip(talk.system, SAID),
        "by": talk.written_by,
        "turns": [turn + 1 for turn in turns],
        "tokens": drift["tokens"].values[number, turns].tolist(),
        "said": [charts.clip(talk.turns[turn][0], SAID) for turn in turns],
        "answers": [charts.clip(talk.turns[turn][1], ANSWERED) for turn in turns],
    }


def _values(drift: xr.Dataset) -> list[list[list[list[float | None]]]]:
    """measure -> layer -> conversation -> its turns."""
    turns = [_turns(drift, number) for number in range(drift.sizes["conversation"])]
    by_measure = [drift["position"], *(drift["score"].sel(component=number) for number in drift["component"].values)]
    return [
        [
            [charts.plain(x_CT[number, of], 3) for number, of in enumerate(turns)]
            for x_CT in values.transpose("layer", "conversation", "turn").values
        ]
        for values in by_measure
    ]


def _ranges(drift: xr.Dataset) -> list[list[list[float | None]]]:
    """measure -> layer -> ends of the default range."""
    own = drift["default_position"].transpose("layer", "bound").values
    scores = drift["default_score"].transpose("component", "layer", "bound").values
    return [[charts.plain(ends, 3) for ends in of_measure] for of_measure in (own, *scores)]


def _moves(at: xr.Dataset) -> list[list[Any]]:
    """Of one layer, for each conversation: drift, slope, its interval, turns below, the first one below (1-based)."""
    return [
        [
            *charts.plain(np.array([at["drift"].values[number], at["slope"].values[number]]), 3),
            *charts.plain(at["slope_interval"].values[number], 3),
            int(at["below"].values[number]),
            int(at["first_below"].values[number]) + 1 or None,
        ]
        for number in range(at.sizes["conversation"])
    ]


def _summary(movement: Movement) -> list[Any]:
    numbers = [movement.drift, *movement.drift_interval, movement.first_below, movement.later_below]
    return [movement.name, movement.conversations, *charts.plain(np.array(numbers), 3), movement.left]
