"""What a store holds: its runs, how complete they are, how large, who wrote them and when."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from personaspace.store.errors import InputError, IntegrityError, LeaseError
from personaspace.store.index import read_index
from personaspace.store.lease import Holder, read_holder
from personaspace.store.location import is_run_name
from personaspace.store.manifest import MANIFEST, MANIFEST_COPY, Manifest, catalogue_hash, require_manifest
from personaspace.store.objects import Folder
from personaspace.store.records import ROLLOUTS, newest_generations
from personaspace.store.schema import STATUS
from personaspace.store.scores import all_judges
from personaspace.store.space import LATEST

State = Literal["planned", "partial", "complete", "writing", "frozen", "damaged"]
REPORT = "report.html"
LEASE_TIMEOUT = 60.0
"""Seconds of silence after which a driver counts as gone, where run.json does not say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSummary:
    """One run as a listing and its manifest show it; no activations are read."""

    name: str
    url: str
    state: State
    """`planned`: nothing is stored yet; `partial`: some; `writing`: partial, and its driver is alive."""
    manifest: Manifest
    generated: int
    """Rollouts whose text is committed."""
    extracted: int
    """Rollouts all of whose activations are committed, dropped ones included."""
    dropped: int
    shards: int
    """Committed shards."""
    shards_wanted: int
    layers: tuple[int, ...]
    """Layers that are complete."""
    bytes: int
    """Of all objects in the folder."""
    objects: int
    judges: tuple[str, ...]
    content_hash: str | None
    """Of a frozen run."""
    fitted: bool
    reported: bool
    holder: Holder | None
    """Of the lease."""

    @property
    def model(self) -> str:
        return str(self.manifest.identity["model"]["name"])


@dataclass(frozen=True, kw_only=True, slots=True)
class DamagedRun:
    """A folder that holds a run whose manifest can't be read."""

    name: str
    url: str
    reason: str


def runs(root: Folder) -> Iterator[RunSummary | DamagedRun]:
    """All runs directly inside ``root``, by name."""
    for folder in run_folders(root):
        try:
            yield summarize(folder)
        except (IntegrityError, LeaseError, InputError) as error:
            yield DamagedRun(name=folder.name, url=folder.url, reason=str(error))


def run_folders(root: Folder) -> Iterator[Folder]:
    """Folders of all runs directly inside ``root``, by name; nothing of them is read."""
    return filter(is_run, map(root.child, filter(is_run_name, root.children())))


def is_run(folder: Folder) -> bool:
    """Whether the folder holds a run, be its manifest damaged or only there as its copy."""
    return folder.exists(MANIFEST) or folder.exists(MANIFEST_COPY)


def summarize(folder: Folder) -> RunSummary:
    """Raises InputError if there is no run, IntegrityError if its manifest is damaged."""
    manifest = require_manifest(folder)
    layout = manifest.layout
    entries = {entry.key: entry.bytes for entry in folder.list()}
    committed = newest_generations(entries)
    wanted = {
        (spec.record, unit, group)
        for spec in manifest.arrays
        for unit in range(layout.units)
        for group in spec.wanted_groups(layout)
    }
    status = read_index(folder, manifest, committed)["status"]
    ok, dropped = (int(np.sum(status == STATUS.index(name))) for name in ("ok", "dropped"))
    holder = read_holder(folder)
    whole = wanted <= committed.keys() and ok + dropped == layout.rows
    writing = holder is not None and not holder.has_ended()
    state: State = "complete" if whole else "writing" if writing else "partial" if committed else "planned"
    return RunSummary(
        name=folder.name,
        url=folder.url,
        state="frozen" if manifest.frozen else state,
        manifest=manifest,
        generated=sum(len(layout.unit_row_range(unit)) for array, unit, _ in committed if array == ROLLOUTS),
        extracted=ok + dropped,
        dropped=dropped,
        shards=len(wanted & committed.keys()),
        shards_wanted=len(wanted),
        layers=tuple(manifest.arrays[0].complete_layers(layout, committed, range(layout.units))),
        bytes=sum(entries.values()),
        objects=len(entries),
        judges=tuple(all_judges(committed)),
        content_hash=str(manifest.frozen["content_hash"]) if manifest.frozen else None,
        fitted=LATEST in entries,
        reported=REPORT in entries,
        holder=holder,
    )


