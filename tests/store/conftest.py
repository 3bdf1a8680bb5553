"""Storages for the store's tests."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from personaspace.store import local
from personaspace.store.local import LocalFolder
from personaspace.store.objects import Folder
from personaspace.store.remote import RemoteFolder
from tests.store.fault_proxy import FaultProxy
from tests.store.storages import LOSSY_OS, NfsFolder, S3Server, fresh_s3, s3_environment


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """An S3 server with a bucket."""
    with S3Server() as server:
        yield server


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> RemoteFolder:
    """A fresh folder in the bucket, with the environment that it takes."""
    for name, value in s3_environment(s3_server.port).items():
        monkeypatch.setenv(name, value)
    return fresh_s3()


@pytest.fixture
def proxy(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """The S3 server behind a proxy that fails on demand, and the environment to reach it."""
    with FaultProxy(s3_server.port) as proxy:
        for name, value in s3_environment(proxy.server_port).items():
            monkeypatch.setenv(name, value)
        yield proxy


@pytest.fixture(params=["local", "nfs", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    """A fresh folder on each kind of storage."""
    if request.param == "s3":
        folder: RemoteFolder = request.getfixturevalue("s3")
        return folder
    if request.param == "local":
        return LocalFolder(tmp_path / "run")
    monkeypatch.setattr(local, "os", LOSSY_OS)
    return NfsFolder(tmp_path / "run")


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A folder that every user may enter, as pytest's own are not."""
    with tempfile.TemporaryDirectory() as path:
        os.chmod(path, 0o755)
        yield Path(path)


@pytest.fixture
def disk(open_place: Path) -> Iterator[Path]:
    """A file system of 512 kB."""
    place = open_place / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k,mode=777", "tmpfs", str(place)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"NOT TESTED: disks that are full or read-only, since this user may not mount: {done.stderr}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
