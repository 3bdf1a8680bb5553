"""`personaspace serve RUN`: the capped model behind an endpoint that any chat client can talk with."""

import argparse
import importlib.util
import ipaddress
import os
import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from personaspace.config import stored_config, with_steer_flags
from personaspace.extract.config import ModelConfig
from personaspace.steer.config import SteerConfig
from personaspace.store.errors import InputError
from personaspace.store.location import open_folder
from personaspace.store.manifest import require_manifest

if TYPE_CHECKING:
    from personaspace.steer.live.talker import Talker

EPILOG = """\
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
TOKEN = "PERSONASPACE_TOKEN"
PORT = 8321


def add_live(commands: Any) -> None:
    """Add `serve` to the command line's parser."""
    serve = commands.add_parser(
        "serve",
        help="an OpenAI-compatible endpoint of the capped model",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    serve.add_argument("run", metavar="RUN", help="folder or URL of a run with a fit")
    serve.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default %(default)s: this machine only)"
    )
    serve.add_argument("--port", type=int, default=PORT, help="default %(default)s")
    serve.add_argument(
        "--measured-at", type=int, metavar="L", help="layer on whose axis answers are placed (default: target)"
    )
    serve.add_argument("--model", metavar="ID", help="model to load, where that of the run lies elsewhere")
    serve.add_argument("--device", help="such as cuda:1 (default: the GPU if there is one)")
    serve.add_argument("--at-once", type=int, default=4, metavar="N", help="answers made side by side (default 4)")
    serve.add_argument("--waiting", type=int, default=64, metavar="N", help="requests that may wait (default 64)")
    serve.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds for an answer (default 600)")
    serve.add_argument(
        "--max-tokens", type=int, default=512, metavar="N", help="of an answer, unless asked (default 512)"
    )


def run_live(parsed: argparse.Namespace, flags: Sequence[str]) -> int:
    """Serve until interrupted, and return the exit code 0."""
    token = os.environ.get(TOKEN) or None
    if not _is_local(parsed.host) and token is None:
        raise InputError(
            f"serve --host: {parsed.host} can be reached from elsewhere. Set a token that clients have to send, such "
            f"as {TOKEN}={secrets.token_urlsafe(24)}"
        )
    steer = with_steer_flags(SteerConfig(source=parsed.run), flags, prog="personaspace serve RUN")
    if importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("uvicorn") is None:
        raise InputError("serve: needs fastapi and uvicorn. Install them: pip install 'personaspace[live]'")
    talker, interventions, gauge = load(parsed, steer)
    import uvicorn

    from personaspace.steer.live.server import PLAIN, Service, make_app

    with talker:
        service = Service(
            talker=talker,
            name=talker.name,
            interventions=interventions,
            gauge=gauge,
            token=token,
            timeout=parsed.timeout,
            max_tokens=parsed.max_tokens,
        )
        layers = ", ".join(str(intervention.layer) for intervention in interventions)
        print(f"{talker.name}: {steer.method} at layer {layers}; {talker.name}{PLAIN}: as it is", flush=True)
        print(f"listening on http://{parsed.host}:{parsed.port}/v1", flush=True)
        uvicorn.run(
            make_app(service),
            host=parsed.host,
            port=parsed.port,
            log_level="warning",
            limit_concurrency=4 * (parsed.at_once + parsed.waiting),
            timeout_graceful_shutdown=10,
        )
    return 0


def load(parsed: argparse.Namespace, steer: SteerConfig) -> tuple["Talker", tuple[Any, ...], Any]:
    """The model of a run, what changes it, and where it is measured. Raises InputError."""
    from personaspace.steer.interventions import check_hidden
    from personaspace.steer.live.gauge import read_gauges
    from personaspace.steer.live.talker import Talker
    from personaspace.steer.sources import resolve_interventions
    from personaspace.store.space import open_space

    folder = open_folder(parsed.run)
    manifest = require_manifest(folder)
    gauges = read_gauges(folder)
    layer = int(open_space(folder).attrs["target_layer"]) if parsed.measured_at is None else parsed.measured_at
    if layer not in gauges:
        raise InputError(f"serve --measured-at: {layer}; the fit has the layers {min(gauges)} to {max(gauges)}.")
    interventions = resolve_interventions(steer)
    check_hidden(interventions, manifest.layout.hidden)
    model = model_of(manifest.execution, folder.url, parsed.model)
    talker = Talker(model, [gauges[layer]], device=parsed.device, at_once=parsed.at_once, waiting=parsed.waiting)
    return talker, interventions, gauges[layer]


def model_of(execution: Any, where: str, asked: str | None) -> ModelConfig:
    """The model that a run was made with, or ``asked`` with its settings. Raises InputError where neither is known."""
    if "config" not in execution:
        if asked is None:
            raise InputError(f"{where}: was imported, and does not say where its model lies. Name it: --model ID")
        return ModelConfig(id=asked)
    model = stored_config(execution, where, (), prog="personaspace serve RUN").model
    return model if asked is None else replace(model, id=asked, revision=None)


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
