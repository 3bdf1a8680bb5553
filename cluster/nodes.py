"""Before any work: every node of the cluster must see the store that the driver writes to."""

import uuid
from typing import Any, cast

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from personaspace.store.errors import InputError, PersonaspaceError
from personaspace.store.objects import SCRATCH, Folder

PATIENCE = 60.0
"""Seconds that a node has for reading one small object; starting its worker takes a few of them."""


@ray.remote(num_cpus=0, max_retries=0)
def read_nonce(folder: Folder, key: str) -> str:
    """On a node: the object's text, or why it can't be read."""
    try:
        return folder.get(key).decode()
    except FileNotFoundError:
        return "it is not there: the path is not shared, or something else is mounted at it"
    except PersonaspaceError as error:
        return str(error)


def check_nodes(folder: Folder) -> None:
    """Write a nonce and have every node read it. Raises InputError naming the nodes that can't."""
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if len(nodes) == 1 and next(iter(nodes)) == ray.get_runtime_context().get_node_id():
        return  # The driver's own machine, which has just written run.json.
    nonce = uuid.uuid4().hex
    key = f"{SCRATCH}/nonce-{nonce}"
    folder.put_new(key, nonce.encode())
    try:
        answers = {
            cast(Any, read_nonce)
            .options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node, soft=False))
            .remote(folder, key): node
            for node in nodes
        }
        finished, silent = ray.wait(list(answers), num_returns=len(answers), timeout=PATIENCE)
        blind = {answers[reference]: f"no answer within {PATIENCE:.0f} s" for reference in silent}
        for reference in finished:
            try:
                answer = ray.get(reference)
            except ray.exceptions.RayError as error:
                answer = f"its worker failed: {error}"
            if answer != nonce:
                blind[answers[reference]] = answer
    finally:
        folder.delete(key)
    if blind:
        lines = "\n".join(f"  {nodes[node]} ({node[:8]}): {why}" for node, why in sorted(blind.items()))
        raise InputError(
            f"store.root: {folder.url} can't be read on {len(blind)} of {len(nodes)} nodes:\n{lines}\n"
            "Use a path that is mounted on all nodes, or an object store whose credentials every node has. "
            "No work was started."
        )
