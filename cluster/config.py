"""The part of the config that says how a run is carried out. All of it is execution: free to change on resume."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """Where the actors run and how many there are."""

    address: str | None = None
    """Ray address. Default: the RAY_ADDRESS variable (set inside `ray job submit`), else a cluster of its own on
    this machine, shut down at the end."""
    generators: Annotated[int, Ge(1)] = 1
    """Actors that generate, one whole model each."""
    stages: Annotated[int, Ge(1)] = 1
    """Actors that a replica's layers are spread over during extraction."""
    replicas: Annotated[int, Ge(1)] = 1
    """Chains of stages that extract side by side."""
    in_flight: Annotated[int, Ge(1)] | None = None
    """Micro-batches on their way through a replica at once. Default: twice the stages."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: one GPU per actor if the cluster has GPUs, else the CPUs shared evenly."""
