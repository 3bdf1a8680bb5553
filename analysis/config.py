"""The part of the config that says how the persona space is computed. All of it is execution: refit at will."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt

from personaspace.analysis.quality.flaws import FlawName


@dataclass(frozen=True, kw_only=True, slots=True)
class AnalysisConfig:
    """What is fitted, and how it is put to the test."""

    array: str = "resid_post_mean"
    """Array of the run that the space is computed from: site and reduction, such as `resid_post_last_prompt`."""
    target_layer: Annotated[int, Ge(0)] | None = None
    """Layer that the report opens with, 0-based. Default: the middle of the model, as in the paper."""
    components: Annotated[int, Ge(3)] = 10
    """Principal components kept per layer."""
    standardise: bool = False
    """Divide each dimension by its standard deviation over the roles before the PCA of the role vectors."""
    permutations: Annotated[int, Ge(20)] = 500
    """Draws of the nulls, which permute the roles within each question."""
    bootstrap: Annotated[int, Ge(20)] = 200
    """Draws of the intervals, which draw roles, or questions, anew."""
    seed: int = 0
    """Seed of all draws."""
    positive_kind: str = "professional"
    """Kind of roles that should lie nearer to the Assistant, for the ROC AUC."""
    negative_kind: str = "fantastical"
    """Kind of roles that should lie farther away."""
    scores: str | None = None
    """Judge whose scores decide which rollouts count for their role. Default: the only one, if there is one."""
    unfiltered: bool = False
    """Take every rollout for its role, whatever its score."""
    min_count: Annotated[int, Ge(1)] | None = None
    """Rollouts that a role vector needs. Default: 50 of 1,200 as in the reference project, fewer in smaller runs."""
    precision: Literal["float32", "float64"] = "float32"
    """Of the products behind the PCA over all rollouts. float64 takes twice the time (docs/pca.md)."""
    memory: Annotated[float, Gt(0)] | None = None
    """GB (1e9 bytes) for all layers in flight together. Default: half of what is free."""
    leave_out: tuple[FlawName, ...] = ()
    """Rollouts that the fit leaves out, by flaw, such as `[refused, looping]` (`personaspace quality RUN` lists them).
    Default: none, whatever their flaws."""