def describe(summary: RunSummary) -> str:
    """Lines for people: what is committed, what is missing, where it comes from, who writes."""
    manifest = summary.manifest
    layout = manifest.layout
    sessions = "none yet"
    if manifest.sessions:
        last = manifest.sessions[-1]
        sessions = f"{len(manifest.sessions)}, last by {last['user']} on {last['host']} at {last['started']}"
    segments = f" in {len(layout.segments)} segments" if len(layout.segments) > 1 else ""
    lines = {
        "run": f"{summary.url}  (identity {manifest.identity_hash})",
        "state": summary.state + (f" as {summary.content_hash}" if summary.content_hash else ""),
        "model": f"{summary.model}, {layout.layers} layers x {layout.hidden}",
        "planned": f"{layout.rows} rollouts{segments}: {len(manifest.tables['roles'])} roles, "
        f"{len(manifest.tables['questions'])} questions (catalogue {catalogue_hash(manifest.tables)})",
        "generated": f"{summary.generated}/{layout.rows} rollouts",
        "extracted": f"{summary.extracted}/{layout.rows} rollouts ({summary.dropped} dropped)",
        "shards": f"{summary.shards}/{summary.shards_wanted} of {', '.join(s.path for s in manifest.arrays)}, "
        f"{len(summary.layers)}/{layout.layers} layers complete",
        "precision": f"{manifest.identity['store']['precision']} mantissa bits",
        "size": f"{human_bytes(summary.bytes)} in {summary.objects} objects",
        "scores": ", ".join(summary.judges) or "no",
        "fitted": "yes" if summary.fitted else "no",
        "report": f"{summary.url}/{REPORT}" if summary.reported else "no",
        "driver": _driver(summary.holder, manifest),
        "sessions": sessions,
        "code": (manifest.sessions[-1]["git_commit"] if manifest.sessions else None) or "not in git",
    }
    return "\n".join(f"{name:10s} {text}" for name, text in lines.items())


def as_row(run: RunSummary | DamagedRun) -> dict[str, str]:
    """Columns of a listing, for people."""
    if isinstance(run, DamagedRun):
        return {"run": run.name, "model": "", "shape": "", "rollouts": "", "layers": "", "state": "damaged", "size": ""}
    layout, session = run.manifest.layout, run.manifest.sessions[-1]
    return {
        "run": run.name,
        "model": run.model,
        "shape": f"{layout.layers} x {layout.hidden}",
        "rollouts": f"{run.extracted}/{layout.rows}",
        "layers": f"{len(run.layers)}/{layout.layers}",
        "state": run.state,
        "size": human_bytes(run.bytes),
        "last session": f"{session['started']} {session['user']}@{session['host']}",
    }


def human_bytes(count: float) -> str:
    """Such as `39.2 MB` (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _driver(holder: Holder | None, manifest: Manifest) -> str:
    if holder is None:
        return "none yet"
    who = f"{holder.where}, epoch {holder.epoch}"
    if holder.released:
        return f"none (last: {who})"
    silence = time.time() - holder.heartbeat
    ago = f"last sign of life {silence:.0f} s ago"
    if holder.has_ended():
        return f"{who}, gone, {ago}"
    timeout = manifest.execution.get("config", {}).get("store", {}).get("lease_timeout", LEASE_TIMEOUT)
    # Its process can't be looked up from here, or it hangs.
    return f"{who}, {'running' if silence <= timeout else 'silent, probably gone'}, {ago}"
