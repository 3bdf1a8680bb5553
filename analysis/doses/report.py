"""The page of a sweep: who speaks at each dose, whether it holds together, and every response beside its siblings.

`render_doses` is pure. All text is escaped; what the page's script shows of responses it sets as text.
"""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from markupsafe import Markup

from personaspace.analysis.doses.measure import SPEAKERS, Dose
from personaspace.analysis.pages import charts
from personaspace.analysis.pages.page import render_page
from personaspace.analysis.quality.shares import Share

MARKER = '<meta name="generator" content="personaspace sweep">'
"""By which a page of ours is told from any other file."""
SHOWN = 200
"""Prompts whose responses the page keeps; of more, an even choice."""
ANSWERED = 900
"""Characters of a response that the page keeps."""
STYLES = dict(
    zip(
        SPEAKERS,
        (
            (charts.BLUE, "circle", "solid"),
            (charts.GREEN, "square", "dash"),
            (charts.VERMILLION, "triangle-up", "dot"),
            (charts.PURPLE, "diamond", "dashdot"),
            (charts.MUTED, "x", "longdash"),
        ),
        strict=True,
    )
)
"""Colour, symbol and dash of each speaker."""


def render_doses(doses: Sequence[Dose], *, title: str, unit: str) -> str:
    """The whole page. ``unit``: what doses count in, for people."""
    values = [dose.value for dose in doses]
    xaxis = {"title": {"text": f"dose, in {unit}"}, "tickvals": values}
    figures = {"speakers": _speakers(doses, xaxis), "coherence": _coherence(doses, xaxis)}
    data = {
        "figures": {name: figure.to_plotly_json() for name, figure in figures.items()},
        "dark": charts.DARK,
        "doses": values,
        "prompts": _prompts(doses),
    }
    return render_page(
        "doses/doses.html.j2",
        title=title,
        marker=Markup(MARKER),
        unit=unit,
        doses=doses,
        speakers=SPEAKERS,
        steer=next((dose.steer for dose in doses if dose.steer), {}),
        data=data,
    )


def _speakers(doses: Sequence[Dose], xaxis: object) -> go.Figure:
    traces = [
        _shares(doses, name, [dose.speakers()[name] for dose in doses])
        for name in SPEAKERS
        if any(dose.speakers()[name].count for dose in doses)
    ]
    yaxis = {"tickformat": ".0%", "range": [-0.03, 1.03], "title": {"text": "share of the responses"}}
    return charts.chart(traces, height=400, xaxis=xaxis, yaxis=yaxis)


def _coherence(doses: Sequence[Dose], xaxis: object) -> go.Figure:
    trace = _shares(doses, "assistant", [dose.coherent for dose in doses]).update(name="holds together")
    yaxis = {"tickformat": ".0%", "range": [-0.03, 1.03], "title": {"text": "share of the responses"}}
    return charts.chart([trace], height=280, xaxis=xaxis, yaxis=yaxis, showlegend=False)


def _shares(doses: Sequence[Dose], style: str, shares: Sequence[Share]) -> go.Scatter:
    """A line with Wilson's 95% intervals."""
    colour, symbol, dash = STYLES[style]
    share = np.array([one.share for one in shares])
    low, high = np.array([one.interval for one in shares]).T
    return charts.line(
        [dose.value for dose in doses],
        charts.plain(share),
        colour,
        2,
        dash=dash,
        name=style,
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
        hovertemplate=f"<b>{style}</b> at %{{x}}<br>%{{customdata[0]}} of %{{customdata[1]}}<extra></extra>",
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
                else {"text": said[key].response[:ANSWERED], "speaker": said[key].speaker, "whole": said[key].coherent}
                for said in by_dose
            ],
        }
        for key in chosen
    ]
