"""Creating a run, and growing it: one procedure, of which ``run.json`` is the last step.

A crash before that leaves a run as it was: readers and writers follow the manifest, and what was written ahead of
it is written again.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace

from personaspace.store.commit import publish
from personaspace.store.errors import InputError
from personaspace.store.layout import ZARR_GROUP
from personaspace.store.lease import LEASE, Fence
from personaspace.store.manifest import MANIFEST, Manifest, write_manifest
from personaspace.store.objects import LOCK, SCRATCH, Folder
from personaspace.store.plan import PlannedRow, encode_plan, plan_key
from personaspace.store.records import copy_key, describe
from personaspace.store.schema import group_objects


def refuse_foreign(folder: Folder, also: Collection[str] = ()) -> None:
    """Raise InputError if the folder holds no run, but things that no driver leaves behind, nor are in ``also``."""
    if folder.exists(MANIFEST):
        return
    ours = {LEASE, LOCK, SCRATCH, ZARR_GROUP, "plan", *also}
    foreign = sorted({entry.key.split("/")[0] for entry in folder.list()} - ours)
    if foreign:
        raise InputError(
            f"{folder.url}: holds {foreign}, but no run.json; choose an empty place for the run. (After an interrupted "
            "`personaspace store cp`, repeat that command.)"
        )


def write_run(fence: Fence, before: Manifest | None, after: Manifest, rows: Sequence[PlannedRow]) -> Manifest:
    """Bring the stored run from ``before`` (None: nothing) to ``after``, and return the manifest as stored.

    ``rows`` are all planned rows; segments that ``before`` does not have are published. Nothing that is stored is
    rewritten but metadata. Raises LeaseError if another driver was here.
    """
    plan = list(after.plan)
    by_row = {row.row: row for row in rows}
    for segment in range(len(plan), len(after.layout.segments)):
        units = after.layout.segment_units[segment]
        data = encode_plan([by_row[row] for unit in units for row in after.layout.unit_row_range(unit)])
        for key in (plan_key(segment), copy_key(plan_key(segment))):
            publish(fence, key, data)
        plan.append(describe(plan_key(segment), data))
    objects = run_metadata(after)
    # In every session, since a growth that crashed and was given up leaves its own behind. The group's zarr.json, which
    # readers open, comes last by its name.
    for key, data in objects.items():
        publish(fence, key, data)
    metadata = tuple(describe(key, data) for key, data in objects.items())
    stored = replace(after, plan=tuple(plan), metadata=metadata)
    write_manifest(fence, before, stored)
    return stored


def run_metadata(manifest: Manifest) -> dict[str, bytes]:
    """Key -> bytes of all metadata of the run's Zarr group."""
    attributes = {"identity_hash": manifest.identity_hash}
    return group_objects(manifest.layout, manifest.arrays, attributes, manifest.spans_per_rollout)
