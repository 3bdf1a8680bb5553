"""The part of the config that says how a run is carried out. All of it is execution: free to change on resume."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Gt

from personaspace.extract.config import VllmConfig

Device = Literal["auto", "cpu", "cuda"]
Sharding = Literal["pipeline", "tensor", "offload"]
Generation = Literal["whole", "tensor", "offload"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """Where the actors run, how many there are, and what is done when they fail."""

    address: str | None = None
    """Ray address. Default: the RAY_ADDRESS variable (set inside `ray job submit`), else a cluster of its own on
    this machine, shut down at the end."""
    device: Device = "auto"
    """`auto`: one GPU per actor if the cluster has GPUs, else the CPUs shared evenly."""
    replicas: Annotated[int, Ge(1)] | None = None
    """Copies of the model that work side by side. Default: as many as there is room for, at any time."""
    sharding: Sharding = "pipeline"
    """How a copy of the model is spread that extracts. `pipeline`: over stages of consecutive layers. `tensor`: every
    layer over all ranks of a DeepSpeed gang. `offload`: one actor, with weights in host memory or on disk."""
    generation: Generation | None = None
    """How a copy is spread that generates: `whole` on one device, `tensor`, or `offload` (slow). Default: as `sharding`
    says, but whole where that is `pipeline`, since stages can't decode."""
    vllm: VllmConfig = field(default_factory=VllmConfig)
    """For `generate.engine: vllm`. There `generation: tensor` spreads the model over `ranks` GPUs of one node."""
    stages: Annotated[int, Ge(1)] | None = None
    """Actors of a pipeline. Default: as few as the memory of a device allows."""
    ranks: Annotated[int, Ge(2)] | None = None
    """Actors of a gang, at most as many as the model has key-value heads. Default: the GPUs of a node."""
    offload_to: Literal["cpu", "disk"] | None = None
    """Where offloaded weights wait. Default: `cpu` for models on a GPU, `disk` for those on the CPU."""
    offload_folder: str | None = None
    """Folder on each node for weights that can't be read from the checkpoint as they are (experts, as a rule)."""
    transport: Literal["objects", "direct"] = "objects"
    """How hidden states go from stage to stage: as objects of Ray's, or from device to device with Ray Direct Transport
    (alpha in Ray; NCCL on GPUs, gloo on CPUs)."""
    in_flight: Annotated[int, Ge(1)] | None = None
    """Micro-batches on their way through a replica at once. Default: twice the stages, or less where the nodes' object
    stores are small."""
    attempts: Annotated[int, Ge(1)] = 2
    """Replicas that may be lost with a micro-batch on its way before it is put on trial. A rollout that is found to
    kill its worker is dropped with this reason; the rest of the micro-batch is kept."""
    stall_timeout: Annotated[float, Gt(0)] = 600.0
    """Seconds without any answer after which a replica that has work counts as hung, and is started anew."""
    start_timeout: Annotated[float, Gt(0)] = 3600.0
    """The same for one that loads its model."""
    wait_timeout: Annotated[float, Gt(0)] = 600.0
    """Seconds without any replica at work, on a cluster without room for one, after which the run stops. The same
    command resumes."""
    analysis_workers: Annotated[int, Ge(0)] | None = None
    """Dask workers on the cluster that fit the persona space, in actors that share the nodes' CPUs. 0: the threads of
    the driver's machine. Default: one worker for each node if the cluster has several, else 0."""
