"""What the report says of the responses' quality: prepared here, laid out in section.html.j2."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from personaspace.analysis.quality.assess import Quality
from personaspace.analysis.quality.flaws import FLAWS
from personaspace.analysis.quality.words import interval, outstanding, percent, summary

ROLES_SHOWN = 20
"""Roles in the table, worst first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QualitySection:
    """The section on quality, ready to be laid out."""

    rollouts: int
    """Responses that were looked at."""
    lines: tuple[str, ...]
    """What was found in all of them."""
    standing_out: tuple[str, ...]
    """Which roles have more of it than the others."""
    left_out: str
    """What the fit did about it."""
    headings: tuple[str, ...]
    """Of the table's columns."""
    rows: tuple[tuple[str, ...], ...]
    """One for each role: its cells."""
    more: int
    """Roles that are not in the table."""


def quality_section(quality: Quality, space: Mapping[str, Any]) -> QualitySection:
    """The section for what was found, and a fit with these attributes."""
    groups = quality.groups("role")
    shown = [flaw for flaw in FLAWS if any(group.shares[flaw.name].count for group in groups)]
    rows = []
    for group in groups[:ROLES_SHOWN]:
        flawed = group.shares["flawed"]
        cells = [f"{percent(group.shares[flaw.name].share)}" for flaw in shown]
        rows.append((group.name, f"{flawed.total:,}", f"{percent(flawed.share)} ({interval(flawed)})", *cells))
    count, names = int(space.get("left_out_count", 0)), space.get("leave_out", "")
    return QualitySection(
        rollouts=len(quality.row_N),
        lines=tuple(summary(quality)),
        standing_out=tuple(outstanding(groups)),
        left_out=f"The fit leaves out {count:,} of them ({names})." if names else "The fit leaves out none of them.",
        headings=("Role", "Rollouts", "Flawed", *(flaw.heading.capitalize() for flaw in shown)),
        rows=tuple(rows),
        more=max(0, len(groups) - ROLES_SHOWN),
    )
