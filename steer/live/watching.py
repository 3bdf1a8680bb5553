"""Finished transcripts on the Assistant Axis: where each turn of the assistant lies, and whether it left its range."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from personaspace.extract.engine import Extractor
from personaspace.steer.live.gauge import Gauge
from personaspace.store.errors import InputError
from personaspace.store.formats.transcripts import Transcript


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchedTurn:
    """One answer."""

    number: int
    """0-based, among the assistant's turns."""
    tokens: int
    position: float
    """Of the mean over its tokens, as in `analysis.drift`: mean role 0, mean default response 1."""
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Watched:
    """A transcript that the model has read."""

    where: str
    """Its file."""
    turns: tuple[WatchedTurn, ...]
    below: int
    """Turns below the default range."""


def watch(extractor: Extractor, gauge: Gauge, transcripts: Sequence[Transcript]) -> list[Watched]:
    """Read the model while it runs over each transcript.

    Raises InputError for a model of another shape than the gauge's, and for a transcript that it can't read: too long
    for its context, or cut otherwise by its chat template.
    """
    gauge.check_model(extractor.name, extractor.layers, extractor.hidden)
    conversations = [transcript.conversation for transcript in transcripts]
    read = extractor.extract(conversations, reductions=["turns"], layers=[gauge.layer])
    for transcript, dropped in zip(transcripts, read["dropped"].values, strict=True):
        if dropped:
            raise InputError(f"{transcript.where}: {dropped}; its first turns alone may do: --turns N")
    unit_D = gauge.axis_D.astype(np.float64) / np.linalg.norm(gauge.axis_D.astype(np.float64))
    projection_S = read["span_resid_post_mean"].sel(layer=gauge.layer).values @ unit_D
    found: list[list[WatchedTurn]] = [[] for _ in transcripts]
    for place, (row, number) in enumerate(zip(read["span_rollout"].values, read["turn"].values, strict=True)):
        answers = [message["content"] for message in conversations[row] if message["role"] == "assistant"]
        tokens, position = int(read["count"].values[place]), gauge.position(float(projection_S[place]))
        found[row].append(WatchedTurn(number=int(number), tokens=tokens, position=position, text=answers[number]))
    return [
        Watched(where=transcript.where, turns=tuple(turns), below=sum(turn.position < gauge.low for turn in turns))
        for transcript, turns in zip(transcripts, found, strict=True)
    ]
