"""Storage that is away for a moment: whoever holds a run waits for it, instead of giving up hours of work."""

import logging
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from zarr.abc.store import Store

from personaspace.store.errors import StorageError
from personaspace.store.objects import Folder, ObjectInfo

FIRST_PAUSE, LONGEST_PAUSE = 0.2, 10.0
"""Seconds between attempts: doubled from one to the next, and spread, so that workers don't come back all at once."""
_log = logging.getLogger(__name__)
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class PatientFolder:
    """A folder of which every operation that fails is repeated for ``seconds``; then its StorageError comes through.

    All operations bear repetition: one that was carried out although its answer was an error finds its own work.
    """

    folder: Folder
    seconds: float

    @property
    def url(self) -> str:
        return self.folder.url

    @property
    def name(self) -> str:
        return self.folder.name

    def child(self, name: str) -> "PatientFolder":
        return PatientFolder(self.folder.child(name), self.seconds)

    def children(self) -> list[str]:
        return self._repeat(self.folder.children)

    def get(self, key: str) -> bytes:
        return self._repeat(lambda: self.folder.get(key))

    def get_range(self, key: str, start: int, length: int) -> bytes:
        return self._repeat(lambda: self.folder.get_range(key, start, length))

    def get_tail(self, key: str, length: int) -> bytes:
        return self._repeat(lambda: self.folder.get_tail(key, length))

    def exists(self, key: str) -> bool:
        return self._repeat(lambda: self.folder.exists(key))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        yield from self._repeat(lambda: [*self.folder.list(prefix)])

    def put_new(self, key: str, data: bytes) -> bool:
        return self._repeat(lambda: self.folder.put_new(key, data))

    def replace(self, key: str, data: bytes) -> None:
        self._repeat(lambda: self.folder.replace(key, data))

    def compare_and_swap(self, key: str, expected: bytes | None, data: bytes) -> bool:
        return self._repeat(lambda: self.folder.compare_and_swap(key, expected, data))

    def delete(self, key: str) -> None:
        self._repeat(lambda: self.folder.delete(key))

    def sync(self, prefix: str) -> None:
        self._repeat(lambda: self.folder.sync(prefix))

    def clear_scratch(self) -> int:
        return self._repeat(self.folder.clear_scratch)

    def zarr_store(self, prefix: str, *, read_only: bool = True) -> Store:
        """Zarr's own reads and writes are not repeated."""
        return self.folder.zarr_store(prefix, read_only=read_only)

    def _repeat(self, operation: Callable[[], Answer]) -> Answer:
        until = time.monotonic() + self.seconds
        pause = FIRST_PAUSE
        while True:
            try:
                return operation()
            except StorageError as error:
                left = until - time.monotonic()
                if left <= 0:
                    raise
                _log.warning("%s Trying again for %.0f s.", error, left)
                time.sleep(min(left, pause * random.uniform(0.5, 1.5)))
                pause = min(2 * pause, LONGEST_PAUSE)
