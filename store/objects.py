"""Atomic, durable objects in a folder: what the commit protocol rests on, whatever the storage is.

An object appears whole or not at all. ``put_new`` is put-if-absent: of several writers exactly one wins.
``compare_and_swap`` replaces only what its caller has seen, so a writer that slept through a takeover and wakes
up replaces nothing of its successor's.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from zarr.abc.store import Store

SCRATCH = ".tmp"
"""Where unfinished objects of live or dead writers lie. Readers never look there."""
LOCK = ".lock"
_KEY = re.compile(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*")


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectInfo:
    """One entry of a listing."""

    key: str
    bytes: int
    modified: float
    """Unix seconds, by the storage's clock."""


class Folder(Protocol):
    """Objects under one URL, named by slash-separated keys. Picklable; holds no connection and no credentials.

    Every method raises StorageError, with what to do, where the storage refuses or fails.
    """

    @property
    def url(self) -> str:
        """Where the folder is, for people and for ``open_folder``."""

    @property
    def name(self) -> str:
        """Last part of the URL."""

    def child(self, name: str) -> "Folder":
        """The folder ``name`` inside this one."""

    def children(self) -> list[str]:
        """Names of the folders directly inside this one, sorted."""

    def get(self, key: str) -> bytes:
        """Bytes of the object. Raises FileNotFoundError."""

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Some bytes of the object; fewer where it ends. Raises FileNotFoundError."""

    def get_tail(self, key: str, length: int) -> bytes:
        """The last bytes of the object. Raises FileNotFoundError."""

    def exists(self, key: str) -> bool:
        """Whether the object is there."""

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """All objects in the folder ``prefix`` and below, sorted by key; scratch files and locks included."""

    def put_new(self, key: str, data: bytes) -> bool:
        """Publish ``data`` unless the object exists. True if this call created it."""

    def replace(self, key: str, data: bytes) -> None:
        """Publish ``data`` in place of whatever is there, in one step."""

    def compare_and_swap(self, key: str, expected: bytes | None, data: bytes) -> bool:
        """Replace the object if it still holds ``expected`` (None: if it does not exist). True if it now holds
        ``data``."""

    def delete(self, key: str) -> None:
        """Remove the object if it is there."""

    def sync(self, prefix: str) -> None:
        """Make durable what a library wrote below ``prefix``."""

    def clear_scratch(self) -> int:
        """Delete unfinished objects of dead writers; returns how many.

        A live writer that loses one fails, but for a `compare_and_swap`, which is waited for.
        """

    def zarr_store(self, prefix: str, *, read_only: bool = True) -> Store:
        """The folder ``prefix`` as a Zarr store."""


def check_key(key: str) -> str:
    """The key. Raises ValueError for one that could leave the folder."""
    if not _KEY.fullmatch(key) or any(part in (".", "..") for part in key.split("/")):
        raise ValueError(f"{key!r} is not an object key: use letters, digits, '.', '_', '-' between slashes")
    return key


def check_prefix(prefix: str) -> str:
    """The prefix, which may be empty. Raises ValueError for one that could leave the folder."""
    return check_key(prefix) if prefix else prefix
