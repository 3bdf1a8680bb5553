"""Small jobs of finished conversations on tiny models: what the tests of the extract step share."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from personaspace.cluster.config import ClusterConfig
from personaspace.cluster.events import Event
from personaspace.cluster.extraction import extract
from personaspace.cluster.generation import generate
from personaspace.cluster.job import Job, prepare
from personaspace.cluster.session import hold_run
from personaspace.config import RunConfig
from personaspace.extract.chat import Message
from personaspace.extract.config import ExtractConfig, GenerateConfig, ModelConfig
from personaspace.store.config import StoreConfig
from personaspace.store.objects import Folder
from tests.models import tiny_checkpoint

EXTRACT: dict[str, Any] = {"micro_batch_tokens": 256, "window_rows": 8}
STORE: dict[str, Any] = {"precision": "lossless", "unit_rows": 4, "layer_group": 2}


def talk(*texts: str) -> list[Message]:
    """A conversation of user and assistant in turns."""
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]


def response_line(number: int, conversation: Sequence[Message]) -> str:
    """A response in the format of the assistant-axis project, to question ``number``."""
    line = {"prompt_index": 0, "question_index": number, "question": f"Question {number}?", "label": "pos"}
    return json.dumps({**line, "system_prompt": "", "conversation": list(conversation)})


def write_responses(folder: Path, conversations: Mapping[str, Sequence[Sequence[Message]]]) -> Path:
    """ROLE.jsonl with the conversations of each role; returns the folder."""
    folder.mkdir(exist_ok=True)
    for role, talks in conversations.items():
        lines = [response_line(number, conversation) for number, conversation in enumerate(talks)]
        (folder / f"{role}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


def config_for(model: Path, responses: Path, root: Path, run: str, *, grow: bool = False, **extract: Any) -> RunConfig:
    """The config of a run of finished responses: units of four rollouts, groups of two layers, exact float32."""
    return RunConfig(
        model=ModelConfig(id=str(model), dtype="float32"),
        generate=GenerateConfig(responses=str(responses)),
        extract=ExtractConfig(**{**EXTRACT, **extract}),
        store=StoreConfig(root=str(root), run=run, grow=grow, **STORE),
        cluster=ClusterConfig(device="cpu"),
    )


def job_of(config: RunConfig) -> Job:
    return prepare(
        model=config.model,
        personas=config.personas,
        generate=config.generate,
        extract=config.extract,
        store=config.store,
        execution={"config": asdict(config)},
    )


def make_place(folder: Path, conversations: Mapping[str, Sequence[Sequence[Message]]]) -> Path:
    """The folder, with a tiny model and responses in it."""
    tiny_checkpoint(folder / "model")
    write_responses(folder / "responses", conversations)
    return folder


def job_for(place: Path, run: str, *, model: str = "model", responses: str = "responses", **options: Any) -> Job:
    """A job of the model and the responses in a place, which is its store, too."""
    return job_of(config_for(place / model, place / responses, place, run, **options))


def run_job(job: Job, *, stages: int = 1) -> list[Event]:
    """Import and extract; returns what was reported."""
    events: list[Event] = []
    with hold_run(job, say=print) as fence:
        for step in (generate, extract):
            step(job, fence, ClusterConfig(stages=stages), events.append)
    return events


def committed_objects(folder: Folder) -> dict[str, bytes]:
    """Everything that is committed, its records, and the plan: what nothing later may touch."""
    return {
        entry.key: folder.get(entry.key)
        for entry in folder.list()
        if entry.key.startswith(("commits/", "rollouts/", "plan/")) or "/c/" in entry.key
    }


def poison(model: Path, target: Path, layer: int) -> Path:
    """A copy of the checkpoint with one weight of a layer that is not a number."""
    shutil.copytree(model, target)
    weights = load_file(target / "model.safetensors")
    weights[f"model.layers.{layer}.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target
