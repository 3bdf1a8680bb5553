"""The page of a comparison: `render_comparison` is pure, and the page as harmless as the report (see ``page``)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from personaspace.analysis.compare.comparison import MEASURES, Measure, Pair
from personaspace.analysis.compare.figures import cka_map, curve, scatter
from personaspace.analysis.compare.movers import movers
from personaspace.analysis.compare.pairing import Fitted
from personaspace.analysis.pages import charts
from personaspace.analysis.pages.page import render_page
from personaspace.analysis.report.render import Sample

MARK = '<meta name="generator" content="personaspace compare">'
"""In the head of every such page, and of no other."""
MOVERS_SHOWN = 10
FEW_ROLES = 20
"""With fewer, the page warns that likeness is cheap."""
SAID = 700
"""Characters of a response that the page keeps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A run as the page shows it."""

    run: Fitted
    samples: Mapping[str, Sample]
    """Role, or `default` -> one response."""
    provenance: Sequence[tuple[str, str]]
    """Labels and values."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Beside:
    """A pair as the page shows it."""

    pair: Pair
    differences: Sequence[tuple[str, str, str]]
    """(setting, in the first run, in the second)."""
    basis: str
    """`same`, `different` or `unknown`: the weight files of the two models."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One measure at the layers that are looked at, in words."""

    measure: Measure
    value: str
    """Or a dash where it can't be computed."""
    null: str
    """What it has to beat."""
    verdict: str
    mark: str
    """✓ beyond chance and kinds, ~ beyond chance alone, ✗ not beyond chance; empty if that can't be said."""


def render_comparison(sources: Sequence[Source], pairs: Sequence[Beside]) -> str:
    """The whole page. ``sources`` are all runs in order, ``pairs`` every two of them."""
    kinds = sorted({str(kind) for source in sources for kind in source.run.space["role_kind"].values})
    names = [source.run.name for source in sources]
    title = " and ".join(names) if len(names) == 2 else f"{len(names)} runs: {', '.join(names)}"
    return render_page(
        "compare/comparison.html.j2",
        title=f"{title}, compared",
        mark=MARK,
        sources=sources,
        pairs=[_pair(beside) for beside in pairs],
        measures=MEASURES,
        readings=READINGS,
        matrices=_matrices(names, [beside.pair for beside in pairs]) if len(names) > 2 else [],
        kinds=charts.legend(kinds),
        data={
            "dark": charts.DARK,
            "pairs": [_page_data(beside.pair, names, kinds) for beside in pairs],
            "names": names,
            "samples": [{role: _said(sample) for role, sample in source.samples.items()} for source in sources],
        },
    )


def findings(pair: Pair) -> list[Finding]:
    """Every measure of a pair at the layers that are looked at, with its verdict."""
    return [_finding(pair, measure) for measure in MEASURES]


def _finding(pair: Pair, measure: Measure) -> Finding:
    value, chance, kind = pair.value(measure.name), *(pair.chance(measure.name, null) for null in ("any", "kind"))
    if not np.isfinite(value):
        reason = "the widths differ" if measure.name not in pair.data else "one side does not vary"
        return Finding(measure=measure, value="–", null="", verdict=f"not available: {reason}", mark="")  # noqa: RUF001
    if measure.name == "axis_cosine":
        null = f"two random directions reach {chance:.2f}"
    else:
        null = f"relabelled roles reach {chance:.2f}"
        null += f", within their kinds {kind:.2f}" if np.isfinite(kind) else ""
    if not value > chance:
        mark, verdict = "✗", "not above chance: at this size no likeness is shown"
    elif measure.name == "axis_cosine" or not np.isfinite(kind):
        mark, verdict = "✓", "above chance"
    elif value > kind:
        mark, verdict = "✓", "above chance, and beyond what the kinds of roles explain"
    else:
        mark, verdict = "~", "above chance, but at this size not beyond what the kinds of roles explain"
    return Finding(measure=measure, value=f"{value:.2f}", null=null, verdict=verdict, mark=mark)


