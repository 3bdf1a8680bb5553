"""An endpoint that speaks OpenAI's protocol, so that any chat client can talk with the capped model.

Two models are served: the one that is changed, and NAME-plain, the same without. Every answer says where it lies on the
axis, in the field `personaspace` of the response, or of the last chunk of a stream.
"""

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from jinja2 import TemplateError

from personaspace.steer.interventions import Intervention
from personaspace.steer.live.gauge import Gauge
from personaspace.steer.live.protocol import ChatRequest, RefusedError, parse_request, read_body
from personaspace.steer.live.talker import Answer, Ask, BusyError, Event, Talker, Ticket
from personaspace.store.errors import InputError

PLAIN = "-plain"


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """What is served, and to whom."""

    talker: Talker
    name: str
    """Of the changed model."""
    interventions: tuple[Intervention, ...]
    gauge: Gauge | None
    """Layer at which answers are placed on the axis."""
    token: str | None = None
    """What clients have to know; None: nothing is asked."""
    timeout: float = 600.0
    """Seconds that an answer may take, waiting included."""
    max_tokens: int = 512
    """Of an answer for which the request says nothing."""


def make_app(service: Service) -> FastAPI:
    """The application; the talker stays its maker's to close."""
    app = FastAPI(title="personaspace", docs_url=None, redoc_url=None, openapi_url=None)
    models = {service.name: service.interventions, service.name + PLAIN: ()}

    @app.exception_handler(RefusedError)
    async def refuse(_: Request, error: RefusedError) -> Response:
        return error.response()

    async def check(request: Request) -> None:
        if service.token is not None:
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), service.token.encode()):
                raise RefusedError(401, "the token is missing or wrong.", code="invalid_api_key")

    allowed = [Depends(check)]

    @app.get("/health")
    async def health() -> dict[str, Any]:
        active, waiting = service.talker.load
        return {"status": "ok", "active": active, "waiting": waiting}

    @app.get("/v1/models", dependencies=allowed)
    async def list_models() -> dict[str, Any]:
        listed = [{"id": name, "object": "model", "created": 0, "owned_by": "personaspace"} for name in models]
        return {"object": "list", "data": listed}

    @app.post("/v1/chat/completions", response_model=None, dependencies=allowed)
    async def complete(request: Request) -> Response:
        asked = parse_request(await read_body(request))
        if asked.model not in models:
            raise RefusedError(
                404, f"there is no model {asked.model!r}; there are {', '.join(models)}.", code="model_not_found"
            )
        exchange = _Exchange(service, asked, models[asked.model])
        if asked.stream:
            return StreamingResponse(exchange.stream(), media_type="text/event-stream", headers=_UNBUFFERED)
        return JSONResponse(await exchange.whole(request))

    return app


_UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class _Exchange:
    """One request and its answer."""

    def __init__(self, service: Service, asked: ChatRequest, interventions: Sequence[Intervention]) -> None:
        self._service, self._asked = service, asked
        self._id, self._created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def listen(event: Event) -> None:
            # When the loop is closed, nobody listens any more.
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        ask = Ask(
            messages=tuple({"role": message.role, "content": message.content} for message in asked.messages),
            interventions=tuple(interventions),
            max_tokens=asked.most_tokens or service.max_tokens,
            fit=asked.most_tokens is None,
            temperature=asked.temperature,
            top_p=asked.top_p,
            # 63 bits, as the noise takes them.
            seed=uuid.uuid4().int >> 65 if asked.seed is None else asked.seed % 2**63,
            stop=asked.stops,
        )
        try:
            self._ticket: Ticket = service.talker.ask(ask, listen)
        except BusyError as error:
            raise RefusedError(429, str(error), kind="rate_limit_error", code="rate_limit_exceeded") from None
        except InputError as error:
            raise RefusedError(400, str(error), code="context_length_exceeded") from None
        except TemplateError as error:
            raise RefusedError(400, f"messages: the model's chat template refuses them: {error}") from None
        self._deadline = loop.time() + service.timeout

    async def whole(self, request: Request) -> dict[str, Any]:
        """The response to a request that wants no stream."""
        waiting = asyncio.create_task(self._gone(request))
        try:
            async for event in self._told():
                if isinstance(event, Answer):
                    return {
                        **self._head("chat.completion"),
                        "choices": [
                            {
                                "index": 0,
                                "message": {"role": "assistant", "content": event.text},
                                "finish_reason": event.finish_reason,
                                "logprobs": None,
                            }
                        ],
                        "usage": _usage(event),
                        "personaspace": self._place(event),
                    }
        finally:
            self._ticket.cancel()
            waiting.cancel()
        raise RefusedError(499, "the client is gone.")

    async def stream(self) -> AsyncIterator[str]:
        """The chunks of a stream, as server-sent events."""
        try:
            yield self._chunk({"role": "assistant", "content": ""})
            async for event in self._told():
                if isinstance(event, str):
                    yield self._chunk({"content": event})
                else:
                    yield self._chunk({}, event)
                    if self._asked.stream_options and self._asked.stream_options.include_usage:
                        usage = {**self._head("chat.completion.chunk"), "choices": [], "usage": _usage(event)}
                        yield f"data: {json.dumps(usage)}\n\n"
            yield "data: [DONE]\n\n"
        except RefusedError as error:
            # The status is sent already.
            yield f"data: {bytes(error.response().body).decode()}\n\n"
        finally:
            self._ticket.cancel()

    async def _told(self) -> AsyncIterator[str | Answer]:
        """The pieces, then the answer. Raises RefusedError for one that failed or took too long."""
        while True:
            try:
                async with asyncio.timeout_at(self._deadline):
                    event = await self._events.get()
            except TimeoutError:
                raise RefusedError(504, f"no answer within {self._service.timeout:g} s.", kind="timeout") from None
            if isinstance(event, Exception):
                raise RefusedError(500, f"the model failed: {event}", kind="server_error") from event
            if isinstance(event, Answer) and event.finish_reason == "cancelled":
                raise RefusedError(503, "the server is shutting down.", kind="server_error")
            yield event
            if isinstance(event, Answer):
                return

    async def _gone(self, request: Request) -> None:
        """Cancel the answer when the client hangs up."""
        while not await request.is_disconnected():
            await asyncio.sleep(0.5)
        self._ticket.cancel()

    def _chunk(self, delta: dict[str, str], answer: Answer | None = None) -> str:
        reason = None if answer is None else answer.finish_reason
        chunk: dict[str, Any] = {
            **self._head("chat.completion.chunk"),
            "choices": [{"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}],
        }
        if answer is not None:
            chunk["personaspace"] = self._place(answer)
        return f"data: {json.dumps(chunk)}\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._asked.model}

    def _place(self, answer: Answer) -> dict[str, Any]:
        """Where the answer lies on the axis."""
        steered = not self._asked.model.endswith(PLAIN)
        gauge = self._service.gauge
        if gauge is None or gauge.layer not in answer.projections:
            return {"steered": steered}
        projection = answer.projections[gauge.layer]
        return {
            "steered": steered,
            "layer": gauge.layer,
            "projection": projection,
            "position": gauge.position(projection),
            "default_range": [gauge.low, gauge.high],
        }


def _usage(answer: Answer) -> dict[str, int]:
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.response_tokens,
        "total_tokens": answer.prompt_tokens + answer.response_tokens,
    }
