"""Mending what needs no model: second copies, metadata, the index, and records that point to nothing any more."""

from collections.abc import Callable
from dataclasses import replace

from personaspace.store.commit import publish
from personaspace.store.creation import run_metadata
from personaspace.store.errors import IntegrityError
from personaspace.store.index import INDEX, TABLE
from personaspace.store.lease import Fence
from personaspace.store.manifest import MANIFEST, MANIFEST_COPY, Manifest, read_manifest, write_manifest
from personaspace.store.records import (
    COMMITS,
    StoredObject,
    committed_slots,
    describe,
    parse_record_key,
    read_object,
    read_record,
)
from personaspace.store.scores import SCORES, restore_scores
from personaspace.store.verify import Verification


def mend(fence: Fence, found: Verification, say: Callable[[str], None]) -> list[str]:
    """Restore everything that the store itself still knows; the caller holds the lease.

    Returns, for people, what can't be restored here nor be computed again. What is left for a model to make again
    are the slots of ``found.harmful``.
    """
    lost: list[str] = []
    harmful = {problem.key for problem in found.harmful}
    _restore_manifest(fence, found.manifest, harmful, say)
    for stored in found.manifest.plan:
        lost += _restore_copies(fence, stored, harmful, say)
    if harmful & {stored.key for stored in found.manifest.metadata}:
        _restore_metadata(fence, say)
    scored = {p.slot: p.generation for p in found.harmful if p.slot is not None and p.slot[0].startswith(f"{SCORES}.")}
    for slot, generation in scored.items():
        if restore_scores(fence, found.manifest.layout, slot, generation):
            say(f"{slot[0]} of unit {slot[1]}: restored from the sound copy")
        else:
            lost.append(f"{slot[0]} of unit {slot[1]}: both copies are damaged; judge or import again")
    drop_replaced_records(fence, say)
    if INDEX in harmful:
        for key in (INDEX, TABLE):
            fence.folder.delete(key)
        say("index: deleted; it is made again from the chunks")
    return lost


def drop_replaced_records(fence: Fence, say: Callable[[str], None]) -> None:
    """Delete damaged records that a newer one has replaced: nothing else ever deletes a record."""
    newest = committed_slots(fence.folder)
    for entry in list(fence.folder.list(COMMITS)):
        parsed = parse_record_key(entry.key)
        if parsed is None or parsed[1] == newest[parsed[0]]:
            continue
        try:
            read_record(fence.folder, *parsed)
        except IntegrityError:
            fence.check()
            fence.folder.delete(entry.key)
            say(f"{entry.key}: was damaged, and a newer record has replaced it; deleted")


def _restore_manifest(fence: Fence, manifest: Manifest, harmful: set[str], say: Callable[[str], None]) -> None:
    for key in sorted(harmful & {MANIFEST, MANIFEST_COPY}):
        publish(fence, key, manifest.encode())
        say(f"{key}: restored from its other copy")


def _restore_copies(fence: Fence, stored: StoredObject, harmful: set[str], say: Callable[[str], None]) -> list[str]:
    """Restore whichever of an object's two copies is damaged. Says what is lost if both are."""
    copies = [stored, stored.copy]
    damaged = [copy.key for copy in copies if copy.key in harmful]
    if not damaged:
        return []
    for copy in copies:
        try:
            data = read_object(fence.folder, copy)
        except IntegrityError:
            continue
        for other in damaged:
            publish(fence, other, data)
            say(f"{other}: restored from its other copy")
        return []
    return [f"{stored.key}: both copies are damaged; restore the run from a copy"]


def _restore_metadata(fence: Fence, say: Callable[[str], None]) -> None:
    manifest = read_manifest(fence.folder)
    if manifest is None:
        raise IntegrityError(f"{fence.folder.url}/{MANIFEST}: vanished during the repair.")
    objects = run_metadata(manifest)
    for key, data in objects.items():
        publish(fence, key, data)
    metadata = tuple(describe(key, data) for key, data in objects.items())
    if metadata != manifest.metadata:  # Another version of Zarr words the same metadata in another way.
        write_manifest(fence, manifest, replace(manifest, metadata=metadata))
    say("metadata of the Zarr group: written again from run.json")
