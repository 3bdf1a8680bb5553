"""Roles that lie elsewhere on the axis in one run than in another."""

from dataclasses import dataclass

import numpy as np
from scipy.stats import norm, rankdata

from personaspace.analysis.compare.comparison import Pair

DOUBT = 0.05
"""Chance that any role at all stands out where none has moved."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mover:
    """A role in both runs, at the place that is looked at."""

    role: str
    kind: str
    a: float
    """Position in the first run: 0 is its mean role, 1 its default."""
    b: float
    """Position in the second run, on its own axis."""
    difference: float
    """Second less first."""
    error: float
    """Standard error of the difference, from the spread of the rollouts; NaN where a run has fewer than two."""
    rank_a: int
    """1 is the common role that is nearest to the Assistant."""
    rank_b: int
    stands_out: bool
    """Whether it differs from the median difference by more than the rollouts' spread, at 5% for all roles together
    (Bonferroni). The median is what moves where one far-off role shifts the mean role, and so everyone's 0."""


def movers(pair: Pair) -> list[Mover]:
    """All common roles, the largest difference first.

    The error takes rollouts for independent, while those of a role share its prompts; and the scale of each run, from
    its mean role to its default, is taken for granted. So it is a lower bound of the doubt.
    """
    at = pair.data.isel(place=pair.at)
    a_R, b_R = at["position"].transpose("run", "role").values
    error_R = np.sqrt((at["position_error"].values ** 2).sum(axis=0))
    difference_R = b_R - a_R
    own_R = np.abs(difference_R - np.median(difference_R))
    beyond = norm.isf(DOUBT / 2 / len(a_R))
    ranks = [rankdata(-position_R, method="ordinal") for position_R in (a_R, b_R)]
    found = [
        Mover(
            role=str(at["role"].values[row]),
            kind=str(at["role_kind"].values[row]),
            a=float(a_R[row]),
            b=float(b_R[row]),
            difference=float(difference_R[row]),
            error=float(error_R[row]),
            rank_a=int(ranks[0][row]),
            rank_b=int(ranks[1][row]),
            stands_out=bool(own_R[row] > beyond * error_R[row]),
        )
        for row in range(len(a_R))
    ]
    return sorted(found, key=lambda mover: -abs(mover.difference))
