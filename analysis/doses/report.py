"""The page of a sweep: who speaks at each dose, whether it holds together, and every response beside its siblings.

`render_doses` is pure. All text is escaped; what the page's script shows of responses it sets as text.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from markupsafe import Markup

from personaspace.analysis.doses.measure import SPEAKERS, Dose
from personaspace.analysis.doses.turns import Turns
from personaspace.analysis.pages import charts
from personaspace.analysis.pages.page import render_page
from personaspace.analysis.quality.shares import Share

MARKER = '<meta name="generator" content="personaspace sweep">'
"""By which a page of ours is told from any other file."""
SHOWN = 200
"""Prompts whose responses the page keeps; of more, an even choice."""
ANSWERED = 900
"""Characters of a response that the page keeps."""
STYLES = (
    (charts.BLUE, "circle", "solid"),
    (charts.GREEN, "square", "dash"),
    (charts.VERMILLION, "triangle-up", "dot"),
    (charts.PURPLE, "diamond", "dashdot"),
    (charts.MUTED, "x", "longdash"),
)
"""Colour, symbol and dash of each category, or of each dose where turns are drawn."""


def render_doses(doses: Sequence[Dose], *, title: str, unit: str, judge: str | None = None) -> str:
    """The whole page. ``unit``: what doses count in, for people; ``judge``: who said what the responses are."""
    xaxis = {
        "title": {"text": unit},
        "tickvals": [dose.value for dose in doses],
        "ticktext": [dose.name.removeprefix("dose ") for dose in doses],
    }
    figures = {"shares": _shares(doses, xaxis), "coherence": _coherence(doses, xaxis)}
    turns = {dose.name: dose.turns for dose in doses if dose.turns is not None}
    if turns:
        figures["turns-chart"] = _turns(turns)
    data = {
        "figures": {name: figure.to_plotly_json() for name, figure in figures.items()},
        "dark": charts.DARK,
        "doses": [dose.name for dose in doses],
        "prompts": _prompts(doses),
    }
    return render_page(
        "doses/doses.html.j2",
        title=title,
        marker=Markup(MARKER),
        unit=unit,
        doses=doses,
        categories=doses[0].categories,
        speakers=set(SPEAKERS) == set(doses[0].categories),
        judge=judge,
        turns=turns,
        steer=next((dose.steer for dose in doses if dose.steer), {}),
        data=data,
    )


def _shares(doses: Sequence[Dose], xaxis: object) -> go.Figure:
    traces = [
        _line(doses, name, STYLES[number % len(STYLES)], [dose.shares()[name] for dose in doses])
        for number, name in enumerate(doses[0].categories)
        if any(dose.shares()[name].count for dose in doses)
    ]
    yaxis = {"tickformat": ".0%", "range": [-0.03, 1.03], "title": {"text": "share of the responses"}}
    return charts.chart(traces, height=400, xaxis=xaxis, yaxis=yaxis)


def _coherence(doses: Sequence[Dose], xaxis: object) -> go.Figure:
    trace = _line(doses, "holds together", STYLES[0], [dose.coherent for dose in doses])
    yaxis = {"tickformat": ".0%", "range": [-0.03, 1.03], "title": {"text": "share of the responses"}}
    return charts.chart([trace], height=280, xaxis=xaxis, yaxis=yaxis, showlegend=False)


def _turns(by_dose: Mapping[str, Turns]) -> go.Figure:
    """Mean position of each turn, a line for each dose, over the default range."""
    first = next(iter(by_dose.values()))
    longest = max(len(turns.mean_T) for turns in by_dose.values())
    ends = [0.5, longest + 0.5]
    low, high = [first.low] * 2, [first.high] * 2
    traces = [
        charts.line(ends, low, charts.MUTED, 0, showlegend=False),
        charts.line(ends, high, charts.MUTED, 0, fill="tonexty", fillcolor=charts.BAND, name="default range"),
    ]
    for number, (name, turns) in enumerate(by_dose.items()):
        colour, symbol, dash = STYLES[number % len(STYLES)]
        reach = (turns.interval_T2[:, 1] - turns.interval_T2[:, 0]) / 2
        traces.append(
            charts.line(
                [turn + 1 for turn in range(len(turns.mean_T))],
                charts.plain(turns.mean_T, 3),
                colour,
                2,
                dash=dash,
                name=name,
                mode="lines+markers",
                marker={"symbol": symbol, "size": 8, "color": colour},
                error_y={"type": "data", "array": charts.plain(reach, 3), "color": colour, "thickness": 1},
                customdata=charts.plain(turns.inside_T, 3),
                hoverinfo=None,
                hovertemplate=f"<b>{name}</b>, turn %{{x}}: %{{y:.2f}}<br>%{{customdata:.0%}} not below<extra></extra>",
            )
        )
    xaxis = {"title": {"text": "turn of the assistant"}, "range": ends, "dtick": 1}
    return charts.chart(
        traces, height=400, xaxis=xaxis, yaxis={"title": {"text": f"mean position, layer {first.layer}"}}
    )


def _line(doses: Sequence[Dose], name: str, style: tuple[str, str, str], shares: Sequence[Share]) -> go.Scatter:
    """A line with Wilson's 95% intervals."""
    colour, symbol, dash = style
    share = np.array([one.share for one in shares])
    low, high = np.array([one.interval for one in shares]).T
    return charts.line(
        [dose.value for dose in doses],
        charts.plain(share),
        colour,
        2,
        dash=dash,
        name=name,
        mode="lines+markers",
        marker={"symbol": symbol, "size": 9, "color": colour},
        error_y={
            "type": "data",
            "symmetric": False,
            "array": charts.plain(high - share),
            "arrayminus": charts.plain(share - low),
            "color": colour,
            "thickness": 1,
        },
        customdata=[[one.count, one.total] for one in shares],
        hoverinfo=None,
        hovertemplate=f"<b>{name}</b> at %{{x}}<br>%{{customdata[0]}} of %{{customdata[1]}}<extra></extra>",
    )


def _prompts(doses: Sequence[Dose]) -> list[dict[str, object]]:
    """Of each prompt: what it was, and its response at every dose that has it."""
    by_dose = [{one.prompt: one for one in dose.said} for dose in doses]
    keys = list(by_dose[0])
    chosen = [
        keys[place] for place in np.unique(np.linspace(0, len(keys) - 1, min(SHOWN, len(keys))).round().astype(int))
    ]
    return [
        {
            "role": by_dose[0][key].role,
            "question": by_dose[0][key].question,
            "responses": [
                None
                if key not in said
                else {
                    "text": said[key].response[:ANSWERED],
                    "category": said[key].category,
                    "whole": said[key].coherent,
                }
                for said in by_dose
            ],
        }
        for key in chosen
    ]
