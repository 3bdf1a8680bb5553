"""OpenAI's protocol for chats, as far as it is spoken here: requests, how they are read, and how they are refused.

What is not known of a request (`tools`, say) is refused rather than left out.
"""

import asyncio
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, MaxLen, MinLen
from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import ClientDisconnect

MOST_BYTES = 1_000_000
"""Of a request's body."""
BODY_SECONDS = 30.0
"""Within which a request's body has to be here."""
RETRY_AFTER = "2"
"""Seconds, told to those who are turned away."""


class ChatMessage(BaseModel):
    """One turn."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "user", "assistant"]
    content: str
    name: str | None = None


class StreamOptions(BaseModel):
    """What a stream tells besides."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class ChatRequest(BaseModel):
    """What is known of a request. `user`, `metadata` and `store` are taken and mean nothing here."""

    model_config = ConfigDict(extra="forbid")
    model: str
    messages: Annotated[list[ChatMessage], MinLen(1), MaxLen(1000)]
    max_tokens: Annotated[int, Ge(1)] | None = None
    max_completion_tokens: Annotated[int, Ge(1)] | None = None
    temperature: Annotated[float, Ge(0), Le(2)] = 0.7
    top_p: Annotated[float, Gt(0), Le(1)] = 0.9
    seed: int | None = None
    stop: str | Annotated[list[str], MaxLen(4)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] = 1
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None

    @property
    def most_tokens(self) -> int | None:
        """Of the answer; both names of it are known."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end the answer."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(stop for stop in given if stop)


class RefusedError(Exception):
    """A request that gets an error, in OpenAI's form."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.code = status, kind, code

    def response(self) -> JSONResponse:
        """What the client gets."""
        body = {"error": {"message": str(self), "type": self.kind, "param": None, "code": self.code}}
        headers = {"Retry-After": RETRY_AFTER} if self.status == 429 else {}
        return JSONResponse(body, status_code=self.status, headers=headers)


async def read_body(request: Request) -> bytes:
    """The request's body. Raises RefusedError for one that is too large or too slow."""
    too_large = RefusedError(413, f"the request is larger than {MOST_BYTES:,} bytes.", code="request_too_large")
    told = request.headers.get("content-length", "0")
    if told.isdigit() and int(told) > MOST_BYTES:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > MOST_BYTES:
                    raise too_large
    except ClientDisconnect:
        raise RefusedError(499, "the client is gone.") from None
    except TimeoutError:
        raise RefusedError(408, f"the request did not arrive within {BODY_SECONDS:.0f} s.") from None
    return bytes(body)


def parse_request(body: bytes) -> ChatRequest:
    """What was asked. Raises RefusedError naming the field."""
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"])) or "the body"
        known = ", ".join(ChatRequest.model_fields)
        hint = f" Known are {known}." if problem["type"] == "extra_forbidden" else ""
        raise RefusedError(400, f"{where}: {problem['msg']}.{hint}") from None
