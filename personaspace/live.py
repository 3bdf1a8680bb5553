"""From a fitted run to a model that people can talk with."""

import argparse
import secrets
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from personaspace.config import stored_config
from personaspace.extract.config import ModelConfig
from personaspace.steer.config import SteerConfig
from personaspace.store.errors import InputError
from personaspace.store.location import open_folder
from personaspace.store.manifest import require_manifest

if TYPE_CHECKING:
    from fastapi import FastAPI

    from personaspace.steer.live.server import Service


def open_service(parsed: argparse.Namespace, steer: SteerConfig, token: str | None) -> "Service":
    """The model of the run, loaded, with what changes it and where it is measured. Raises InputError.

    The service's talker is the caller's to close.
    """
    from personaspace.steer.interventions import check_hidden
    from personaspace.steer.live.gauge import read_gauge
    from personaspace.steer.live.server import Service
    from personaspace.steer.live.talker import Talker
    from personaspace.steer.sources import resolve_interventions

    folder = open_folder(parsed.run)
    manifest = require_manifest(folder)
    gauge = read_gauge(folder, parsed.measured_at, f"{parsed.command} --measured-at")
    interventions = resolve_interventions(steer)
    check_hidden(interventions, manifest.layout.hidden)
    model = model_of(manifest.execution, folder.url, parsed.model)
    talker = Talker(model, [gauge], device=parsed.device, at_once=parsed.at_once, waiting=parsed.waiting)
    return Service(
        talker=talker,
        name=talker.name,
        interventions=interventions,
        gauge=gauge,
        token=token,
        timeout=parsed.timeout,
        max_tokens=parsed.max_tokens,
    )


def open_page(app: "FastAPI", run: str, service: "Service") -> None:
    """Put the page of `personaspace chat` on the application."""
    from personaspace.extract.catalogue_files import BUILTIN
    from personaspace.extract.scenarios import load_scenarios
    from personaspace.steer.live.dials import read_cap_table
    from personaspace.steer.live.page import Room, add_page

    assert service.gauge is not None
    room = Room(
        talker=service.talker,
        gauge=service.gauge,
        caps=read_cap_table(run),
        scenarios=tuple(load_scenarios([BUILTIN])),
        token=service.token,
        max_tokens=service.max_tokens,
    )
    # Cookies name conversations that live as long as this process, and so may their signature.
    add_page(app, room, secret=secrets.token_urlsafe(32))


def model_of(execution: Any, where: str, asked: str | None) -> ModelConfig:
    """The model that a run was made with, or ``asked`` with its settings. Raises InputError where neither is known."""
    if "config" not in execution:
        if asked is None:
            raise InputError(f"{where}: was imported, and does not say where its model lies. Name it: --model ID")
        return ModelConfig(id=asked)
    model = stored_config(execution, where, (), prog="personaspace serve RUN").model
    return model if asked is None else replace(model, id=asked, revision=None)
