"""A real HTTP server that speaks the chat completions protocol, and misbehaves on command."""

import asyncio
import json
import re
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any

from aiohttp import web

MODEL = "judge-model"
PRICE_IN, PRICE_OUT = 2.0, 8.0
"""USD per million tokens."""

Behaviour = Callable[[int, int], str]
"""(row asked about, how often it was asked about before) -> what the server does."""
BEHAVIOURS = (
    "429",
    "429 date",
    "500",
    "503 slowly",
    "hang",
    "reset",
    "truncated body",
    "half of the JSON",
    "no choices",
    "nonsense",
    "score 7",
    "cut off",
    "wrong model",
    "slow",
)


def expected_score(row: int) -> int:
    """What the server says of the response `Answer ROW`."""
    return (7 * row + 3) % 4


@dataclass(frozen=True, kw_only=True)
class Request:
    """One that came in."""

    row: int
    behaviour: str
    arrived: float
    """time.monotonic()"""
    key: str


@dataclass
class ChatServer:
    """Runs in a thread of its own; a context manager."""

    behaviour: Behaviour = lambda row, before: "good"
    delay: float = 0.0
    """Seconds before each answer."""
    retry_after: float = 0.2
    requests: list[Request] = field(default_factory=list)
    usd: float = 0.0
    """What the work was worth: also that for which the answer never arrived."""
    under_way: int = 0
    most_under_way: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/v1"

    @property
    def rows_asked(self) -> Counter[int]:
        return Counter(request.row for request in self.requests)

    def __enter__(self) -> "ChatServer":
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._answer)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self._port = runner.addresses[0][1]
        self._ready.set()
        await self._stop.wait()
        await runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            return await self._misbehave(request)
        finally:
            self.under_way -= 1

    async def _misbehave(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        text = next(message["content"] for message in body["messages"] if message["role"] == "user")
        numbers = re.findall(r"Answer (\d+)", text)
        row = int(numbers[-1]) if numbers else zlib.crc32(text.encode())  # Of a run whose responses a model gave.
        key = request.headers["Authorization"].removeprefix("Bearer ")
        behaviour = self.behaviour(row, self.rows_asked[row])
        self.requests.append(Request(row=row, behaviour=behaviour, arrived=time.monotonic(), key=key))
        if self.delay:
            await asyncio.sleep(self.delay)
        answer = {"reason": f"of row {row}", "score": expected_score(row)}
        match behaviour:
            case "429":
                return _error(429, "slow down", {"Retry-After": str(self.retry_after)})
            case "429 date":
                return _error(429, "slow down", {"Retry-After": formatdate(time.time() + 1, usegmt=True)})
            case "500":
                return _error(500, "broken")
            case "503 slowly":
                await asyncio.sleep(0.05)
                return _error(503, "overloaded")
            case "400" | "401" | "404":
                return _error(int(behaviour), "no")
            case "no credit":
                return _error(429, "pay first", code="insufficient_quota")
            case "tells the key":
                return _error(500, f"did not like the header Authorization: Bearer {key}")
            case "says the key":
                answer["reason"] = f"your key is {key}"
        usage = self._charge(body, 14)
        completion: dict[str, Any] = {
            "id": "1",
            "object": "chat.completion",
            "created": 1,
            "model": "another-model" if behaviour == "wrong model" else f"{MODEL}-2026-01-01",
            "choices": [
                {
                    "index": 0,
                    "finish_reason": "length" if behaviour == "cut off" else "stop",
                    "message": {"role": "assistant", "content": _content(behaviour, answer)},
                }
            ],
            "usage": usage,
        }
        data = json.dumps(completion).encode()
        match behaviour:
            case "hang":
                await asyncio.sleep(3600)
            case "slow":
                await asyncio.sleep(0.1)
            case "no choices":
                data = json.dumps({**completion, "choices": []}).encode()
            case "no usage":
                del completion["usage"]
                data = json.dumps(completion).encode()
            case "half of the JSON":
                data = data[: len(data) // 2]
            case "reset":
                assert request.transport is not None
                request.transport.abort()
            case "truncated body":
                headers = {"Content-Type": "application/json", "Content-Length": str(len(data))}
                response = web.StreamResponse(headers=headers)
                await response.prepare(request)
                await response.write(data[: len(data) // 2])
                assert request.transport is not None
                request.transport.close()
                return response
        return web.Response(body=data, content_type="application/json")

    def _charge(self, body: dict[str, Any], completion_tokens: int) -> dict[str, int]:
        prompt_tokens = sum(len(message["content"].encode()) for message in body["messages"]) // 4
        self.usd += (PRICE_IN * prompt_tokens + PRICE_OUT * completion_tokens) / 1e6
        return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": 0}


def _content(behaviour: str, answer: dict[str, Any]) -> str:
    match behaviour:
        case "nonsense":
            return "What a lovely answer!"
        case "score 7":
            return '{"reason": "superb", "score": 7}'
        case "cut off":
            return '{"reason": "I have so much to say about th'
    return json.dumps(answer)


def _error(
    status: int, message: str, headers: dict[str, str] | None = None, code: str | None = None
) -> web.StreamResponse:
    body = {"error": {"message": message, "type": "error", "param": None, "code": code}}
    return web.json_response(body, status=status, headers=headers)
