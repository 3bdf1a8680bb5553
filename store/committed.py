"""A read-only Zarr store that shows committed chunks only, whatever else lies in the run folder."""

import hashlib
from collections.abc import AsyncGenerator, Iterable, Mapping

from obstore.exceptions import BaseError
from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import WrapperStore

from personaspace.store.errors import IntegrityError, StorageError
from personaspace.store.layout import ZARR_GROUP
from personaspace.store.objects import Folder
from personaspace.store.records import COORDINATES_RECORD, Slot
from personaspace.store.remote import redact
from personaspace.store.schema import COORDINATES, SPAN_COORDINATES, SPANS


class CommittedStore(WrapperStore[Store]):
    """The run's Zarr group as its commit records have it.

    A chunk without a record reads as missing, so Zarr shows its fill value (NaN, or pending). A chunk with a
    record that is not there is an IntegrityError, where Zarr alone would show the fill value, too.
    """

    def __init__(self, folder: Folder, committed: Mapping[Slot, int], store: Store | None = None) -> None:
        super().__init__(store or folder.zarr_store(ZARR_GROUP))
        self._folder = folder
        self._committed = dict(committed)

    def _with_store(self, store: Store) -> "CommittedStore":
        return CommittedStore(self._folder, self._committed, store)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CommittedStore) and self.__dask_tokenize__() == other.__dask_tokenize__()

    def __str__(self) -> str:
        return f"{self._folder.url}/{ZARR_GROUP}"

    def __repr__(self) -> str:
        return f"CommittedStore('{self}')"

    def __hash__(self) -> int:
        return hash(self._folder.url)

    def __dask_tokenize__(self) -> tuple[str, str]:
        """Changes whenever more is committed or repaired, so that Dask never mixes two states of a run."""
        return (self._folder.url, digest(self._committed))

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        slot = chunk_slot(key)
        if slot is not None and slot not in self._committed:
            return None
        try:
            found = await super().get(key, prototype, byte_range)
        except BaseError as error:
            raise StorageError(f"{self._folder.url}/{ZARR_GROUP}/{key}: reading failed: {redact(str(error))}") from None
        if found is None and slot is not None:
            raise IntegrityError(f"{self._folder.url}/{ZARR_GROUP}/{key}: is recorded, but missing.")
        return found

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def _get_many(
        self, requests: Iterable[tuple[str, BufferPrototype, ByteRequest | None]]
    ) -> AsyncGenerator[tuple[str, Buffer | None], None]:
        for key, prototype, byte_range in requests:
            yield key, await self.get(key, prototype, byte_range)

    async def exists(self, key: str) -> bool:
        slot = chunk_slot(key)
        return (slot is None or slot in self._committed) and await super().exists(key)


def chunk_slot(key: str) -> Slot | None:
    """Slot whose record makes a chunk of the group count; None for metadata and for `layer`, which need none."""
    array, separator, place = key.rpartition("/c/")
    numbers = place.split("/")
    if not separator or not all(number.isdigit() for number in numbers):
        return None
    *parents, name = array.split("/")
    if name == "layer":
        return None
    prefix = "".join(f"{parent}." for parent in parents)
    coordinates = SPAN_COORDINATES if parents == [SPANS] else COORDINATES
    if name in coordinates:
        return (prefix + COORDINATES_RECORD, int(numbers[0]), 0)
    return (prefix + name, int(numbers[0]), int(numbers[1]) if len(numbers) > 1 else 0)


def digest(committed: Mapping[Slot, int]) -> str:
    """Hash of what is committed: SHA-256 over a line `array unit group generation` for each slot, in their order."""
    lines = (f"{array} {unit} {group} {number}\n" for (array, unit, group), number in sorted(committed.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()
