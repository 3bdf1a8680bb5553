"""The kinds of storage that the store's tests run on: local disk, what NFS makes of it, and S3."""

import errno
import itertools
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import pytest

from personaspace.store import local
from personaspace.store.local import LocalFolder
from personaspace.store.objects import Folder, ObjectInfo
from personaspace.store.remote import RemoteFolder

BUCKET = "personaspace"
ROOT = Path(__file__).parents[2]
PROCESSES = multiprocessing.get_context("forkserver")
"""Not forked from here: a fork has the threads of obstore's runtime on paper only."""
PROCESSES.set_forkserver_preload(["dask.array", "distributed", "pyarrow.dataset", "tests.store.observer"])

LOCAL_FIRST = pytest.mark.parametrize(
    "storage",
    ["local", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("nfs", "s3"))],
    indirect=True,
)
"""For tests that take long on the other kinds."""


class S3Server:
    """An S3 server in a process of its own, with a bucket."""

    def __init__(self) -> None:
        self.port = free_port()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.store.s3_server", str(self.port)], cwd=ROOT, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while not _answers(self.port):
            assert self._process.poll() is None, "the S3 server ended; run `python -m tests.store.s3_server 5000`"
            assert time.monotonic() < deadline, "the S3 server does not answer"
            time.sleep(0.05)
        boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{self.port}",
            region_name="us-east-1",
            aws_access_key_id="nobody",
            aws_secret_access_key="nothing",
        ).create_bucket(Bucket=BUCKET)

    def __enter__(self) -> "S3Server":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()


def s3_environment(port: int) -> dict[str, str]:
    """What a user sets to work with an S3 server of his own."""
    return {
        "AWS_ACCESS_KEY_ID": "AKIAFAKEFAKEFAKEFAKE",
        "AWS_SECRET_ACCESS_KEY": "fake/secret+access/key",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
    }


def fresh_s3() -> RemoteFolder:
    """A folder in the bucket that nobody has used: connections are kept by URL."""
    return RemoteFolder(f"s3://{BUCKET}/{uuid.uuid4().hex}/run")


class NfsFolder(LocalFolder):
    """Files as NFS has them: replies get lost, and deleted files that somebody reads live on as `.nfs...`."""

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return open_nfs, (self.path,)

    def child(self, name: str) -> "NfsFolder":
        return NfsFolder(super().child(name).path)

    def put_new(self, key: str, data: bytes) -> bool:
        created = super().put_new(key, data)
        self._rename_silly(key)
        return created

    def replace(self, key: str, data: bytes) -> None:
        super().replace(key, data)
        self._rename_silly(key)

    def _rename_silly(self, key: str) -> None:
        count = next(_COUNT)
        if key.startswith(("commits/", "rollouts/")) and count % 2:
            self.resolve(key).with_name(f".nfs{os.getpid():012x}{count:012x}").write_bytes(b"deleted, but still open")


class _LossyOs:
    """The module `os` over a network that loses every third reply to a link; its repetition finds the file there."""

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def link(self, source: Path, target: Path) -> None:
        os.link(source, target)
        if next(_COUNT) % 3 == 0:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))


_COUNT = itertools.count()
LOSSY_OS: Any = _LossyOs()


def open_nfs(path: Path) -> NfsFolder:
    """A folder on NFS. From here on all links of this process's `local` go over the lossy network."""
    local.os = LOSSY_OS
    return NfsFolder(path)


def objects(folder: Folder, prefix: str = "") -> list[ObjectInfo]:
    """A listing without the files that are no objects: scratch files, lock, and NFS's own."""
    return [
        entry
        for entry in folder.list(prefix)
        if not entry.key.startswith((".tmp/", ".lock")) and not entry.key.split("/")[-1].startswith(".nfs")
    ]


def contents(folder: Folder, *, but: tuple[str, ...] = ()) -> dict[str, bytes]:
    """Key -> bytes of all objects, but those whose keys begin in one of these ways."""
    return {entry.key: folder.get(entry.key) for entry in objects(folder) if not entry.key.startswith(but)}


def in_processes(task: Callable[..., Any], count: int, *arguments: Any) -> list[Any]:
    """``task(index, *arguments)`` in processes that begin at the same moment; their answers, by index."""
    barrier, answers = PROCESSES.Barrier(count), PROCESSES.Queue()
    processes = [
        PROCESSES.Process(target=_answer, args=(dict(os.environ), barrier, answers, task, index, arguments))
        for index in range(count)
    ]
    for process in processes:
        process.start()
    collected = dict(answers.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    failed = [answer for answer in collected.values() if isinstance(answer, Exception)]
    if failed:
        raise failed[0]
    return [collected[index] for index in range(count)]


def _answer(
    environment: Mapping[str, str], barrier: Any, answers: Any, task: Callable[..., Any], index: int, arguments: Any
) -> None:
    settle(environment)
    barrier.wait(30)
    try:
        answers.put((index, task(index, *arguments)))
    except Exception as error:  # Whatever it is, the test has to see it.
        answers.put((index, error))


@contextmanager
def background(task: Callable[..., None], *arguments: Any) -> Iterator[Any]:
    """``task(*arguments)`` in a process that is killed at the end of the block."""
    process = PROCESSES.Process(target=_run, args=(dict(os.environ), task, arguments))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def _run(environment: Mapping[str, str], task: Callable[..., None], arguments: Any) -> None:
    settle(environment)
    task(*arguments)


def settle(environment: Mapping[str, str]) -> None:
    """Begin a child of the fork server, which knows nothing of what a test has set since it started."""
    os.environ.update(environment)
    # The locks that numcodecs makes have names otherwise, which a killed process leaves behind.
    multiprocessing.set_start_method("fork", force=True)


def in_threads(task: Callable[[int], Any], count: int) -> list[Any]:
    """``task(index)`` in threads that begin at the same moment; their answers."""
    barrier = threading.Barrier(count)

    def run(index: int) -> Any:
        barrier.wait(30)
        return task(index)

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(run, range(count)))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
