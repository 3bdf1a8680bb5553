"""A server with OpenAI's `/v1/completions` on loopback, answered by a real engine, that misbehaves on command."""

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

from personaspace.extract.chat import ChatFormat
from personaspace.extract.config import GenerateConfig
from personaspace.extract.generate.engine import Engine

FIELDS = {"model", "prompt", "max_tokens", "temperature", "top_p", "seed", "stop"}
"""Of a request that every server knows."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What becomes of one request instead of an answer."""

    status: int = 200
    body: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    hang: float = 0.0
    """Seconds before it answers."""


Change = Callable[[dict[str, Any]], dict[str, Any]]
"""From a right answer to a wrong one."""


class CompletionsServer:
    """Serves an engine as ``name``; a context manager.

    `tells_ids`: as vLLM does, where asked. `takes_ids`: prompts may be token ids. `strict`: fields that not every
    server knows are refused. `counts`: it tells how many tokens there were. `bos`: it reads one token more, as servers
    do that put another BOS before the text of a prompt. ``faults`` are met one after the other, by requests for more
    than one token.
    """

    def __init__(
        self,
        engine: Engine,
        chat: ChatFormat,
        *,
        name: str = "tiny",
        tells_ids: bool = True,
        takes_ids: bool = True,
        strict: bool = False,
        counts: bool = True,
        bos: int = 0,
        end: int = 2,
        key: str | None = None,
    ) -> None:
        self._engine, self._chat = engine, chat
        self.name, self.models = name, [name]
        self._tells_ids, self._takes_ids, self._strict, self._counts, self._bos = (
            tells_ids,
            takes_ids,
            strict,
            counts,
            bos,
        )
        self._end, self._key = end, key
        self._lock = threading.Lock()
        self.faults: deque[Fault | Change] = deque()
        self.requests: list[dict[str, Any]] = []
        """Bodies of all requests for completions."""
        self.busiest = 0
        """Requests that were on their way at once."""
        self._now = 0

    def __enter__(self) -> "CompletionsServer":
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    @property
    def asked(self) -> list[dict[str, Any]]:
        """Requests for more than the one token of a probe."""
        return [body for body in self.requests if body["max_tokens"] > 1]

    def answer(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and document."""
        if self._strict and (unknown := sorted(body.keys() - FIELDS)):
            return 422, {"error": {"message": f"unknown fields {unknown}"}}
        if body["model"] not in self.models:
            return 404, {"error": {"message": f"no model {body['model']}"}}
        prompt = body["prompt"]
        if not isinstance(prompt, str) and not self._takes_ids:
            return 400, {"error": {"message": "prompt must be a string."}}
        ids = self._chat.encode_text(prompt) if isinstance(prompt, str) else prompt
        settings = GenerateConfig(
            max_new_tokens=body["max_tokens"], temperature=body["temperature"], top_p=body.get("top_p", 1.0)
        )
        with self._lock:
            [response] = self._engine.generate([ids], [body.get("seed", 0)], settings)
        sampled = response.token_ids + ([self._end] if response.finish_reason == "stop" else [])
        choice: dict[str, Any] = {"index": 0, "text": response.text, "finish_reason": response.finish_reason}
        if self._tells_ids and body.get("return_token_ids"):
            choice["token_ids"] = sampled
        counted = {"prompt_tokens": len(ids) + self._bos, "completion_tokens": len(sampled)}
        return 200, {
            "id": "1",
            "object": "text_completion",
            "created": 1,
            "model": self.name,
            "choices": [choice],
            **({"usage": counted} if self._counts else {}),
        }

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                """Quiet."""

            def do_GET(self) -> None:
                listed = [{"id": name, "object": "model", "created": 1, "owned_by": "test"} for name in server.models]
                self._send(200, json.dumps({"object": "list", "data": listed}))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fault: Fault | Change | None = None
                with server._lock:
                    server.requests.append(body)
                    server._now += 1
                    server.busiest = max(server.busiest, server._now)
                    if body["max_tokens"] > 1 and server.faults:
                        fault = server.faults.popleft()
                try:
                    self._respond(body, fault)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True  # Whoever asked has given up.
                finally:
                    with server._lock:
                        server._now -= 1

            def _respond(self, body: dict[str, Any], fault: "Fault | Change | None") -> None:
                if server._key is not None and self.headers["Authorization"] != f"Bearer {server._key}":
                    told = f"Incorrect API key provided: {self.headers['Authorization']}"
                    self._send(401, json.dumps({"error": {"message": told}}))
                elif isinstance(fault, Fault):
                    time.sleep(fault.hang)
                    self._send(fault.status, fault.body, fault.headers)
                else:
                    status, document = server.answer(body)
                    self._send(status, json.dumps(document if fault is None else fault(document)))

            def _send(self, status: int, text: str, headers: Mapping[str, str] | None = None) -> None:
                data = text.encode()
                plain = {"Content-Type": "application/json", "Content-Length": str(len(data))}
                self.send_response(status)
                for name, value in {**plain, **(headers or {})}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

        return Handler


def without(*names: str) -> Change:
    """An answer that lacks something of its choice."""

    def change(document: dict[str, Any]) -> dict[str, Any]:
        [choice] = document["choices"]
        return {**document, "choices": [{key: value for key, value in choice.items() if key not in names}]}

    return change


def with_usage(**counts: int) -> Change:
    """An answer that has counted otherwise."""
    return lambda document: {**document, "usage": {**document.get("usage", {}), **counts}}
