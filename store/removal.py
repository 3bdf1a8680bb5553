"""Deleting: whole runs, and what crashes and repeated fits leave behind. Never under a live driver."""

from collections.abc import Callable

from personaspace.store.errors import InputError
from personaspace.store.lease import LEASE, Fence
from personaspace.store.manifest import MANIFEST, Manifest, read_manifest
from personaspace.store.objects import LOCK, Folder, ObjectInfo
from personaspace.store.verify import Verification

GARBAGE = ("orphan", "leftover")
"""Kinds of problems that `gc` deletes."""


def garbage(folder: Folder, found: Verification, *, foreign: bool = False) -> list[ObjectInfo]:
    """What may be deleted from a run: orphans and leftovers, and foreign objects if asked for."""
    kinds = (*GARBAGE, "foreign") if foreign else GARBAGE
    keys = {problem.key for problem in found.problems if problem.kind in kinds}
    return [entry for entry in folder.list() if entry.key in keys]


def collect_garbage(fence: Fence, objects: list[ObjectInfo]) -> None:
    """Delete what ``garbage`` found; the caller holds the lease."""
    for entry in objects:
        fence.check()
        fence.folder.delete(entry.key)


def check_removable(folder: Folder, manifest: Manifest, *, frozen: bool) -> None:
    """Raise InputError if the run is frozen and ``frozen`` does not allow that."""
    if manifest.frozen is not None and not frozen:
        raise InputError(
            f"{folder.url}: the run is frozen as {manifest.frozen['content_hash']}, perhaps cited by somebody. "
            "Add --frozen to delete it all the same. Nothing was deleted."
        )


def remove_run(fence: Fence, progress: Callable[[int], None] = lambda count: None) -> int:
    """Delete every object of the run; the caller holds its lease. Returns how many.

    The manifest goes first, so that no reader sees half a run, and the lease last, so that no driver begins one.
    """
    folder = fence.folder
    keys = [entry.key for entry in folder.list()]
    first = [key for key in keys if key == MANIFEST]
    last = [key for key in (LEASE, LOCK) if key in keys]
    middle = [key for key in keys if key not in {*first, *last}]
    for count, key in enumerate([*first, *middle], start=1):
        fence.check()
        folder.delete(key)
        progress(count)
    return len(keys)


def remove_lease(folder: Folder) -> None:
    """Delete what the lease leaves of a removed run, after its release."""
    if read_manifest(folder) is None:
        folder.clear_scratch()
        for key in (LEASE, LOCK):
            folder.delete(key)
