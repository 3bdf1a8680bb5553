"""A proxy before the S3 server that fails on demand: errors, delays, silence, connections cut before or after."""

import http.client
import math
import random
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, cast

SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


@dataclass(kw_only=True, slots=True)
class Fault:
    """What happens to some requests."""

    kind: Literal["status", "slow", "hang", "cut", "lose answer", "half answer"]
    """`status`: answered without reaching the server; `slow`: forwarded after `seconds`; `hang`: no answer, and not
    forwarded; `cut`: the connection closes, not forwarded; `lose answer`: forwarded, and the connection closes;
    `half answer`: half of an object comes back, and the connection closes."""
    requests: str = ""
    """Regular expression for `METHOD /bucket/key`; the default is all."""
    times: float = math.inf
    """How many requests it strikes."""
    share: float = 1.0
    """The part of the requests that it strikes, at random."""
    status: int = 503
    body: bytes = SLOW_DOWN
    echo: bool = False
    """Answer with all that the request said, as servers do to help with wrong signatures."""
    seconds: float = 0.0


class FaultProxy(ThreadingHTTPServer):
    """Forwards to a port of this machine whatever no fault strikes."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, target: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = target
        self.faults: list[Fault] = []
        self.struck = 0
        """Requests that met a fault."""
        self._fuse = 0
        self.closing = threading.Event()
        self._chance = random.Random(0)
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> "FaultProxy":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.shutdown()
        self._thread.join()
        self.server_close()

    @contextmanager
    def failing(self, *faults: Fault) -> Iterator[None]:
        """Let these faults strike, the first that matches a request, until the block ends."""
        self.struck, self.faults = 0, list(faults)
        try:
            yield
        finally:
            self.faults, self._fuse = [], 0

    def after(self, count: int, requests: str, fault: Fault) -> None:
        """From the ``count``-th of these requests on, let the fault strike every request, until the block ends."""
        self._fuse, self._fuse_requests, self._fuse_fault = count, requests, fault

    def next_fault(self, request: str) -> Fault | None:
        with self._lock:
            if self._fuse and re.search(self._fuse_requests, request):
                self._fuse -= 1
                if not self._fuse:
                    self.faults = [self._fuse_fault]
            for fault in self.faults:
                lucky = fault.share < 1 and self._chance.random() > fault.share
                if fault.times > 0 and re.search(fault.requests, request) and not lucky:
                    fault.times -= 1
                    self.struck += 1
                    return fault
            return None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that give up are part of the game."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def setup(self) -> None:
        super().setup()
        self._upstream = http.client.HTTPConnection("127.0.0.1", self._proxy.target)

    def finish(self) -> None:
        self._upstream.close()
        super().finish()

    @property
    def _proxy(self) -> FaultProxy:
        return cast(FaultProxy, self.server)

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self._proxy.next_fault(f"{self.command} {self.path.split('?')[0]}")
        match fault and fault.kind:
            case "status":
                assert fault is not None
                said = f"<Said>{self.path} {self.headers}</Said>".encode() if fault.echo else b""
                self._answer(fault.status, [("Content-Type", "application/xml")], fault.body + said)
                return
            case "hang":
                self._proxy.closing.wait(120)
                self._cut()
                return
            case "cut":
                self._cut()
                return
            case "slow":
                assert fault is not None
                time.sleep(fault.seconds)
        self._upstream.request(self.command, self.path, body, dict(self.headers.items()))
        response = self._upstream.getresponse()
        data = response.read()
        if fault is not None and fault.kind == "lose answer":
            self._cut()
            return
        half = fault is not None and fault.kind == "half answer" and response.status == 200
        self._answer(response.status, response.getheaders(), data, sent=len(data) // 2 if half else None)
        if half:
            self._cut()

    do_PUT = do_POST = do_DELETE = do_HEAD = do_GET

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, sent: int | None = None) -> None:
        self.send_response_only(status)
        length = None
        for name, value in headers:
            if name.lower() == "content-length":
                length = value
            elif name.lower() not in ("transfer-encoding", "connection"):
                self.send_header(name, value)
        # The answer to HEAD tells the length of what it does not send.
        self.send_header("Content-Length", length if self.command == "HEAD" and length else str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:sent])
        self.wfile.flush()

    def _cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Silence."""
