"""The state of a run for people who watch it from elsewhere: what is committed, and what its drivers said."""

import time
from collections import Counter
from collections.abc import Sequence

from personaspace.store.catalog import RunSummary
from personaspace.store.objects import Folder
from personaspace.store.sessions import (
    SESSIONS,
    SessionProgress,
    StepProgress,
    human_duration,
    read_session,
    session_epochs,
)

SHOWN = 5
"""Quarantined rollouts that are named."""


def read_sessions(folder: Folder) -> list[SessionProgress]:
    """What the drivers of a run said, in order; sessions whose word is missing or damaged are left out."""
    epochs = session_epochs(entry.key for entry in folder.list(SESSIONS))
    return [session for epoch in epochs if (session := read_session(folder, epoch)) is not None]


def describe_progress(summary: RunSummary, sessions: Sequence[SessionProgress]) -> str:
    """Lines on how the last session goes, and on what all of them lost; empty where no driver said anything."""
    if not sessions:
        return ""
    last = sessions[-1]
    lines = [f"{'session':10s} {_session(summary, last)}"]
    lines += [f"{step.step:10s} {_step(step)}" for step in last.steps]
    lost: Counter[str] = Counter()
    quarantined: dict[str, str] = {}
    for session in sessions:
        for step in session.steps:
            lost.update(step.lost)
            quarantined |= step.quarantined
    if lost:
        repeated = sum(step.repeated for session in sessions for step in session.steps)
        reasons = ", ".join(f"{count} x {reason}" for reason, count in lost.most_common())
        lines.append(f"{'lost':10s} {lost.total()} replica(s): {reasons}; {repeated} rollout(s) run again")
    if quarantined:
        shown = ", ".join(list(quarantined)[:SHOWN]) + (", ..." if len(quarantined) > SHOWN else "")
        lines.append(f"{'quarantine':10s} {len(quarantined)} rollout(s): {shown}")
    return "\n".join(lines)


def _session(summary: RunSummary, session: SessionProgress) -> str:
    ago = f"{human_duration(time.time() - session.written)} ago"
    number = f"{session.epoch}"
    if session.outcome == "failed":
        return f"{number} failed {ago}: {session.message}"
    if session.outcome != "running":
        return f"{number} {'was interrupted' if session.outcome == 'interrupted' else 'is done'}, {ago}"
    holder = summary.holder
    if holder is None or holder.epoch != session.epoch or holder.has_ended():
        return f"{number} ended without a word: its driver died. It was last heard of {ago}"
    return f"{number} is under way; its driver last spoke {ago}"


def _step(step: StepProgress) -> str:
    dropped = f", {step.dropped} dropped" if step.dropped else ""
    share = f"{100 * step.committed // max(1, step.rows)}%"
    done = f"{step.committed}/{step.rows} rollouts ({share}){dropped}, {step.rate_text}"
    if step.finished:
        return f"{done}, done in {human_duration(step.seconds)}"
    if step.step == "judge":
        return f"{done}, {step.left_text}"
    return f"{done}, {step.left_text}; {step.replicas} replica(s) at work, {step.windows_waiting} window(s) wait"
