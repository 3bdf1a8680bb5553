"""Holding a run for a command that is no driver: its lease, on the run that was looked at."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from personaspace.store.errors import IdentityError
from personaspace.store.lease import Fence, acquire
from personaspace.store.manifest import Manifest, read_manifest
from personaspace.store.objects import Folder


@contextmanager
def holding(
    folder: Folder, existing: Manifest | None, *, timeout: float, say: Callable[[str], None]
) -> Iterator[Fence]:
    """Hold the run's lease. Raises IdentityError if the run is no longer ``existing``, LeaseError if it is in use."""
    after_epoch = 0 if existing is None else existing.last_epoch
    with acquire(folder, timeout=timeout, say=say, after_epoch=after_epoch) as lease:
        if read_manifest(folder) != existing:
            raise IdentityError(
                f"{folder.url}: another driver changed the run while this one was getting ready. Repeat the "
                "command. Nothing was changed."
            )
        yield lease.fence
