"""The timeline as a page that opens in any browser, without a network: a row for each stage of each replica."""

import html
import json
from typing import Any

import plotly.graph_objects as go

COLOURS = {"load": "#9a9a9a", "forward": "#2a6fdb", "generate": "#2a6fdb", "commit": "#e08a1e"}
ROW = 26
"""Pixels of height for each row."""


def timeline_page(trace: bytes) -> str:
    """A self-contained page from a trace of `timeline.py`. Hovering names the work; the wheel zooms in time."""
    document = json.loads(trace)
    events: list[dict[str, Any]] = document["traceEvents"]
    processes = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    tracks = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    rows = []
    for process, replica in processes.items():
        rows.append(replica)  # Its marks.
        rows += [f"{replica}, {name}" for (of, _), name in tracks.items() if of == process]
    figure = go.Figure()
    for activity, colour in COLOURS.items():
        pieces = [event for event in events if event["ph"] == "X" and event["cat"] == activity]
        if pieces:
            figure.add_trace(_lines(activity, colour, pieces, processes, tracks))
    for name, symbol, colour in (("ready", "triangle-right", "#2e9e5b"), ("lost", "x", "#c8342b")):
        marks = [event for event in events if event["ph"] == "i" and event["name"] == name]
        if marks:
            figure.add_trace(
                go.Scatter(
                    name=name,
                    mode="markers",
                    x=[mark["ts"] / 1e6 for mark in marks],
                    y=[processes[mark["pid"]] for mark in marks],
                    text=[html.escape(str(mark["args"].get("reason", ""))) for mark in marks],
                    marker={"symbol": symbol, "color": colour, "size": 12},
                    hovertemplate="%{x:.2f} s  " + name + " %{text}<extra></extra>",
                )
            )
    title = html.escape(document["otherData"]["title"])
    figure.update_layout(
        title=title,
        template="plotly_white",
        height=180 + ROW * len(rows),
        hovermode="closest",
        dragmode="pan",
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom"},
        margin={"l": 10, "r": 10, "t": 100, "b": 50},
        xaxis={"title": "seconds since the first work"},
        yaxis={"categoryorder": "array", "categoryarray": rows[::-1], "fixedrange": True, "automargin": True},
    )
    page: str = figure.to_html(include_plotlyjs=True, config={"scrollZoom": True, "displaylogo": False})
    return page.replace("<head>", f"<head><title>{title}</title>", 1)


def _lines(
    activity: str,
    colour: str,
    pieces: list[dict[str, Any]],
    processes: dict[int, str],
    tracks: dict[tuple[int, int], str],
) -> go.Scatter:
    """All work of one kind as one trace of line pieces: tens of thousands of them stay quick to look at."""
    x: list[float | None] = []
    y: list[str | None] = []
    text: list[str] = []
    for piece in pieces:
        begin, end = piece["ts"] / 1e6, (piece["ts"] + piece["dur"]) / 1e6
        row = f"{processes[piece['pid']]}, {tracks[piece['pid'], piece['tid']]}"
        busy = piece["args"]["busy_seconds"] / max(end - begin, 1e-6)
        label = f"{html.escape(piece['name'])}: {end - begin:.2f} s, {min(1.0, busy):.0%} busy"
        x += [begin, end, None]
        y += [row, row, None]
        text += [label, label, ""]
    return go.Scatter(
        name=activity,
        mode="lines",
        x=x,
        y=y,
        text=text,
        line={"color": colour, "width": 12, "simplify": False},
        hovertemplate="%{x:.2f} s  %{text}<extra></extra>",
    )
