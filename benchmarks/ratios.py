"""Ratios of what was measured side by side."""

import statistics
from collections.abc import Sequence

from scipy.stats import quantile_test


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Median of the pairs' ratios, with its 95% interval (by order statistics)."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    interval = quantile_test(ratios, p=0.5).confidence_interval(0.95)
    low, high = (
        found if found == found else edge for found, edge in zip(interval, (min(ratios), max(ratios)), strict=True)
    )
    return {"median": statistics.median(ratios), "low": float(low), "high": float(high), "pairs": len(ratios)}


def show(name: str, found: dict[str, float]) -> None:
    print(
        f"{name}: median {found['median']:.3f}, 95% {found['low']:.3f} to {found['high']:.3f}, {found['pairs']} pairs"
    )
