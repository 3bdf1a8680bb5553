"""How a copy of the model lies on the actors of a replica: which blocks each runs, and which layers it writes."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import ray

from personaspace.cluster.config import ClusterConfig, Generation, Sharding
from personaspace.cluster.gang import Gang, Rendezvous
from personaspace.cluster.job import Job
from personaspace.cluster.room import Node, chosen_device
from personaspace.cluster.stage_count import fewest_stages
from personaspace.extract.offload import Offload
from personaspace.store.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """One actor's part in a replica that extracts."""

    sharding: Sharding
    place: int
    """Number of its stage, or its rank."""
    actors: int
    """Of the replica."""
    first: int
    stop: int
    """It runs blocks ``[first, stop)``: all of them, but for a stage."""
    written: range
    """Layers that it pools and writes."""
    offload: Offload | None

    @property
    def last(self) -> bool:
        """Nobody needs the states that leave its blocks."""
        return self.sharding != "pipeline" or self.place == self.actors - 1

    @property
    def name(self) -> str:
        """For messages."""
        if self.sharding == "pipeline":
            return f"stage of layers {self.first} to {self.stop - 1}"
        return f"rank {self.place} of {self.actors}" if self.sharding == "tensor" else "offloaded model"


class Member:
    """Mixed into actors: the part of one of them in a gang."""

    _meeting: Rendezvous | None = None

    def meet(self) -> str:
        """Of rank 0: open a rendezvous on its node, and keep it. Returns its address."""
        self._meeting = Rendezvous(ray.util.get_node_ip_address())
        return self._meeting.address

    def join(self, address: str, *, rank: int, ranks: int, device: str) -> Gang:
        """Wait until all ranks are there."""
        return Gang(self._meeting or address, rank=rank, ranks=ranks, device=device)


def load_each(actors: Sequence[Any]) -> list[Any]:
    """Have actors load their shares, each for itself."""
    return [actor.load.remote() for actor in actors]


def load_gang(actors: Sequence[Any]) -> list[Any]:
    """Have the actors of a gang load their shares, once they have met at rank 0."""
    address = actors[0].meet.remote()
    return [actor.load.remote(address) for actor in actors]


def check_sharding(job: Job, cluster: ClusterConfig) -> None:
    """Raise InputError for settings that can't be, before any work."""
    extraction_shares(job, cluster, cluster.stages or 1 if cluster.sharding == "pipeline" else 1)
    if job.generate.batching == "continuous" and generation_sharding(cluster) != "whole":
        raise InputError(
            "generate.batching: continuous needs the whole model on one device, and cluster.generation is "
            f"{generation_sharding(cluster)}. Use static, or cluster.generation whole."
        )
    if job.extract.compile and cluster.sharding != "pipeline":
        raise InputError(
            f"extract.compile: not with cluster.sharding {cluster.sharding}, which changes the blocks. Use one of the "
            "two."
        )
    played = any(row.script is not None and row.script.user for row in job.rows.values())
    if played and job.auditor.played_by == "endpoint" and generation_sharding(cluster) == "tensor":
        raise InputError(
            "personas.auditor.played_by: `endpoint` is not possible with cluster.generation tensor, where every rank "
            "would hear something else. Use `script` or `model`, or generate with copies that are `whole`."
        )


def extraction_actors(job: Job, cluster: ClusterConfig, nodes: Sequence[Node]) -> int:
    """Actors of a replica that extracts. Raises InputError where the config leaves it open and nodes don't tell."""
    if cluster.sharding == "offload":
        return 1
    if cluster.sharding == "tensor":
        return gang_size(cluster, nodes)
    return cluster.stages or fewest_stages(job, nodes, chosen_device(nodes, cluster.device))


def gang_size(cluster: ClusterConfig, nodes: Sequence[Node]) -> int:
    """Ranks of a gang: as set, or all GPUs of a node."""
    with_gpus = [int(node.gpus) for node in nodes if node.gpus]
    if cluster.ranks is None and (not with_gpus or cluster.device == "cpu"):
        raise InputError("cluster.ranks: give the number of ranks of a gang, 2 or more; on GPUs it is those of a node.")
    return cluster.ranks or min(with_gpus)


def generation_sharding(cluster: ClusterConfig) -> Generation:
    """How the model is spread that generates: as set, or as for extraction. It never decodes through stages."""
    if cluster.generation is not None:
        return cluster.generation
    return "whole" if cluster.sharding == "pipeline" else cluster.sharding


def offload_of(cluster: ClusterConfig, device: str) -> Offload:
    """Where weights wait."""
    folder = None if cluster.offload_folder is None else Path(cluster.offload_folder).expanduser()
    return Offload(to=cluster.offload_to or ("disk" if device == "cpu" else "cpu"), folder=folder)


def extraction_shares(job: Job, cluster: ClusterConfig, actors: int, device: str = "cpu") -> list[Share]:
    """Parts of a replica of so many actors. Nothing behind the last layer group that is asked for is ever run.

    Raises InputError if the layer groups don't allow so many stages.
    """
    groups = job.groups_run
    sharding = cluster.sharding
    cuts = actors if sharding == "pipeline" else min(actors, groups)
    try:
        boundaries = job.layout.stage_boundaries(cuts, groups)
    except ValueError as error:
        raise InputError(
            f"cluster.stages: {error}. Use fewer stages, or a new run with a smaller layer_group."
        ) from error
    written = [range(first, stop) for first, stop in pairwise(boundaries)]
    # Ranks see all layers, so each writes some; where there are more ranks than groups, the others write none.
    written += [range(0)] * (actors - len(written))
    return [
        Share(
            sharding=sharding,
            place=place,
            actors=actors,
            first=layers.start if sharding == "pipeline" else 0,
            stop=layers.stop if sharding == "pipeline" else boundaries[-1],
            written=layers,
            offload=offload_of(cluster, device) if sharding == "offload" else None,
        )
        for place, layers in enumerate(written)
    ]