READINGS = {
    "pc1_correlation": "How well the roles' scores on PC1, the direction in which they differ most, agree in the two"
    " runs. PC1 points to the Assistant in both. The paper finds above 0.92 between its three models, with 275 roles.",
    "position_correlation": "How well the roles' positions on each run's own axis agree (Pearson).",
    "rank_correlation": "The same for their order alone (Spearman), which one far-off role can't make.",
    "procrustes": "1 less the disparity that is left after the leading components of one run are shifted, scaled,"
    " turned and mirrored onto those of the other: the share of the roles' arrangement that is the same.",
    "cka": "Likeness of the distances between the roles in the whole width of the residual stream. With few roles in"
    " many dimensions it is high for anything: only what lies above the grey band counts.",
    "role_cosine": "Median cosine of a role's offset from the mean role in one run with the same role's in the other."
    " Above its null, directions mean the same in both residual streams.",
    "axis_cosine": "Cosine of the two Assistant Axes, default less mean role. Random directions are an easy bar, so"
    " look at its size, and at whether the roles' offsets agree, too.",
}


def _pair(beside: Beside) -> dict[str, object]:
    """What the template needs of a pair."""
    pair = beside.pair
    moved = movers(pair)
    at = pair.data.isel(place=pair.at)
    matched = [
        {
            "a": component + 1,
            "b": int(at["component_match"][component]) + 1,
            "correlation": float(at["component_correlation"][component]),
            "null": float(at["component_correlation_p99"].sel(null="any")[component]),
        }
        for component in range(pair.data.sizes["component"])
    ]
    return {
        "pair": pair,
        "differences": beside.differences,
        "basis": _basis(beside),
        "findings": findings(pair),
        "movers": moved[:MOVERS_SHOWN],
        "moved": sum(mover.stands_out for mover in moved),
        "few": len(moved) < FEW_ROLES,
        "matched": matched,
        "other_target": pair.layers[1] != pair.b.target,
        "unequal": pair.a.depth != pair.b.depth,
        "alone": [run.space.sizes["role"] - len(moved) for run in (pair.a, pair.b)],
    }


def _basis(beside: Beside) -> str:
    a, b = beside.pair.a, beside.pair.b
    widths = [run.space.sizes["hidden"] for run in (a, b)]
    if widths[0] != widths[1]:
        return (
            f"Their residual streams have {widths[0]:,} and {widths[1]:,} dimensions, so directions can't be compared; "
            "what is compared is how the roles lie to each other."
        )
    if beside.basis == "same":
        return "Both read the same weight files, so a direction means the same in both, and cosines can be compared."
    said = (
        "The weight files differ." if beside.basis == "different" else "The runs don't record which weights they read."
    )
    return (
        f"{said} Cosines between the two mean something only if one model was trained from the other, as instruct from "
        "base: models that were trained apart share no basis, whatever their width. The cosine of the roles' offsets, "
        "with its null, tells whether they do."
    )


def _matrices(names: Sequence[str], pairs: Sequence[Pair]) -> list[tuple[Measure, list[list[float | None]]]]:
    """For each measure: run against run, None on the diagonal and where it was not computed."""
    found = []
    for measure in MEASURES:
        cells: list[list[float | None]] = [[None] * len(names) for _ in names]
        for pair in pairs:
            row, column = names.index(pair.a.name), names.index(pair.b.name)
            value = pair.value(measure.name)
            cells[row][column] = cells[column][row] = value if np.isfinite(value) else None
        found.append((measure, cells))
    return found


def _page_data(pair: Pair, names: Sequence[str], kinds: Sequence[str]) -> dict[str, object]:
    drawn = {"scatter": scatter(pair, kinds), "cka_map": cka_map(pair)}
    drawn |= {measure.name: figure for measure in MEASURES if (figure := curve(pair, measure)) is not None}
    position = pair.data["position"].transpose("run", "place", "role").values
    return {
        "figures": {name: figure.to_plotly_json() for name, figure in drawn.items()},
        "runs": [names.index(run.name) for run in (pair.a, pair.b)],
        "layers": [pair.data[key].values.tolist() for key in ("layer_a", "layer_b")],
        "at": pair.at,
        "roles": [
            {"name": str(role), "label": charts.label(str(role)), "kind": str(kind)}
            for role, kind in zip(pair.data["role"].values, pair.data["role_kind"].values, strict=True)
        ],
        "position": [[charts.plain(x_R) for x_R in of_run] for of_run in position],
        "error": [
            [charts.plain(x_R, 2) for x_R in of_run]
            for of_run in pair.data["position_error"].transpose("run", "place", "role").values
        ],
    }


def _said(sample: Sample) -> dict[str, str]:
    return {
        "system": charts.clip(sample.system_prompt, 400),
        "question": charts.clip(sample.question),
        "response": charts.clip(sample.response, SAID),
    }
