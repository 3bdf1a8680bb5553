"""Objects in an object store: S3, Google Cloud Storage, Azure and what speaks their protocols, through obstore.

Credentials come from the environment, or from the cloud SDK's own files; they are never part of this object, of
a URL, or of a message.
"""

import importlib.util
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, GenericError, PreconditionError
from obstore.store import from_url
from zarr.storage import ObjectStore

from personaspace.store.errors import InputError, StorageError
from personaspace.store.objects import ObjectInfo, check_key, check_prefix

SCHEMES = ("s3", "gs", "az", "abfs", "abfss")
RETRY_TIMEOUT = timedelta(seconds=120)
"""How long a request is repeated, with growing pauses, while the server fails or does not answer."""
REQUEST_TIMEOUT = timedelta(seconds=60)
_SECRET_NAME = re.compile(r"KEY|SECRET|TOKEN|PASSWORD|CREDENTIAL|SAS|SIGNATURE", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class RemoteFolder:
    """Objects below a prefix of a bucket; the ``Folder`` of object stores."""

    url: str
    """Such as ``s3://bucket/runs/demo``, without a slash at the end."""

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]

    def child(self, name: str) -> "RemoteFolder":
        return RemoteFolder(f"{self.url}/{check_key(name)}")

    def children(self) -> list[str]:
        with self._explained("listing", ""):
            return sorted(prefix.rstrip("/") for prefix in obstore.list_with_delimiter(self._store)["common_prefixes"])

    def get(self, key: str) -> bytes:
        with self._explained("reading", check_key(key)):
            return bytes(obstore.get(self._store, key).bytes())

    def get_range(self, key: str, start: int, length: int) -> bytes:
        with self._explained("reading", check_key(key)):
            return bytes(obstore.get_range(self._store, key, start=start, length=length))

    def get_tail(self, key: str, length: int) -> bytes:
        with self._explained("reading", check_key(key)):
            return bytes(obstore.get(self._store, key, options={"range": {"suffix": length}}).bytes())

    def exists(self, key: str) -> bool:
        with self._explained("reading", check_key(key)):
            try:
                obstore.head(self._store, key)
            except FileNotFoundError as error:
                if _is_missing_place(error):
                    raise
                return False
            return True

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        with self._explained("listing", check_prefix(prefix)):
            found = [entry for page in obstore.list(self._store, prefix or None) for entry in page]
        for entry in sorted(found, key=lambda entry: entry["path"]):
            yield ObjectInfo(key=entry["path"], bytes=entry["size"], modified=entry["last_modified"].timestamp())

    def delete(self, key: str) -> None:
        with self._explained("deleting", check_key(key)):
            try:
                obstore.delete(self._store, key)
            except FileNotFoundError:
                return

    def put_new(self, key: str, data: bytes) -> bool:
        with self._explained("writing", check_key(key)):
            try:
                self._put(key, data, "create")
            except AlreadyExistsError:
                return False
            return True

    def replace(self, key: str, data: bytes) -> None:
        with self._explained("writing", check_key(key)):
            self._put(key, data, "overwrite")

    def compare_and_swap(self, key: str, expected: bytes | None, data: bytes) -> bool:
        with self._explained("writing", check_key(key)):
            current, version = self._read(key)
            if current != expected:
                return current == data
            try:
                self._put(key, data, "create" if version is None else version)
            except (AlreadyExistsError, PreconditionError, FileNotFoundError) as error:
                if _is_missing_place(error):
                    raise
                # A repeated request finds what its first attempt wrote, when only the answer was lost.
                return self._read(key)[0] == data
            return True

    def _read(self, key: str) -> tuple[bytes | None, dict[str, str] | None]:
        """Content and version of an object; None twice where there is none."""
        try:
            found = obstore.get(self._store, key)
        except FileNotFoundError as error:
            if _is_missing_place(error):
                raise
            return None, None
        seen = {"e_tag": found.meta["e_tag"], "version": found.meta["version"]}
        return bytes(found.bytes()), {name: value for name, value in seen.items() if value is not None}

    def _put(self, key: str, data: bytes, mode: Any) -> None:
        """Write in one request, since a multipart upload can't be conditional; repeat it if no answer comes."""
        until = time.monotonic() + RETRY_TIMEOUT.total_seconds()
        while True:
            try:
                obstore.put(self._store, key, data, mode=mode, use_multipart=False)
            except GenericError as error:
                # obstore repeats what failed, but not a conditional request that was never answered.
                if "timedout" not in str(error).lower().replace(" ", "") or time.monotonic() > until:
                    raise
            else:
                return

    def sync(self, prefix: str) -> None:
        """Nothing to do: an object store answers when the object is durable."""

    def clear_scratch(self) -> int:
        """Nothing to do: an upload in one request leaves nothing behind."""
        return 0

    def zarr_store(self, prefix: str, *, read_only: bool = True) -> ObjectStore[Any]:
        with self._explained("opening", check_key(prefix)):
            return ObjectStore(RemoteFolder(f"{self.url}/{prefix}")._store, read_only=read_only)

    @property
    def _store(self) -> Any:
        if _forked:
            raise OSError(
                "this process was forked from one that uses the object store; start it by spawn or forkserver"
            )
        return _connect(self.url)

    @contextmanager
    def _explained(self, doing: str, key: str) -> Iterator[None]:
        where = f"{self.url}/{key}" if key else self.url
        try:
            yield
        except (BaseError, OSError, ValueError) as error:
            if isinstance(error, FileNotFoundError) and doing == "reading" and not _is_missing_place(error):
                raise FileNotFoundError(where) from None
            raise StorageError(
                f"{where}: {doing} it failed: {redact(str(error))} Check URL, credentials and network (for S3: "
                "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL in the environment of every "
                "node). What is committed is safe; the same command resumes."
            ) from None  # The cause's own text may hold what the message must not.


