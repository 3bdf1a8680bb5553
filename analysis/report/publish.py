"""The report step: gathers what the page shows from the run folder, and publishes ``report.html``."""

import json
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from personaspace.analysis.caps.section import cap_section
from personaspace.analysis.quality.assess import assess
from personaspace.analysis.quality.section import quality_section
from personaspace.analysis.report.render import Completeness, DroppedRollout, Sample, render_report
from personaspace.store.catalog import REPORT
from personaspace.store.manifest import Manifest, require_manifest
from personaspace.store.objects import Folder
from personaspace.store.reader import open_run
from personaspace.store.records import COORDINATES_RECORD, read_records
from personaspace.store.rollouts import read_rollouts
from personaspace.store.schema import STATUS
from personaspace.store.space import open_space


def publish_report(folder: Folder) -> str:
    """Write the report of the latest fit and return where it is. Raises InputError if there is no fit."""
    space = open_space(folder).load()
    run = open_run(folder)
    manifest = require_manifest(folder)
    rollouts = read_rollouts(
        folder,
        columns=["row", "rollout_id", "role", "question", "messages", "response", "response_token_ids", "dropped"],
    )
    counts = {name: int((run["status"].values == code).sum()) for code, name in enumerate(STATUS)}
    page = render_report(
        space,
        title=f"Persona space of {manifest.identity['model']['name']}",
        samples=_samples(rollouts),
        provenance=_provenance(manifest, folder, space.attrs),
        dropped=_dropped(folder, rollouts, manifest),
        completeness=Completeness(
            rows_planned=manifest.layout.rows,
            rows_ok=counts["ok"],
            rows_dropped=counts["dropped"],
            rows_pending=manifest.layout.rows - counts["ok"] - counts["dropped"],
        ),
        quality=quality_section(assess(folder), space.attrs),
        caps=cap_section(folder, space),
    )
    folder.replace(REPORT, page.encode())
    return f"{folder.url}/{REPORT}"


def _samples(rollouts: pa.Table) -> dict[str, Sample]:
    """The first usable rollout of each role."""
    samples: dict[str, Sample] = {}
    usable = rollouts.filter(pc.is_null(rollouts["dropped"]))
    for role in pc.unique(usable["role"]).to_pylist():
        entry = usable.filter(pc.equal(usable["role"], role)).slice(0, 1).to_pylist()[0]
        turns = entry["messages"]
        samples[role] = Sample(
            system_prompt=turns[0]["content"] if turns[0]["role"] == "system" else "",
            question=turns[-1]["content"],
            response=entry["response"],
        )
    return samples


def _dropped(folder: Folder, rollouts: pa.Table, manifest: Manifest) -> list[DroppedRollout]:
    """Every dropped row with its reason, whether generation or extraction found it."""
    reasons: dict[int, str] = {}
    for record in read_records(folder, COORDINATES_RECORD).values():
        reasons.update(record.dropped)
    rows = rollouts.filter(pc.is_in(rollouts["row"], value_set=pa.array(sorted(reasons), type=pa.int64())))
    return [
        DroppedRollout(
            rollout_id=entry["rollout_id"],
            role=entry["role"],
            question=manifest.tables["questions"][entry["question"]]["text"],
            reason=reasons[entry["row"]],
        )
        for entry in rows.select(["row", "rollout_id", "role", "question"]).to_pylist()
    ]


def _provenance(manifest: Manifest, folder: Folder, space: dict[str, Any]) -> list[tuple[str, str]]:
    identity, session = manifest.identity, manifest.sessions[-1]
    model = identity["model"]
    files = ", ".join(f"{name} {digest[:12]}" for name, digest in model["files"].items())
    return [
        ("Model", model["name"]),
        ("Revision", model["revision"] or "local folder"),
        ("Model files", files),
        ("Precision of the model", model["dtype"]),
        ("Chat template", f"{model['template_hash']}, system messages {model['system_policy']}"),
        ("Generation", json.dumps(identity["generate"])),
        ("Array", f"{space['array']}, {identity['extract']['pooling']}"),
        ("Stored precision", f"{identity['store']['precision']} mantissa bits"),
        ("Run", f"{folder.name}, identity {manifest.identity_hash}"),
        ("Conversations", f"{manifest.layout.rows}, plan {' '.join(stored.sha256[:12] for stored in manifest.plan)}"),
        ("Fitted", str(space["fitted"])),
        ("Sessions", f"{len(manifest.sessions)}, last on {session['host']} at {session['started']}"),
        ("Code", session["git_commit"] or "not in git"),
        ("Software", ", ".join(f"{name} {version}" for name, version in session["packages"].items())),
    ]
