"""The part of the config that says where and how activations are stored."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

Precision = Literal["lossless", "16", "12", "10"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreConfig:
    """Where the run lives and how its arrays are laid out."""

    root: str = "runs"
    """Where the runs are: a folder that every node of the cluster sees, or s3://BUCKET/PATH, gs://..., az://...
    Credentials come from the environment or the cloud SDK's own files."""
    run: str = "run"
    """Name of the run: its folder under `root`. Letters, digits, '.', '_' and '-'."""
    grow: bool = False
    """Add to an existing run what the config has and the run lacks: roles, prompts, questions, samples (execution)."""
    precision: Precision = "16"
    """Kept mantissa bits of each float32 value (identity). 16 bits: rms error 1e-4 of a dimension's spread."""
    unit_rows: Annotated[int, Ge(1)] | None = None
    """Rollouts per unit, the R of chunks and shards (identity). Default: the largest divisor of the roles' row
    counts up to 128."""
    layer_group: Annotated[int, Ge(1)] | None = None
    """Layers per shard, the G of the layout (identity); stage boundaries are multiples of it. Default: a divisor of
    the number of layers that gives at least six groups."""
    lease_timeout: Annotated[float, Ge(1)] = 60.0
    """Seconds without a sign of life after which another host's driver counts as dead (execution)."""
    patience: Annotated[float, Ge(0)] = 300.0
    """Seconds for which a run that is at work waits for storage that fails, with growing pauses (execution)."""
