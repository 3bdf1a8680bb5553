"""What is measured of every layer, what it has to beat, and what a number says, in words for the report."""

from dataclasses import dataclass

import numpy as np
import xarray as xr


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """One line of evidence: a number per layer, with what it has to beat."""

    name: str
    """Variable of the dataset."""
    label: str
    """What the report calls it."""
    null: str | None = None
    """Variable with the null's 99th percentile per layer; None where chance itself is the bar."""
    chance: float
    """Its value when there is nothing to find."""
    random: str | None = None
    """Variable with the 99th percentile of random directions, or None."""


MEASURES = (
    Measure(name="kind_auc", label="Held-out AUC", null="kind_auc_null_p99", chance=0.5),
    Measure(name="rank_correlation", label="Split-half rank correlation", null="rank_correlation_null_p99", chance=0),
    Measure(name="cos_axis_pc1", label="|cos(axis, PC1)|", null="cos_null_p99", random="cos_random_p99", chance=0),
    Measure(name="default_auc", label="Default against roles, AUC", chance=0.5),
    Measure(name="length_correlation", label="Correlation with length", chance=0),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One measure at the target layer, in words."""

    measure: Measure
    """What was measured."""
    value: str
    """Its value at the target layer, or "not available"."""
    null: str
    """What it has to beat."""
    verdict: str
    """What that means, in plain words."""
    above: bool | None
    """Whether it beats its null; None if that can't be said."""
    reading: str
    """How to read its chart."""


def describe(space: xr.Dataset, measure: Measure, target: int) -> Finding:
    """The measure at the target layer, beside what it has to beat, in words."""
    at = space["layer"].values.tolist().index(target)
    value_L = space[measure.name].values.astype(np.float64)
    value, reading = float(value_L[at]), _reading(space, measure)
    if not np.isfinite(value):
        reason = f"not available: {_missing(space, measure)}"
        return Finding(measure=measure, value="-", null="", verdict=reason, above=None, reading=reading)
    found = f"{value:.2f}"
    interval = _interval(space, measure, at)
    if measure.null is None:
        above, verdict = _against_chance(space, measure, value, at)
        return Finding(measure=measure, value=found, null=interval, verdict=verdict, above=above, reading=reading)
    null_L = space[measure.null].values
    null, shuffles = float(null_L[at]), int(space.attrs["null_permutations"])
    if not np.isfinite(null):
        verdict = "no null was computed, so this number alone is not evidence"
        return Finding(measure=measure, value=found, null=interval, verdict=verdict, above=None, reading=reading)
    described = f"null {null:.2f} (99th percentile of {shuffles} permutations)"
    if measure.random is not None:
        described += f", random directions {float(space[measure.random].values[at]):.2f}"
    if interval:
        described += f"; {interval}"
    passed, known = int((value_L > null_L).sum()), int(np.isfinite(value_L).sum())
    reading += f" It is above its null at {passed} of {known} layers."
    above = value > null
    verdict = "above the null" if above else f"not above the null: {_doubt(space, measure)}"
    return Finding(measure=measure, value=found, null=described, verdict=verdict, above=above, reading=reading)


def _interval(space: xr.Dataset, measure: Measure, at: int) -> str:
    """Both 95% intervals at a layer, for people; empty where there is none."""
    if f"{measure.name}_interval" not in space:
        return ""
    ends = space[f"{measure.name}_interval"].isel(layer=at)
    texts = []
    for resampled in ("questions", "roles"):
        low, high = ends.sel(resampled=resampled).values.tolist()
        if np.isfinite([low, high]).all():
            texts.append(f"{low:.2f} to {high:.2f} over {resampled}")
    return f"95% interval {', '.join(texts)}" if texts else ""


def _against_chance(space: xr.Dataset, measure: Measure, value: float, at: int) -> tuple[bool | None, str]:
    if measure.name == "length_correlation":
        within = float(space["length_correlation_within"].values[at])
        return None, f"{_direction(value)}; within roles {within:.2f}"
    low = float(space[f"{measure.name}_interval"].isel(layer=at).sel(resampled="questions", bound="low"))
    if low > measure.chance:
        return True, "the interval is above a coin toss"
    return False, "the interval holds a coin toss: default is not shown to differ from the roles"


def _direction(correlation: float) -> str:
    if abs(correlation) < 0.1:
        return "the axis hardly goes with length"
    return f"longer responses lie {'nearer to' if correlation > 0 else 'farther from'} the Assistant"


def _missing(space: xr.Dataset, measure: Measure) -> str:
    kinds = {str(kind) for kind in space["role_kind"].values}
    absent = [kind for key in ("positive_kind", "negative_kind") if (kind := str(space.attrs[key])) not in kinds]
    if measure.name == "kind_auc" and absent:
        return f"the catalogue has no roles of the kind {' or '.join(absent)}"
    if measure.name == "cos_axis_pc1":
        return "there are too few roles for a principal component"
    if measure.name == "default_auc":
        return "it takes at least two questions that default and the roles answered"
    if measure.name == "length_correlation":
        return "all responses have the same length"
    return "it takes at least four questions that default and the roles answered, two for each half"


def _doubt(space: xr.Dataset, measure: Measure) -> str:
    kinds = f"{space.attrs['positive_kind']} from {space.attrs['negative_kind']} roles"
    return {
        "kind_auc": f"at this size the axis is not shown to tell {kinds} on questions it has not seen",
        "rank_correlation": "at this size the order of the roles is not shown to outlast a change of questions",
        "cos_axis_pc1": "at this size the direction of PC1 is not evidence",
    }[measure.name]


def _reading(space: xr.Dataset, measure: Measure) -> str:
    positive, negative = space.attrs["positive_kind"], space.attrs["negative_kind"]
    return {
        "kind_auc": "The axis is fitted on half of the questions and the roles are placed by the other half, both ways"
        f" round. The AUC is the chance that a {positive} role then lies nearer to the Assistant than a {negative}"
        " one: 0.5 is a coin toss, 1 a perfect split.",
        "rank_correlation": "How well the order of the roles along the axis from one half of the questions agrees with"
        " the order from the other half (Spearman). Where it is high, the order belongs to the roles and not to the"
        " questions they were asked. It does not say what the order means: a role keeps its system prompts in both"
        " halves, and even a model with random weights can order prompts reproducibly.",
        "cos_axis_pc1": "Whether the direction in which the roles differ most (PC1, default left out) is the direction"
        f" to the Assistant. The mean over the {space.attrs['default_count']} default rollouts carries noise into the"
        " axis, so only the grey band is a fair bar; random directions are far easier to beat.",
        "default_auc": "The chance that a default rollout lies nearer to the Assistant than a role's rollout on"
        " questions that the axis has not seen (cross-validation by question, five folds). Any persona that differs"
        " from the rest would be told apart like this: a high number says that default is a persona of its own, no"
        " more.",
        "length_correlation": "Spearman correlation of a rollout's position with the number of its tokens. Where it is"
        " large, the axis may be one of short against long answers; within roles it asks the same once each role's own"
        " habit is taken out.",
    }[measure.name]
