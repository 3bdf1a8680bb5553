"""Storage that is away for a moment is waited for, and a run notices nothing of it."""

import logging
import pickle
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from personaspace.store.errors import StorageError
from personaspace.store.local import LocalFolder
from personaspace.store.objects import Folder
from personaspace.store.patience import PatientFolder


@contextmanager
def read_only(disk: Path, seconds: float) -> Iterator[None]:
    """The disk can't be written to from now on, for so long."""
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    back = threading.Timer(seconds, subprocess.run, [["mount", "-o", "remount,rw", str(disk)]], {"check": True})
    back.start()
    try:
        yield
    finally:
        back.join()


def test_every_operation_waits_for_a_disk_that_comes_back(disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder: Folder = PatientFolder(LocalFolder(disk / "run"), 30)
    folder.replace("old", b"1")
    with read_only(disk, 1):
        start = time.monotonic()
        assert folder.put_new("new", b"data")
        assert time.monotonic() - start > 0.5
    with read_only(disk, 1):
        assert folder.compare_and_swap("old", b"1", b"2")
    with read_only(disk, 1):
        folder.delete("new")
    assert [(entry.key, folder.get(entry.key)) for entry in folder.list() if entry.key != ".lock"] == [("old", b"2")]
    assert re.fullmatch(
        r"\S+/new: writing it failed\. The file system is read-only: .* Trying again for (29|30) s\.",
        caplog.records[0].message,
    )
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


def test_the_error_comes_through_in_the_end(disk: Path) -> None:
    folder = PatientFolder(LocalFolder(disk / "run"), 0.5)
    with read_only(disk, 2):
        start = time.monotonic()
        with pytest.raises(StorageError, match="The file system is read-only"):
            folder.put_new("new", b"data")
        assert 0.5 <= time.monotonic() - start < 2


def test_it_is_the_folder_that_it_waits_for(tmp_path: Path) -> None:
    plain = LocalFolder(tmp_path / "runs")
    folder = pickle.loads(pickle.dumps(PatientFolder(plain, 1)))
    assert (folder.url, folder.name) == (plain.url, plain.name)
    folder.child("a").put_new("b/c", b"0123")
    assert folder.children() == ["a"]
    assert folder.get_range("a/b/c", 1, 2) == b"12"
    assert folder.get_tail("a/b/c", 1) == b"3"
    assert folder.exists("a/b/c")
    with pytest.raises(FileNotFoundError):
        folder.get("nowhere")
