"""Runs for a comparison, opened from their folders: fits, what differs in how they were made, and what roles said."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from personaspace.analysis.compare.pairing import Fitted
from personaspace.analysis.report.render import Sample
from personaspace.store.errors import InputError
from personaspace.store.formats.role_names import DEFAULT_ROLE
from personaspace.store.location import Location, open_folder
from personaspace.store.manifest import Manifest, identity_changes, require_manifest
from personaspace.store.objects import Folder
from personaspace.store.plan import read_plan_table
from personaspace.store.rollouts import read_rollouts
from personaspace.store.space import open_space

WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth")
FIT = ("array", "leave_out", "standardised")
"""Attributes of a fit that decide its numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One of the runs, with where it came from."""

    fitted: Fitted
    folder: Folder
    manifest: Manifest


def open_runs(urls: Sequence[Location]) -> list[Run]:
    """The runs at ``urls``. Raises InputError for one without a fit, and for one that is given twice."""
    folders = [open_folder(url) for url in urls]
    twice = [folder.url for at, folder in enumerate(folders) if folder.url in {f.url for f in folders[:at]}]
    if twice:
        raise InputError(f"compare: {twice[0]} is given twice; a run is compared with others.")
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        names = ["/".join(PurePosixPath(folder.url).parts[-2:]) for folder in folders]
    if len(set(names)) < len(names):
        names = [folder.url for folder in folders]
    runs = []
    for name, folder in zip(names, folders, strict=True):
        manifest = require_manifest(folder)
        fitted = Fitted(name=name, space=open_space(folder), depth=manifest.layout.layers, identity=manifest.identity)
        runs.append(Run(fitted=fitted, folder=folder, manifest=manifest))
    return runs


def differences(a: Run, b: Run) -> list[tuple[str, str, str]]:
    """(setting, in the first run, in the second) of all that differs: identity, catalogue, fit."""
    found = [_shortened(change) for change in identity_changes(a.manifest.identity, b.manifest.identity)]
    ours, theirs = (_texts(run.manifest.tables["questions"], "text") for run in (a, b))
    if ours != theirs:
        shared = sum(theirs.get(key) == text for key, text in ours.items())
        found.append(("questions", f"{len(ours)}, {shared} of them in both", f"{len(theirs)}"))
    ours, theirs = (_texts(run.manifest.tables["roles"], "prompts") for run in (a, b))
    if ours != theirs:
        common = ours.keys() & theirs.keys()
        same = sum(ours[key] == theirs[key] for key in common)
        note = f"{len(ours)}, {len(common)} of them in both, {same} with the same prompts"
        found.append(("roles", note, f"{len(theirs)}"))
    for key in FIT:
        before, after = (json.dumps(run.fitted.space.attrs.get(key)) for run in (a, b))
        if before != after:
            found.append((f"fit: {key}", before, after))
    sizes = [f"{run.fitted.space.sizes['rollout']:,}" for run in (a, b)]
    return [*found, ("rollouts in the fit", sizes[0], sizes[1])] if sizes[0] != sizes[1] else found


def _texts(table: Sequence[Mapping[str, Any]], key: str) -> dict[str, str]:
    return {str(entry["id"]): json.dumps(entry.get(key)) for entry in table}


def _shortened(change: tuple[str, str, str]) -> tuple[str, str, str]:
    key, before, after = change
    if ".files." not in key:
        return change
    before, after = (f"{value[1:13]}…" if value.startswith('"') else value for value in (before, after))
    return key, before, after


def basis(a: Run, b: Run) -> str:
    """Whether the two models share a residual basis, in words: `same`, `different` or `unknown` weight files."""
    files = [
        {name: digest for name, digest in run.manifest.identity["model"]["files"].items() if name.endswith(WEIGHTS)}
        for run in (a, b)
    ]
    if not files[0] or not files[1]:
        return "unknown"
    return "same" if sorted(files[0].values()) == sorted(files[1].values()) else "different"


def samples(runs: Sequence[Run]) -> list[dict[str, Sample]]:
    """For each run: role, or `default` -> one response; to the same question in all runs, where they share one."""
    asked = [_asked(run) for run in runs]
    roles = {role for of_run in asked for role in of_run}
    rows: list[dict[int, str]] = [{} for _ in runs]
    for role in roles:
        having = [at for at, of_run in enumerate(asked) if role in of_run]
        shared = [question for question in asked[having[0]][role] if all(question in asked[at][role] for at in having)]
        for at in having:
            of_role = asked[at][role]
            rows[at][of_role[shared[0]] if shared else next(iter(of_role.values()))] = role
    return [_read(run, wanted) for run, wanted in zip(runs, rows, strict=True)]


def _asked(run: Run) -> dict[str, dict[str, int]]:
    """Role -> text of a question that it answered -> the first such row in the fit."""
    plan = read_plan_table(run.folder, run.manifest)
    chosen = plan.filter(pc.is_in(plan["row"], value_set=pa.array(run.fitted.space["rollout_row"].values, pa.int64())))
    roles, questions = run.manifest.tables["roles"], run.manifest.tables["questions"]
    asked: dict[str, dict[str, int]] = {}
    columns = (chosen[name].to_pylist() for name in ("row", "role_id", "question"))
    for row, role, question in zip(*columns, strict=True):
        asked.setdefault(str(roles[role]["id"]), {}).setdefault(str(questions[question]["text"]), row)
    fitted = {str(role) for role in run.fitted.space["role"].values} | {DEFAULT_ROLE}
    return {role: of_role for role, of_role in asked.items() if role in fitted}


def _read(run: Run, wanted: Mapping[int, str]) -> dict[str, Sample]:
    units = sorted({row // run.manifest.layout.unit_rows for row in wanted})
    table = read_rollouts(run.folder, units, columns=["row", "messages", "response"])
    found = {}
    for entry in table.filter(pc.is_in(table["row"], value_set=pa.array(list(wanted), pa.int64()))).to_pylist():
        turns = entry["messages"]
        system = turns[0]["content"] if turns[0]["role"] == "system" else ""
        sample = Sample(system_prompt=system, question=turns[-1]["content"], response=entry["response"])
        found[wanted[entry["row"]]] = sample
    return found


def provenance(run: Run) -> list[tuple[str, str]]:
    """Labels and values that say which run this is."""
    identity, attrs = run.manifest.identity, run.fitted.space.attrs
    files = ", ".join(f"{name} {digest[:12]}" for name, digest in identity["model"]["files"].items())
    return [
        ("Run", f"{run.folder.url}, identity {run.manifest.identity_hash}"),
        ("Model", identity["model"]["name"]),
        ("Revision", identity["model"]["revision"] or "local folder"),
        ("Model files", files or "not recorded"),
        ("Generation", json.dumps(identity["generate"])),
        ("Array", f"{attrs['array']}, {identity['extract']['pooling']}"),
        ("Fitted", str(attrs["fitted"])),
    ]
