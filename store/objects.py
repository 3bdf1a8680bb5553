"""Atomic, durable objects in a folder: the primitives that the commit protocol rests on (POSIX).

An object appears whole or not at all. ``put_new`` is put-if-absent: of several writers exactly one wins.
"""

import fcntl
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SCRATCH = ".tmp"
_KEY = re.compile(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*")


@dataclass(frozen=True, slots=True)
class LocalFolder:
    """Objects under ``path``, named by slash-separated keys. Holds no open files: safe to pickle and to share."""

    path: Path

    def resolve(self, key: str) -> Path:
        """File of ``key``; raises ValueError for a key that could leave the folder."""
        if not _KEY.fullmatch(key) or any(part in (".", "..") for part in key.split("/")):
            raise ValueError(f"{key!r} is not an object key: use letters, digits, '.', '_', '-' between slashes")
        return self.path / key

    def get(self, key: str) -> bytes:
        """Bytes of the object; raises FileNotFoundError."""
        return self.resolve(key).read_bytes()

    def exists(self, key: str) -> bool:
        return self.resolve(key).exists()

    def list(self, prefix: str) -> Iterator[str]:
        """Keys of all objects in the folder ``prefix`` and below, sorted by folder and name."""
        for folder, folders, files in os.walk(self.resolve(prefix)):
            folders.sort()
            for name in sorted(files):
                yield (Path(folder) / name).relative_to(self.path).as_posix()

    def delete(self, key: str) -> None:
        """Remove the object if it is there."""
        self.resolve(key).unlink(missing_ok=True)

    def put_new(self, key: str, data: bytes) -> bool:
        """Publish ``data`` unless the object exists. True if this call created it."""
        target = self.resolve(key)
        with self._scratch_file(data) as scratch:
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(scratch, target)
            except FileExistsError:
                return False
        _sync_folders(target.parent, self.path)
        return True

    def replace(self, key: str, data: bytes) -> None:
        """Publish ``data`` in place of whatever is there, in one step."""
        target = self.resolve(key)
        with self._scratch_file(data) as scratch:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(scratch, target)
        _sync_folders(target.parent, self.path)

    def compare_and_swap(self, key: str, expected: bytes | None, data: bytes) -> bool:
        """Replace the object if it still holds ``expected`` (None: if it does not exist). True if replaced."""
        lock_file = self.path / f".{self.resolve(key).name}.lock"
        self.path.mkdir(parents=True, exist_ok=True)
        # The kernel drops the lock with its process, so a killed holder blocks nobody.
        with lock_file.open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            current = self.get(key) if self.exists(key) else None
            if current != expected:
                return False
            self.replace(key, data)
            return True

    def sync(self, prefix: str) -> None:
        """Make files durable that a library wrote below ``prefix``, and their folders."""
        for key in self.list(prefix):
            with self.resolve(key).open("rb") as file:
                os.fsync(file.fileno())
            _sync_folders(self.resolve(key).parent, self.path)

    def clear_scratch(self) -> int:
        """Delete temporary files of dead writers; returns how many. A live writer that loses one simply fails."""
        leftovers = list((self.path / SCRATCH).glob("*"))
        for leftover in leftovers:
            leftover.unlink(missing_ok=True)
        return len(leftovers)

    @contextmanager
    def _scratch_file(self, data: bytes) -> Iterator[Path]:
        """A synced file with ``data`` on the same file system, outside everything that readers look at."""
        folder = self.path / SCRATCH
        folder.mkdir(parents=True, exist_ok=True)
        scratch = folder / uuid.uuid4().hex
        try:
            with scratch.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield scratch
        finally:
            scratch.unlink(missing_ok=True)


def _sync_folders(folder: Path, top: Path) -> None:
    """Make the directory entries durable from ``folder`` up to ``top``: parents may be new, too."""
    while True:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if folder == top or folder == folder.parent:
            return
        folder = folder.parent
