"""What was found, in words: for the terminal, for the log of a run, and for the report."""

from collections.abc import Sequence

from personaspace.analysis.quality.assess import Group, Quality
from personaspace.analysis.quality.flaws import FLAWS, Flaw
from personaspace.analysis.quality.shares import Share

NAMED = 6
"""Groups that are named one by one; the rest is counted."""


def percent(share: float) -> str:
    """A share as people write it, without making a few into none or all but a few into all."""
    if 0 < share < 0.01:
        return "<1%"
    return ">99%" if 0.99 < share < 1 else f"{share:.0%}"


def interval(share: Share) -> str:
    """The 95% interval of a share: `5-23%`."""
    low, high = share.interval
    return f"{100 * low:.0f}-{100 * high:.0f}%"


def warnings(quality: Quality) -> list[str]:
    """A line for each flaw that a run has too often, with the setting to change, and one that names the worst roles."""
    overall = quality.overall()
    # Where the true share might still be below the bound, there is nothing to warn of.
    lines = [
        f"warning: {_told(quality, flaw, overall[flaw.name])}; {flaw.advice}"
        for flaw in FLAWS
        if overall[flaw.name].interval[0] >= flaw.warn
    ]
    found = outstanding(quality.groups("role"))
    return [*lines, f"warning: some roles more than others: {'; '.join(found)}"] if found else lines


def summary(quality: Quality) -> list[str]:
    """A line for each flaw that occurs, and one that names those that don't."""
    overall = quality.overall()
    there = [flaw for flaw in FLAWS if overall[flaw.name].count]
    lines = [
        f"{percent(overall[flaw.name].share):>5} ({interval(overall[flaw.name])}) "
        f"{_ending(quality, flaw)}: {overall[flaw.name].count:,}"
        for flaw in there
    ]
    absent = [flaw.heading for flaw in FLAWS if flaw not in there]
    return [*lines, f"none: {', '.join(absent)}"] if absent else lines


def outstanding(groups: Sequence[Group]) -> list[str]:
    """For each flaw the groups that have it more often than the others, beyond chance."""
    lines = []
    for flaw in FLAWS:
        found = [group for group in groups if flaw.name in group.stands_out]
        found.sort(key=lambda group: -group.shares[flaw.name].share)
        named = ", ".join(f"{group.name} {percent(group.shares[flaw.name].share)}" for group in found[:NAMED])
        if found:
            more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
            lines.append(f"{flaw.heading}: {named}{more}")
    return lines


def _told(quality: Quality, flaw: Flaw, share: Share) -> str:
    return f"{percent(share.share)} of {share.total:,} responses {_ending(quality, flaw)}"


def _ending(quality: Quality, flaw: Flaw) -> str:
    limit = quality.manifest.identity.get("generate", {}).get("max_new_tokens")
    told = flaw.told.replace(" at {max_new_tokens} tokens", "") if limit is None else flaw.told
    return told.format(max_new_tokens=limit)
