"""Objects as files: a POSIX file system, local or shared (NFS, Lustre)."""

import errno
import fcntl
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from zarr.storage import LocalStore

from personaspace.store.errors import StorageError
from personaspace.store.objects import LOCK, SCRATCH, ObjectInfo, check_key, check_prefix

LOCK_PATIENCE = 30.0
"""Seconds to wait for another writer's compare-and-swap, which takes milliseconds."""

_ADVICE = {
    errno.ENOSPC: "The disk is full: free some space",
    errno.EDQUOT: "The quota is used up: free some space",
    errno.EROFS: "The file system is read-only: choose another --store.root, or remount it",
    errno.EACCES: "Permission denied: make the folder writable for this user, or choose another --store.root",
    errno.EPERM: "Not permitted: the file system needs hard links and must be writable for this user",
    errno.ENOTSUP: "Not supported here: the file system needs hard links",
}


@dataclass(frozen=True, slots=True)
class LocalFolder:
    """A folder of files; the ``Folder`` of local and network file systems."""

    path: Path

    @property
    def url(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        return self.path.name

    def child(self, name: str) -> "LocalFolder":
        return LocalFolder(self.path / check_key(name))

    def children(self) -> list[str]:
        with self._explained("listing", ""):
            try:
                return sorted(entry.name for entry in os.scandir(self.path) if entry.is_dir())
            except FileNotFoundError:
                return []

    def resolve(self, key: str) -> Path:
        """File of ``key``."""
        return self.path / check_key(key)

    def get(self, key: str) -> bytes:
        with self._explained("reading", key):
            try:
                return self.resolve(key).read_bytes()
            except IsADirectoryError as error:
                raise FileNotFoundError(self.resolve(key)) from error  # A folder is no object.

    def get_range(self, key: str, start: int, length: int) -> bytes:
        with self._opened(key) as descriptor:
            return os.pread(descriptor, length, start)

    def get_tail(self, key: str, length: int) -> bytes:
        with self._opened(key) as descriptor:
            return os.pread(descriptor, length, max(0, os.fstat(descriptor).st_size - length))

    def exists(self, key: str) -> bool:
        with self._explained("reading", key):
            return self.resolve(key).is_file()

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        with self._explained("listing", check_prefix(prefix)):
            yield from self._walk(os.path.join(self.path, prefix) if prefix else str(self.path), prefix)

    def _walk(self, folder: str, prefix: str) -> Iterator[ObjectInfo]:
        """What lies below a folder, in the order of the keys; nothing if the folder is gone."""
        try:
            with os.scandir(folder) as found:
                entries = {f"{entry.name}/" if entry.is_dir() else entry.name: entry for entry in found}
        except (FileNotFoundError, NotADirectoryError):
            return
        for name, entry in sorted(entries.items()):
            key = f"{prefix}/{name}" if prefix else name
            if name.endswith("/"):
                yield from self._walk(entry.path, key.rstrip("/"))
                continue
            try:
                stat = entry.stat()
            except FileNotFoundError:
                continue  # A scratch file that its writer has just removed.
            yield ObjectInfo(key=key, bytes=stat.st_size, modified=stat.st_mtime)

    def delete(self, key: str) -> None:
        with self._explained("deleting", key):
            target = self.resolve(key)
            target.unlink(missing_ok=True)
            # Object stores know no empty folders; neither should a listing of these.
            for folder in target.relative_to(self.path).parents:
                try:
                    (self.path / folder).rmdir()
                except OSError:
                    break  # Not empty.
                _durable.discard(str(self.path / folder))

    def put_new(self, key: str, data: bytes) -> bool:
        target = self.resolve(key)
        with self._explained("writing", key), self._scratch_file(data) as scratch:
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(scratch, target)
            except FileExistsError:
                # Over NFS the reply to a link that worked can get lost, and its repetition fails.
                if scratch.stat().st_nlink < 2:
                    return False
            _sync_folders(target.parent, self.path)
            return True

    def replace(self, key: str, data: bytes) -> None:
        target = self.resolve(key)
        with self._explained("writing", key), self._scratch_file(data) as scratch:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(scratch, target)
            _sync_folders(target.parent, self.path)

    def compare_and_swap(self, key: str, expected: bytes | None, data: bytes) -> bool:
        self.resolve(key)
        with self._locked(key):
            current = self.get(key) if self.exists(key) else None
            if current != expected:
                return current == data
            self.replace(key, data)
            return True

    def sync(self, prefix: str) -> None:
        with self._explained("writing", prefix):
            for entry in self.list(prefix):
                with self.resolve(entry.key).open("rb") as file:
                    os.fsync(file.fileno())
                _sync_folders(self.resolve(entry.key).parent, self.path)

    def clear_scratch(self) -> int:
        scratch = self.path / SCRATCH
        if not scratch.is_dir():
            return 0
        # A lease is kept alive meanwhile, and what it writes passes through here.
        with self._locked(SCRATCH):
            leftovers = list(scratch.glob("*"))
            for leftover in leftovers:
                leftover.unlink(missing_ok=True)
            with suppress(OSError):
                scratch.rmdir()
        return len(leftovers)

    def zarr_store(self, prefix: str, *, read_only: bool = True) -> LocalStore:
        return LocalStore(self.resolve(prefix), read_only=read_only)

    @contextmanager
    def _opened(self, key: str) -> Iterator[int]:
        """Descriptor of a file that is read in parts."""
        with self._explained("reading", key), self.resolve(key).open("rb", buffering=0) as file:
            # Without this the kernel reads ahead, and one layer costs the disk the whole shard.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            yield file.fileno()

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

    @contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        """Hold the folder's lock. The kernel drops it with its process, so a killed holder blocks nobody."""
        with self._explained("locking for", key):
            self.path.mkdir(parents=True, exist_ok=True)
            with (self.path / LOCK).open("wb") as lock:
                until = time.monotonic() + LOCK_PATIENCE
                while True:
                    try:
                        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    except BlockingIOError:
                        if time.monotonic() > until:
                            raise StorageError(
                                f"{self.path / LOCK}: held by another process for {LOCK_PATIENCE:.0f} s; it was "
                                "probably stopped while it wrote. Let it go on, or kill it."
                            ) from None
                        time.sleep(0.01)
                yield

    @contextmanager
    def _explained(self, doing: str, key: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            advice = _ADVICE.get(error.errno or 0, f"{error.strerror}: check the disk or its server")
            where = self.path / key if key else self.path
            raise StorageError(
                f"{where}: {doing} it failed. {advice}. What is committed is safe; the same command resumes."
            ) from error


_durable: set[str] = set()
"""Folders whose own entries this process has made durable."""


def _sync_folders(folder: Path, top: Path) -> None:
    """Make a new entry of ``folder`` durable, and the entries of all folders from there up to ``top``.

    Parents may be new, too, by this process or another; each is synced once by every process that writes in it.
    """
    while True:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        known = str(folder) in _durable
        _durable.add(str(folder))
        if known or folder in (top, folder.parent):
            return
        folder = folder.parent
