"""What all figures share: colours, how text and numbers are written for Plotly, and a chart to start from.

Every chart is in the light palette on a transparent ground; a page swaps colours by `DARK`. All text from catalogues
and models is HTML-escaped here, because Plotly reads labels and hovers as a small HTML.
"""

import html
import itertools
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

Floats = NDArray[np.float64]

INK, MUTED, GRID = "#1d2327", "#5b6670", "#e3e6e9"
BLUE, GREEN, PURPLE, VERMILLION, AMBER = "#0072b2", "#009e73", "#b5578a", "#d55e00", "#b98300"  # after Okabe and Ito
BAND, STRIP, PAPER, MIDDLE = "rgba(110,120,130,0.16)", "rgba(70,80,90,0.38)", "#ffffff", "#c9ced3"
BLUE_BAND = "rgba(0,114,178,0.18)"
AWAY_DEEP, TOWARDS_DEEP, CLEAR = "#a34700", "#00507d", "rgba(0,0,0,0)"

DARK: Mapping[str, str] = {
    INK: "#e7eaec", MUTED: "#a5afb8", GRID: "#2c3239", PAPER: "#14171a", MIDDLE: "#5d656d", BLUE: "#56b4e9",
    GREEN: "#2fc79b", PURPLE: "#e08fbd", VERMILLION: "#ff8a3d", AMBER: "#e6b422", AWAY_DEEP: "#ffb27d",
    TOWARDS_DEEP: "#a5dbfa", BAND: "rgba(150,160,170,0.20)", STRIP: "rgba(190,200,210,0.38)",
    BLUE_BAND: "rgba(86,180,233,0.25)",
}  # fmt: skip
"""Light colour -> its counterpart on a dark page. Every colour a figure uses is a key."""

KIND_STYLES: Mapping[str, tuple[str, str]] = {
    "professional": (BLUE, "circle"), "everyday": (GREEN, "square"), "dramatic": (PURPLE, "diamond"),
    "fantastical": (VERMILLION, "triangle-up"), "abstract": (AMBER, "x"), "unknown": (MUTED, "circle"),
}  # fmt: skip


def kind_styles(kinds: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and symbol of each kind, known kinds first; a kind we do not know takes the next style that is free."""
    present = set(kinds)
    styles = {kind: style for kind, style in KIND_STYLES.items() if kind in present}
    symbols = itertools.cycle(["star-diamond", "pentagon", "hexagon", "triangle-down", "bowtie", "cross"])
    spare = itertools.cycle([GREEN, PURPLE, AMBER, BLUE, VERMILLION])
    return styles | {kind: (next(spare), next(symbols)) for kind in sorted(present - set(styles))}


def legend(kinds: Sequence[str]) -> list[tuple[str, str, str, str]]:
    """For each kind: its name, a glyph like its symbol, its colour on a light page and on a dark one."""
    glyphs = {"circle": "●", "square": "■", "diamond": "◆", "triangle-up": "▲", "x": "✖", "star-diamond": "✦"}
    glyphs |= {"pentagon": "⬟", "hexagon": "⬢", "triangle-down": "▼", "bowtie": "⧓", "cross": "✚"}
    return [(kind, glyphs[symbol], colour, DARK[colour]) for kind, (colour, symbol) in kind_styles(kinds).items()]


def clip(text: str, limit: int = 280) -> str:
    """The text on one line, cut at `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[:limit].rstrip() + "…"


def label(role: str, limit: int = 32) -> str:
    """A role's name as the charts write it. Plotly knows no &quot;, so quotes stay as they are."""
    return html.escape(clip(role, limit), quote=False)


def wrapped(text: str, limit: int) -> str:
    """The text cut at `limit` characters, in the lines of a hover."""
    # Wrap before escaping, so that no entity is cut in two.
    return "<br>".join(html.escape(line, quote=False) for line in textwrap.wrap(clip(text, limit), 44)) + "<br>"


def quoted(response: str | None) -> str:
    """A response as a hover shows it; nothing where there is none."""
    return "" if response is None else f"<i>{wrapped('“' + clip(response) + '”', 290)}</i>"


def plain(values: Floats, digits: int = 4) -> list[float | None]:
    """Numbers for JSON, which knows no NaN, with as many digits as a chart can show: that keeps the page small."""
    return [float(f"{value:.{digits}g}") if np.isfinite(value) else None for value in values]


def chart(traces: Sequence[object], *, height: int, **layout: object) -> go.Figure:
    """A figure of these traces, `height` pixels high, in the look of the pages; ``layout`` changes it."""
    # The stock template weighs 7 kB a figure and fights the page's colours.
    figure = go.Figure(traces, {"template": go.layout.Template(), "height": height, "dragmode": False})
    axis = {"gridcolor": GRID, "zerolinecolor": GRID, "linecolor": GRID, "automargin": True, "fixedrange": True}
    axis |= {"title": {"font": {"size": 12}}, "tickangle": 0}
    return figure.update_layout(
        {"paper_bgcolor": CLEAR, "plot_bgcolor": CLEAR, "xaxis": axis, "yaxis": axis},
        margin={"l": 48, "r": 16, "t": 28, "b": 44},
        font={"family": "system-ui, sans-serif", "size": 12, "color": INK},
        hoverlabel={"align": "left", "bgcolor": PAPER, "bordercolor": MUTED, "font": {"color": INK}},
        legend={"orientation": "h", "x": 0, "y": 1.04, "yanchor": "bottom"},
        modebar={"bgcolor": CLEAR, "color": MUTED, "activecolor": INK},
    ).update_layout(layout)


def line(x: Sequence[object], y: Sequence[object], colour: str, width: float, **more: object) -> go.Scatter:
    """A line without hover, `width` pixels wide; ``more`` are the trace's other settings, and `dash`."""
    more = {"mode": "lines", "hoverinfo": "skip", **more}
    return go.Scatter(x=x, y=y, line={"color": colour, "width": width, "dash": more.pop("dash", "solid")}, **more)
