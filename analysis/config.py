"""The part of the config that says how the persona space is computed. All of it is execution: refit at will."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

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
    permutations: Annotated[int, Ge(20)] = 500
    """Draws of the nulls, which permute the roles within each question."""
    seed: int = 0
    """Seed of those draws."""
    positive_kind: str = "professional"
    """Kind of roles that should lie nearer to the Assistant, for the ROC AUC."""
    negative_kind: str = "fantastical"
    """Kind of roles that should lie farther away."""
    leave_out: tuple[FlawName, ...] = ()
    """Rollouts that the fit leaves out, by flaw, such as `[refused, looping]` (`personaspace quality RUN` lists them).
    Default: none, whatever their flaws."""
