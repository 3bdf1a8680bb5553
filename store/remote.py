"""Objects in an object store: S3, Google Cloud Storage, Azure and what speaks their protocols, through obstore.

Credentials come from the environment, or from the cloud SDK's own files; they are never part of this object, of
a URL, or of a message.
"""

import importlib.util
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
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
            except FileNotFoundError:
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
                # One request, since a multipart upload can't be conditional.
                obstore.put(self._store, key, data, mode="create", use_multipart=False)
            except AlreadyExistsError:
                return False
            return True

    def replace(self, key: str, data: bytes) -> None:
        with self._explained("writing", check_key(key)):
            obstore.put(self._store, key, data, use_multipart=False)

    def compare_and_swap(self, key: str, expected: bytes | None, data: bytes) -> bool:
        with self._explained("writing", check_key(key)):
            try:
                found = obstore.get(self._store, key)
                current: bytes | None = bytes(found.bytes())
            except FileNotFoundError:
                current = None
            if current != expected:
                return current == data
            try:
                if current is None:
                    obstore.put(self._store, key, data, mode="create", use_multipart=False)
                else:
                    seen = {"e_tag": found.meta["e_tag"], "version": found.meta["version"]}
                    version: Any = {name: value for name, value in seen.items() if value is not None}
                    obstore.put(self._store, key, data, mode=version, use_multipart=False)
            except (AlreadyExistsError, PreconditionError, FileNotFoundError):
                # A repeated request finds what its first attempt wrote, when only the answer was lost.
                try:
                    return bytes(obstore.get(self._store, key).bytes()) == data
                except FileNotFoundError:
                    return False
            return True

    def sync(self, prefix: str) -> None:
        """Nothing to do: an object store answers when the object is durable."""

    def clear_scratch(self) -> int:
        """Nothing to do: an upload in one request leaves nothing behind."""
        return 0

    def zarr_store(self, prefix: str, *, read_only: bool = True) -> ObjectStore[Any]:
        with self._explained("opening", check_key(prefix)):
            return ObjectStore(_connect(f"{self.url}/{prefix}", os.getpid()), read_only=read_only)

    @property
    def _store(self) -> Any:
        return _connect(self.url, os.getpid())

    @contextmanager
    def _explained(self, doing: str, key: str) -> Iterator[None]:
        where = f"{self.url}/{key}" if key else self.url
        try:
            yield
        except FileNotFoundError as error:
            raise FileNotFoundError(where) from error
        except (BaseError, OSError, ValueError) as error:
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


@lru_cache(maxsize=256)
def _connect(url: str, _pid: int) -> Any:
    """The store of a URL, one connection pool for each process: a forked child can't use its parent's."""
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
            "allow_http": plain or os.environ.get("AWS_ALLOW_HTTP", "").lower() == "true",
        },
        retry_config={"max_retries": 10, "retry_timeout": RETRY_TIMEOUT},
        **options,
    )
