"""Copying a run, to another place or another kind of storage: every byte checked on its way."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from personaspace.store.catalog import REPORT
from personaspace.store.commit import publish
from personaspace.store.creation import refuse_foreign
from personaspace.store.errors import InputError
from personaspace.store.lease import Fence
from personaspace.store.manifest import Manifest, read_manifest, require_manifest, write_manifest
from personaspace.store.objects import Folder
from personaspace.store.records import (
    COMMITS,
    READ_THREADS,
    ROLLOUTS,
    StoredObject,
    committed_slots,
    describe,
    read_object,
    read_slots,
)
from personaspace.store.scores import SCORES
from personaspace.store.sealed import seal, unseal
from personaspace.store.space import SPACE, copy_space

COPYING = "copying.json"
"""In the target until the copy is whole: which run is being copied."""
WINDOW = 64
"""Objects on their way at a time: bounds the memory to so many shards."""


def copy_run(source: Folder, fence: Fence, progress: Callable[[int, int, int], None]) -> int:
    """Copy what ``source`` has committed into the folder of ``fence``, whose lease the caller holds; returns bytes.

    The copy is a run of its own: not frozen, with the sessions of its source. run.json comes last, so an interrupted
    copy is no run yet, and the same command goes on with it: objects that are there are not sent again. Committed
    records don't change, so the source may be written meanwhile. ``progress`` gets objects done, objects in all, and
    bytes done. Raises InputError if the target holds another run, IntegrityError for damage in the source.
    """
    manifest = require_manifest(source)
    target = fence.folder
    existing = read_manifest(target)
    _begin(fence, manifest, existing)
    slots = committed_slots(source)
    records = read_slots(source, slots).values()
    wanted = [*manifest.plan, *(stored.copy for stored in manifest.plan), *manifest.metadata]
    wanted += [entry for record in records for entry in record.objects]
    present = {entry.key: entry.bytes for entry in target.list()}

    def send(stored: StoredObject) -> int:
        # An object of the right size was published whole: only its content can still be another's.
        if present.get(stored.key) != stored.bytes or describe(stored.key, target.get(stored.key)) != stored:
            publish(fence, stored.key, read_object(source, stored))
        return stored.bytes

    with ThreadPoolExecutor(READ_THREADS) as threads:
        total = done = 0
        for start in range(0, len(wanted), WINDOW):
            for size in threads.map(send, wanted[start : start + WINDOW]):
                done += 1
                total += size
                progress(done, len(wanted), total)
        # A record is written when its objects are there, as everywhere.
        for record in records:
            publish(fence, record.key, record.encode())
    copy_space(source, target)
    if source.exists(REPORT):
        target.replace(REPORT, source.get(REPORT))
    write_manifest(fence, existing, replace(manifest, frozen=None))
    target.delete(COPYING)
    return total


def refuse_foreign_copy(target: Folder) -> None:
    """Raise InputError if the target holds neither a run, nor an interrupted copy, nor nothing."""
    begun = (ROLLOUTS, SCORES, COMMITS, SPACE, COPYING) if target.exists(COPYING) else ()
    refuse_foreign(target, begun)


def _begin(fence: Fence, manifest: Manifest, existing: Manifest | None) -> None:
    """Mark the target. Raises InputError if it holds another run, or the beginning of another one's copy."""
    # The first segment's plan tells runs apart that share their settings.
    origin = {"identity_hash": manifest.identity_hash, "plan": manifest.plan[0].sha256}
    if existing is not None and origin != {"identity_hash": existing.identity_hash, "plan": existing.plan[0].sha256}:
        raise InputError(f"{fence.folder.url}: holds another run (identity {existing.identity_hash}). Nothing changed.")
    fence.check()
    if not fence.folder.put_new(COPYING, seal(origin)):
        begun = unseal(fence.folder.get(COPYING), f"{fence.folder.url}/{COPYING}")
        if begun != origin:
            raise InputError(f"{fence.folder.url}: holds the beginning of another run's copy; choose another place.")
