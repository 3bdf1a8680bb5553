"""Where each turn of a conversation lies on the axis, of the model as it is and capped."""

from typing import Any

import plotly.graph_objects as go

from personaspace.analysis.pages import charts
from personaspace.steer.live.dialogue import SIDES, Record, Side
from personaspace.steer.live.gauge import Gauge

NAMES: dict[Side, str] = {"plain": "As it is", "capped": "Capped"}
COLOURS: dict[Side, str] = {"plain": charts.VERMILLION, "capped": charts.BLUE}
SYMBOLS: dict[Side, str] = {"plain": "circle", "capped": "square"}
FIRST_SIDE = 2
"""Number of the curve of the first side; those before are the default range."""


def turn_chart(record: Record, gauge: Gauge) -> go.Figure:
    """A point for each finished answer, over the range of the run's default responses."""
    ends = [0.5, max(6, len(record.said)) + 0.5]
    traces: list[Any] = [
        charts.line(ends, [gauge.low] * 2, charts.MUTED, 0, showlegend=False),
        charts.line(
            ends, [gauge.high] * 2, charts.MUTED, 0, fill="tonexty", fillcolor=charts.BAND, name="default range"
        ),
    ]
    for side in SIDES:
        turns = record.answers[side]
        traces.append(
            charts.line(
                [number + 1 for number in range(len(turns))],
                [turn.position for turn in turns],
                COLOURS[side],
                2,
                name=NAMES[side],
                mode="lines+markers",
                marker={"symbol": SYMBOLS[side], "size": 9, "color": COLOURS[side]},
                meta=side,
                hoverinfo=None,
                hovertemplate="turn %{x}: %{y:.2f}<extra>" + NAMES[side] + "</extra>",
            )
        )
    yaxis = {"title": {"text": f"position, layer {gauge.layer}"}}
    xaxis = {"title": {"text": "turn"}, "range": ends, "dtick": 1}
    return charts.chart(traces, height=260, xaxis=xaxis, yaxis=yaxis, hovermode="closest")
