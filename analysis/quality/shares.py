"""Shares of flawed rollouts, how sure they are, and which groups stand out.

Shape suffixes: N rollouts, G groups.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

STAND_OUT = 0.01
"""Chance that any group is named although all groups are alike."""
_Z = 1.959964
"""95%."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """Of some rollouts, how many have a flaw."""

    count: int
    """With the flaw."""
    total: int
    """All of them."""

    @property
    def share(self) -> float:
        """0 to 1; 0 of nothing is 0."""
        return self.count / self.total if self.total else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval of the share."""
        low, high = wilson(np.array([self.count]), np.array([self.total]))
        return float(low[0]), float(high[0])


def wilson(count_G: NDArray[np.int64], total_G: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Wilson's 95% score interval of each ``count / total``; (0, 1) of nothing.

    Source: Wilson, JASA 22 (1927). It takes the rollouts for independent, which those of one role are not quite.
    """
    n_G = np.maximum(total_G, 1)
    share_G = count_G / n_G
    middle_G = (share_G + _Z**2 / (2 * n_G)) / (1 + _Z**2 / n_G)
    half_G = _Z / (1 + _Z**2 / n_G) * np.sqrt(share_G * (1 - share_G) / n_G + _Z**2 / (4 * n_G**2))
    low_G = np.where(total_G > 0, np.maximum(middle_G - half_G, 0), 0.0)
    high_G = np.where(total_G > 0, np.minimum(middle_G + half_G, 1), 1.0)
    # Rounding must not leave the share itself outside.
    return np.minimum(low_G, share_G), np.where(total_G > 0, np.maximum(high_G, share_G), 1.0)


def stand_out(count_G: NDArray[np.int64], total_G: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Groups that have the flaw more often than chance lets any group have it, at the rate of all other groups.

    One-sided binomial test of each group against the rest, at `STAND_OUT` divided by the number of groups (Bonferroni).
    The rest counts half a flawed rollout more than it has, so that a single one does not stand out against none.
    """
    rest_G = (count_G.sum() - count_G + 0.5) / np.maximum(total_G.sum() - total_G + 1, 1)
    chance_G = binom.sf(count_G - 1, total_G, np.minimum(rest_G, 1.0))
    found: NDArray[np.bool_] = (chance_G < STAND_OUT / max(len(count_G), 1)) & (count_G > 1) & (len(count_G) > 1)
    return found
