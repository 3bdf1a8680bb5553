"""Freezing a run: from then on nothing is added, and a content hash says what a paper cites."""

import getpass
import hashlib
import time
from dataclasses import replace

from personaspace.store.lease import Fence
from personaspace.store.manifest import Manifest, refuse_frozen, write_manifest
from personaspace.store.objects import Folder
from personaspace.store.records import committed_slots, read_slots


def freeze_run(fence: Fence, manifest: Manifest) -> Manifest:
    """Freeze the run as it is. The caller holds its lease and has verified it. Raises InputError if it is frozen."""
    refuse_frozen(fence.folder, manifest)
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    frozen = {"content_hash": content_hash(fence.folder, manifest), "at": at, "by": getpass.getuser()}
    after = replace(manifest, frozen=frozen)
    write_manifest(fence, manifest, after)
    return after


def content_hash(folder: Folder, manifest: Manifest) -> str:
    """SHA-256, in hex, of what the run holds: the same for every copy of it.

    Over a line with the identity hash, then a line `key bytes sha256` for every object that counts, sorted: the
    plan, the Zarr group's metadata, and the objects of each slot's record of the highest generation.
    """
    records = read_slots(folder, committed_slots(folder)).values()
    stored = [*manifest.plan, *manifest.metadata, *(entry for record in records for entry in record.objects)]
    lines = sorted(f"{entry.key} {entry.bytes} {entry.sha256}\n" for entry in stored)
    return hashlib.sha256("".join([f"{manifest.identity_hash}\n", *lines]).encode()).hexdigest()
