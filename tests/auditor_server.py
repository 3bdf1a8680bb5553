"""A real HTTP server on this machine that speaks chat completions, as a played user, and misbehaves on command."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(slots=True)
class Answer:
    """What the server sends."""

    status: int = 200
    text: str = ""
    """Of the completion; of an error its message."""
    finish_reason: str = "stop"
    raw: bytes | None = None
    """The whole body, in place of a completion."""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Completions:
    """The server, and what it was asked."""

    url: str
    asked: list[dict[str, Any]] = field(default_factory=list)
    """Bodies of the requests, with the `authorization` header beside them."""


def reply(body: dict[str, Any]) -> Answer:
    """What the user says by default: it counts its own turns, so that each can be told."""
    turns = sum(message["role"] == "assistant" for message in body["messages"])
    heard = body["messages"][-1]["content"]
    return Answer(text=f"Turn {turns + 1}. You said {len(heard)} letters. Go on?")


@contextmanager
def completions_server(respond: Callable[[dict[str, Any]], Answer] = reply) -> Iterator[Completions]:
    """``respond`` gets each request's body, from several threads at once."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.asked.append({**body, "authorization": self.headers["Authorization"], "path": self.path})
            answer = respond(body)
            message: dict[str, Any] = {"role": "assistant", "content": answer.text}
            content: dict[str, Any] = {
                "id": "x",
                "object": "chat.completion",
                "created": 0,
                "model": body["model"],
                "choices": [{"index": 0, "message": message, "finish_reason": answer.finish_reason}],
            }
            if answer.status != 200:
                content = {"error": {"message": answer.text}}
            data = json.dumps(content).encode() if answer.raw is None else answer.raw
            self.send_response(answer.status)
            for name, value in {"Content-Type": "application/json", **answer.headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Nothing."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = Completions(url=f"http://127.0.0.1:{http.server_port}/v1")
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        thread.join()
        http.server_close()
