"""`personaspace chat RUN` and `personaspace serve RUN`: talking with the capped model, in a page or by any client."""

import argparse
import importlib.util
import ipaddress
import os
import secrets
from collections.abc import Sequence
from typing import Any

from personaspace.config import with_steer_flags
from personaspace.steer.config import SteerConfig
from personaspace.store.errors import InputError

SERVE = """\
examples:
  personaspace serve runs/demo
  personaspace serve runs/demo --percentile 50 --layers 20-23
  personaspace serve runs/demo --method add --coefficient -0.5 --port 9000
  personaspace serve runs/demo --source capping.pt --experiment layers_22:26-p0.25
  PERSONASPACE_TOKEN=... personaspace serve runs/demo --host 0.0.0.0

  curl localhost:8321/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"model": "NAME", "messages": [{"role": "user", "content": "Who are you?"}]}'

RUN is a run with a fit; its model is loaded here, and changed as the flags of `steer` say (docs/steering.md; default:
the paper's cap). NAME-plain is the model as it is. Each answer says where it lies on the axis, in `personaspace`."""
CHAT = """\
examples:
  personaspace chat runs/demo
  personaspace chat runs/demo --model /models/SmolLM2-135M-Instruct --measured-at 20
  PERSONASPACE_TOKEN=... personaspace chat runs/demo --host 0.0.0.0     then open http://HOST:8321/?token=...

A page with the model as it is and capped, side by side: streamed answers, a chart of where each turn lies on the axis,
strength and layers of the cap as sliders, stories of several turns, conversations saved, opened and exported as
transcripts. The endpoint of `personaspace serve` is there, too."""
TOKEN = "PERSONASPACE_TOKEN"
PORT = 8321


def add_live(commands: Any) -> None:
    """Add `chat` and `serve` to the command line's parser."""
    chat = _add(commands, "chat", "a page to talk with the model, as it is and capped, side by side", CHAT)
    chat.add_argument("--measured-at", type=int, metavar="L", help="layer of the chart (default: the target layer)")
    serve = _add(commands, "serve", "an OpenAI-compatible endpoint of the capped model", SERVE)
    serve.add_argument(
        "--measured-at", type=int, metavar="L", help="layer on whose axis answers are placed (default: target)"
    )


def _add(commands: Any, name: str, told: str, epilog: str) -> Any:
    command = commands.add_parser(
        name,
        help=told,
        description=f"`personaspace {name} RUN`: {told}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("run", metavar="RUN", help="folder or URL of a run with a fit")
    command.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default %(default)s: this machine only)"
    )
    command.add_argument("--port", type=int, default=PORT, help="default %(default)s")
    command.add_argument("--model", metavar="ID", help="model to load, where that of the run lies elsewhere")
    command.add_argument("--device", help="such as cuda:1 (default: the GPU if there is one)")
    command.add_argument("--at-once", type=int, default=4, metavar="N", help="answers made side by side (default 4)")
    command.add_argument("--waiting", type=int, default=64, metavar="N", help="requests that may wait (default 64)")
    command.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="seconds for an answer (default 600)"
    )
    command.add_argument(
        "--max-tokens", type=int, default=512, metavar="N", help="of an answer, unless asked (default 512)"
    )
    return command


def run_live(parsed: argparse.Namespace, flags: Sequence[str]) -> int:
    """Serve until interrupted, and return the exit code 0."""
    command = str(parsed.command)
    token = os.environ.get(TOKEN) or None
    if not _is_local(parsed.host) and token is None:
        raise InputError(
            f"{command} --host: {parsed.host} can be reached from elsewhere. Set a token that clients have to send, "
            f"such as {TOKEN}={secrets.token_urlsafe(24)}"
        )
    if command == "chat" and flags:
        raise InputError(f"chat: unknown argument {flags[0]}. The cap is set in the page.")
    steer = with_steer_flags(SteerConfig(source=parsed.run), flags, prog=f"personaspace {command} RUN")
    missing = [name for name in ("fastapi", "nicegui", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"{command}: needs {', '.join(missing)}. Install it: pip install 'personaspace[live]'")
    # The libraries of model and server load here, so that --help and bad input answer at once.
    from personaspace.live import open_page, open_service

    service = open_service(parsed, steer, token)
    import uvicorn

    from personaspace.steer.live.server import PLAIN, make_app

    talker = service.talker
    with talker:
        app = make_app(service)
        if command == "chat":
            open_page(app, parsed.run, service)
            asked = "" if token is None else "?token=..."
            print(f"open http://{parsed.host}:{parsed.port}/{asked}", flush=True)
        else:
            layers = ", ".join(str(intervention.layer) for intervention in service.interventions)
            print(f"{talker.name}: {steer.method} at layer {layers}; {talker.name}{PLAIN}: as it is", flush=True)
            print(f"listening on http://{parsed.host}:{parsed.port}/v1", flush=True)
        uvicorn.run(
            app,
            host=parsed.host,
            port=parsed.port,
            log_level="warning",
            limit_concurrency=4 * (parsed.at_once + parsed.waiting),
            timeout_graceful_shutdown=10,
        )
    return 0


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
