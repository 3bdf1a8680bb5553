"""Freezing a run: from then on nothing is added, and a content hash says what a paper cites."""

import getpass
import hashlib
import time
from dataclasses import asdict, dataclass

from personaspace.store.commit import committed_slots, read_record
from personaspace.store.errors import InputError, IntegrityError
from personaspace.store.lease import Fence
from personaspace.store.manifest import Manifest
from personaspace.store.objects import Folder
from personaspace.store.sealed import seal, unseal

FROZEN = "frozen.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Freeze:
    """Content of ``frozen.json``."""

    content_hash: str
    """SHA-256 over identity, plan and every object that counts; the same for every copy of the run."""
    frozen: float
    """Unix seconds."""
    by: str


def read_freeze(folder: Folder) -> Freeze | None:
    """The run's freeze, or None. Raises IntegrityError if it is damaged."""
    try:
        data = folder.get(FROZEN)
    except FileNotFoundError:
        return None
    try:
        return Freeze(**unseal(data, f"{folder.url}/{FROZEN}"))
    except TypeError as error:
        raise IntegrityError(f"{folder.url}/{FROZEN}: not a freeze ({error}).") from error


def refuse_frozen(folder: Folder) -> None:
    """Raise InputError if the run is frozen."""
    freeze = read_freeze(folder)
    if freeze is not None:
        raise InputError(
            f"{folder.url}: the run is frozen as {freeze.content_hash[:16]}; nothing can be added or changed. "
            "Work on a copy: `personaspace store cp RUN NEW_RUN --thaw`."
        )


def freeze_run(fence: Fence, manifest: Manifest) -> Freeze:
    """Freeze the run as it is. The caller has verified it."""
    freeze = Freeze(content_hash=content_hash(fence.folder, manifest), frozen=time.time(), by=getpass.getuser())
    fence.check()
    if not fence.folder.put_new(FROZEN, seal(asdict(freeze))):
        refuse_frozen(fence.folder)
    return freeze


def content_hash(folder: Folder, manifest: Manifest) -> str:
    """SHA-256, in hex, over the identity hash and a line `key bytes sha256` for every object that counts, by key.

    Objects that count: the plan, the Zarr group's metadata, and the objects of the records of highest generation.
    """
    stored = [*manifest.plan, *manifest.metadata]
    for slot, generation in committed_slots(folder).items():
        stored += read_record(folder, slot, generation).objects
    lines = sorted(f"{entry.key} {entry.bytes} {entry.sha256}\n" for entry in stored)
    return hashlib.sha256("".join([f"{manifest.identity_hash}\n", *lines]).encode()).hexdigest()
