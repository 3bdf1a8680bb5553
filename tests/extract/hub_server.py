"""A server on this machine that speaks what huggingface_hub asks of the hub: model info, and files with ranges."""

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

COMMIT = "c0ffee" + "0" * 34
REPOSITORY = "somebody/tiny-model"
BUFFER = 8192


class HubServer(ThreadingHTTPServer):
    """Serves ``folder`` as the only commit of REPOSITORY, and counts."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.asked: Counter[str] = Counter()
        """File -> HEAD requests."""
        self.served: Counter[str] = Counter()
        """File -> GET requests."""
        self.sent: Counter[str] = Counter()
        """File -> bytes sent."""
        self.disturb: Callable[[str, int], bool] = lambda name, position: False
        """Called before each piece of a file; true cuts the connection there."""
        self.changed = threading.Condition()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def count(self, counter: Counter[str], name: str, number: int = 1) -> None:
        with self.changed:
            counter[name] += number
            self.changed.notify_all()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, timeout=120)

    def weights(self) -> dict[str, int]:
        """Times that files with weights were asked for by GET."""
        return {name: times for name, times in self.served.items() if re.search(r"\.(safetensors|bin)$", name)}

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_HEAD(self) -> None:
        if (file := self._file()) is not None:
            self.server.count(self.server.asked, file.name)
            self._headers(file, 200, file.stat().st_size)

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if re.fullmatch(rf"/api/models/{REPOSITORY}(/revision/[^/]+)?", path):
            self._json({"id": REPOSITORY, "modelId": REPOSITORY, "sha": COMMIT, "siblings": self._siblings()})
        elif re.fullmatch(rf"/api/models/{REPOSITORY}/tree/[^/]+", path):
            self._json([{"type": "file", "path": s["rfilename"], "oid": s["blobId"], **s} for s in self._siblings()])
        elif (file := self._file()) is not None:
            self._send(file)

    def _send(self, file: Path) -> None:
        self.server.count(self.server.served, file.name)
        content = file.read_bytes()
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(found[1]) if found else 0
        self._headers(file, 206 if found else 200, len(content) - start)
        for position in range(start, len(content), BUFFER):
            if self.server.disturb(file.name, position):
                self.close_connection = True
                return
            piece = content[position : position + BUFFER]
            self.wfile.write(piece)
            self.server.count(self.server.sent, file.name, len(piece))

    def _siblings(self) -> list[dict[str, Any]]:
        files = sorted(self.server.folder.iterdir())
        return [{"rfilename": file.name, "blobId": _etag(file), "size": file.stat().st_size} for file in files]

    def _json(self, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _file(self) -> Path | None:
        found = re.fullmatch(rf"/{REPOSITORY}/resolve/({COMMIT}|main)/([\w.-]+)", self.path)
        if found and (file := self.server.folder / found[2]).is_file():
            return file
        self.send_response(404)
        self.send_header("X-Error-Code", "EntryNotFound" if found else "RepoNotFound")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()
        return None

    def _headers(self, file: Path, status: int, length: int) -> None:
        self.send_response(status)
        self.send_header("ETag", f'"{_etag(file)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(length))
        if status == 206:
            size = file.stat().st_size
            self.send_header("Content-Range", f"bytes {size - length}-{size - 1}/{size}")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Quiet."""


def _etag(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
