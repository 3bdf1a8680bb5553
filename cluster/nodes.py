"""Before any work: every node of the cluster must see the store that the driver writes to, and the model's files."""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from personaspace.cluster.replicas import alive_nodes
from personaspace.extract.checkpoint import Checkpoint
from personaspace.store.errors import InputError, PersonaspaceError
from personaspace.store.objects import SCRATCH, Folder

PATIENCE = 60.0
"""Seconds that a node has for reading one small object; starting its worker takes a few of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Files:
    """A folder that every node must have."""

    folder: str
    sizes: Mapping[str, int]
    """File -> bytes, as the driver's node has them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sight:
    """What a node sees."""

    store: str
    """The text of the object that it was to read, or why it can't."""
    model: str | None
    """What is wrong with the model's files."""


@ray.remote(num_cpus=0, max_retries=0)
def look(folder: Folder, key: str, model: Files | None) -> Sight:
    """On a node: read an object of the store, and compare the model's files with the driver's."""
    try:
        store = folder.get(key).decode()
    except FileNotFoundError:
        store = "it is not there: the path is not shared, or something else is mounted at it"
    except PersonaspaceError as error:
        store = str(error)
    return Sight(store=store, model=None if model is None else difference(model))


def difference(files: Files) -> str | None:
    """How the folder on this machine differs from ``files``; None if it does not."""
    folder = Path(files.folder)
    if not folder.is_dir():
        return "it is not there"
    for name, size in files.sizes.items():
        if not (folder / name).is_file():
            return f"it holds no {name}"
        here = (folder / name).stat().st_size
        if here != size:
            return f"its {name} has {here} bytes, and {size} on the driver's node"
    return None


def model_files(checkpoint: Checkpoint) -> Files | None:
    """The files of a checkpoint that is a folder; None for one of the hub, which every node fetches itself."""
    if checkpoint.revision is not None:
        return None
    folder = Path(checkpoint.source)
    return Files(folder=str(folder), sizes={name: (folder / name).stat().st_size for name in checkpoint.files})


def check_nodes(folder: Folder, model: Files | None = None) -> None:
    """Have every node read an object that was just written, and look at the model's files.

    Raises InputError naming the nodes that can't, and are still there.
    """
    nodes = {node.id: node.address for node in alive_nodes()}
    if len(nodes) == 1 and next(iter(nodes)) == ray.get_runtime_context().get_node_id():
        return  # The driver's own machine, which has just written run.json.
    nonce = uuid.uuid4().hex
    key = f"{SCRATCH}/nonce-{nonce}"
    folder.put_new(key, nonce.encode())
    try:
        answers = {
            cast(Any, look)
            .options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node, soft=False))
            .remote(folder, key, model): node
            for node in nodes
        }
        finished, silent = ray.wait(list(answers), num_returns=len(answers), timeout=PATIENCE)
        blind = {answers[reference]: f"no answer within {PATIENCE:.0f} s" for reference in silent}
        lacking: dict[str, str] = {}
        for reference in finished:
            node = answers[reference]
            try:
                sight: Sight = ray.get(reference)
            except ray.exceptions.RayError as error:
                blind[node] = f"its worker failed: {error}"
                continue
            if sight.store != nonce:
                blind[node] = sight.store
            if sight.model is not None:
                lacking[node] = sight.model
    finally:
        folder.delete(key)
    # A node may go while it is asked, or have gone unnoticed before: nothing will be sent to it.
    alive = {node.id for node in alive_nodes()}
    blind = {node: why for node, why in blind.items() if node in alive}
    problems = []
    if blind:
        problems.append(
            f"store.root: {folder.url} can't be read on {_list(blind, nodes)}\n"
            "Use a path that is mounted on all nodes, or an object store whose credentials every node has."
        )
    if lacking and model is not None:
        problems.append(
            f"model.id: {model.folder} is not the same on {_list(lacking, nodes)}\n"
            "Put the model into a folder that all nodes share, or copy it to the same path on each of them."
        )
    if problems:
        raise InputError("\n".join([*problems, "No work was started."]))


def _list(why: Mapping[str, str], nodes: Mapping[str, str]) -> str:
    lines = "\n".join(f"  {nodes[node]} ({node[:8]}): {reason}" for node, reason in sorted(why.items()))
    return f"{len(why)} of {len(nodes)} nodes:\n{lines}"
