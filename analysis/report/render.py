"""The report: one HTML page, with everything it needs inside, that shows a persona space and how far to trust it.

`render_report` is pure: the same dataset and texts give the same bytes, and nothing but the page's template is read.
All text from models and catalogues is escaped, and a content security policy with the hashes of the page's own two
scripts keeps the browser from running or fetching anything else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from personaspace.analysis.caps.section import CapSection
from personaspace.analysis.pages import charts
from personaspace.analysis.pages.page import render_page
from personaspace.analysis.quality.section import QualitySection
from personaspace.analysis.report import figures, layer_figures
from personaspace.analysis.report.measures import MEASURES, describe

DROPPED_SHOWN = 200
"""Dropped rollouts listed one by one; the rest is counted."""
MAP_VIEWS = {"PC1 / PC2": (0, 1), "PC1 / PC3": (0, 2), "3-D": (0, 1, 2)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One response to show for a role."""

    system_prompt: str
    """The prompt that put the model into the role; may be empty for `default`."""
    question: str
    """The user's question."""
    response: str
    """The model's answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DroppedRollout:
    """A rollout that is not in the space, and why."""

    rollout_id: str
    """Its permanent id."""
    role: str
    """The role it was planned for."""
    question: str
    """The question it was planned for."""
    reason: str
    """Why it was dropped, in words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completeness:
    """How much of the plan the space rests on."""

    rows_planned: int
    """Rollouts in the plan."""
    rows_ok: int
    """Rollouts with committed activations."""
    rows_dropped: int
    """Rollouts given up, each with a recorded reason."""
    rows_pending: int
    """Rollouts not done yet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRow:
    """One row of the table of responses."""

    role: str
    """The role, or `default`."""
    kind: str
    """Its kind, or empty."""
    position: float
    """Its position on the axis at the target layer."""
    sample: Sample | None
    """What it answered, if a response was kept."""


def render_report(
    space: xr.Dataset,
    *,
    title: str,
    samples: Mapping[str, Sample],
    provenance: Sequence[tuple[str, str]],
    dropped: Sequence[DroppedRollout],
    completeness: Completeness,
    quality: QualitySection | None = None,
    caps: CapSection | None = None,
) -> str:
    """Render the whole page.

    `samples` maps a role, or `default`, to a response to show. `provenance` is a list of labels and values; a row
    labelled "Model" also goes to the head of the page. Without `quality` or `caps` the page says nothing of it.
    """
    target = int(space.attrs["target_layer"])
    figures.layer_index(space, target)
    return render_page(
        "report/report.html.j2",
        title=title,
        quality=quality,
        caps=caps,
        target=target,
        space=space,
        model=next((value for label, value in provenance if label.lower() == "model"), None),
        findings=[describe(space, measure, target) for measure in MEASURES],
        data=_page_data(space, samples, target, caps),
        views=_views(space),
        kinds=charts.legend([str(kind) for kind in space["role_kind"].values]),
        needed=_needed(space, target),
        strips=space.sizes["rollout"] <= figures.STRIP_LIMIT,
        sample_groups=_sample_groups(space, samples, target),
        provenance=provenance,
        dropped=dropped[:DROPPED_SHOWN],
        dropped_more=max(0, len(dropped) - DROPPED_SHOWN),
        completeness=completeness,
    )


def _views(space: xr.Dataset) -> dict[str, tuple[int, ...]]:
    return {name: view for name, view in MAP_VIEWS.items() if max(view) < max(2, space.sizes["component"])}


def _page_data(
    space: xr.Dataset, samples: Mapping[str, Sample], target: int, caps: CapSection | None
) -> dict[str, object]:
    responses = {role: sample.response for role, sample in samples.items()}
    drawn = {measure.name: layer_figures.evidence(space, measure) for measure in MEASURES}
    drawn |= {"ranking": figures.ranking(space, target), "scree": layer_figures.scree(space, target)}
    drawn |= {"cumulative": layer_figures.cumulative_variance(space), "overview": layer_figures.overview(space)}
    if caps is not None:
        drawn["caps"] = caps.figure
    if "trait" in space.dims:
        drawn["traits"] = figures.trait_ranking(space, target)
    for name, view in _views(space).items():
        drawn[name] = figures.persona_map(space, target, components=view, responses=responses)
    layers = [int(layer) for layer in space["layer"].values]
    rows, single = figures.rollout_rows(space), space.sizes["rollout"] <= figures.STRIP_LIMIT
    single_NL = space["rollout_position"].transpose("rollout", "layer").values[rows >= 0] if single else None
    return {
        "figures": {name: figure.to_plotly_json() for name, figure in drawn.items() if figure is not None},
        "dark": charts.DARK,
        "views": _views(space),
        "first_view": next(iter(_views(space))),
        "layers": layers,
        "target": layers.index(target),
        "roles": [_role(space, row, samples) for row in range(space.sizes["role"])] + [_default(space, samples)],
        "titles": [[figures.component_title(space, layer, c) for c in range(3)] for layer in layers],
        "score": [[charts.plain(score_R) for score_R in score_CR] for score_CR in figures.map_scores(space)],
        "position": [charts.plain(position_R) for position_R in figures.positions(space)],
        "reach": [[charts.plain(reach_R, 3) for reach_R in reach_BR] for reach_BR in figures.reach(space)],
        "traits": _traits(space),
        "rollout_role": rows[rows >= 0].tolist() if single else None,
        "rollout": None if single_NL is None else [charts.plain(x_N, 3) for x_N in single_NL.T],
        "quantiles": None if single else [
            [charts.plain(q_R, 3) for q_R in q_RQ.T] for q_RQ in figures.rollout_quantiles(space)
        ],
    }  # fmt: skip


def _needed(space: xr.Dataset, target: int) -> list[tuple[float, int]]:
    """Shares of the variance, and how many components hold them at the target layer."""
    needed = space["components_needed"].sel(layer=target)
    return [(float(share), int(count)) for share, count in zip(space["variance"].values, needed.values, strict=True)]


def _traits(space: xr.Dataset) -> dict[str, object] | None:
    """Names of the traits, and their cosines with the axis by layer."""
    if "trait" not in space.dims:
        return None
    cosine_LT = space["trait_axis_cosine"].transpose("layer", "trait").values
    return {
        "names": [charts.label(str(trait)) for trait in space["trait"].values],
        "cosine": [charts.plain(cosine_T, 3) for cosine_T in cosine_LT],
    }


def _default(space: xr.Dataset, samples: Mapping[str, Sample]) -> dict[str, str]:
    kind = f"{space.attrs['default_count']} rollouts"
    about = "The model's own self, without a role."
    names = {"name": "default", "label": "<b>default</b>", "short": "<b>default</b>"}
    return names | {"kind": kind, "about": about} | _said(samples.get("default"))


def _role(space: xr.Dataset, row: int, samples: Mapping[str, Sample]) -> dict[str, str]:
    name, kind, about = (str(space[key].values[row]) for key in ("role", "role_kind", "role_description"))
    kind = f"{kind}, {int(space['role_count'].values[row])} rollouts"
    names = {"name": name, "label": charts.label(name), "short": charts.label(name, 16)}
    return names | {"kind": kind, "about": charts.clip(about, 400)} | _said(samples.get(name))


def _said(sample: Sample | None) -> dict[str, str]:
    if sample is None:
        return {"question": "", "response": "No response of this role was kept for the report."}
    return {"question": charts.clip(sample.question), "response": charts.clip(sample.response, 600)}


def _sample_groups(space: xr.Dataset, samples: Mapping[str, Sample], target: int) -> list[tuple[str, list[SampleRow]]]:
    position_R = space["role_position"].sel(layer=target).values.astype(np.float64)
    order = np.argsort(-position_R, kind="stable").tolist()
    middle = max(3, len(order) // 2 - 1)
    chosen = {
        "Most like the Assistant": order[:3],
        "In the middle": order[middle : middle + 2] if len(order) >= 8 else order[3:-3],
        "Least like the Assistant": order[max(3, len(order) - 3) :],
    }
    default = SampleRow(role="default", kind="", position=1.0, sample=samples.get("default"))
    groups = [("The Assistant itself", [default])]
    for name, rows in chosen.items():
        found = [
            SampleRow(
                role=(role := str(space["role"].values[row])),
                kind=str(space["role_kind"].values[row]),
                position=float(position_R[row]),
                sample=samples.get(role),
            )
            for row in rows
        ]
        if found:
            groups.append((name, found))
    return groups