def check_url(url: str) -> str:
    """The URL, without a slash at its end. Raises InputError for one that is unknown or carries credentials."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise InputError(f"{url.split('@')[-1]}: not a URL: {error}.") from error
    if ("@" in parts.netloc and parts.scheme not in ("abfs", "abfss")) or ":" in parts.netloc.split("@")[0]:
        raise InputError(
            f"{parts.scheme}://...: the URL carries credentials. They belong into the environment "
            "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for S3) or the cloud SDK's own files."
        )
    if parts.query or parts.fragment:
        raise InputError(f"{parts.scheme}://{parts.netloc}{parts.path}?...: the URL must end with the path.")
    if parts.scheme not in SCHEMES or not parts.netloc:
        allowed = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise InputError(f"{url}: not a storage that is known; give a local path, or a URL of {allowed}.")
    for part in parts.path.split("/"):
        if part in (".", ".."):
            raise InputError(f"{url}: {part!r} has no meaning in an object store; give the path itself.")
    return url.rstrip("/")


def _is_missing_place(error: Exception) -> bool:
    """Whether it is the bucket that is missing, and not an object in it."""
    return any(code in str(error) for code in ("NoSuchBucket", "ContainerNotFound"))


def redact(message: str) -> str:
    """First paragraph of a message, without queries of URLs and without secrets that the environment holds."""
    text = message.split("\n\nDebug source", 1)[0]
    text = re.sub(r"\?[^\s\"'>]+", "?...", text)
    text = re.sub(
        r"<(AWSAccessKeyId|StringToSign\w*|SignatureProvided|CanonicalRequest\w*)>.*?</\1>", "", text, flags=re.S
    )
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= 6:
            text = text.replace(value, "***")
    return " ".join(text.split())


_forked = False
"""This process was forked from one that had connections: its requests would wait for threads that it does not have."""


def _note_fork() -> None:
    global _forked
    _forked = _connect.cache_info().currsize > 0


os.register_at_fork(after_in_child=_note_fork)


@lru_cache(maxsize=256)
def _connect(url: str) -> Any:
    """The store of a URL, with its connection pool."""
    options: dict[str, Any] = {}
    sdk_files = importlib.util.find_spec("boto3") is not None and "AWS_ACCESS_KEY_ID" not in os.environ
    if url.startswith("s3://") and sdk_files:
        from obstore.auth.boto3 import Boto3CredentialProvider

        options["credential_provider"] = Boto3CredentialProvider()
    endpoints = (os.environ.get(name, "") for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"))
    # Options given here replace those of the environment, so an endpoint without TLS has to be allowed here, too.
    plain = any(endpoint.startswith("http://") for endpoint in endpoints)
    return from_url(
        url,
        client_options={
            "timeout": REQUEST_TIMEOUT,
            "connect_timeout": timedelta(seconds=10),
            "allow_http": plain
            or any(os.environ.get(f"{cloud}_ALLOW_HTTP", "").lower() == "true" for cloud in ("AWS", "AZURE")),
        },
        retry_config={"max_retries": 10, "retry_timeout": RETRY_TIMEOUT},
        **options,
    )
