"""The part of the config that says how the model is changed while it runs. All of it is identity."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Gt, Lt

from personaspace.extract.config import Positions

Method = Literal["add", "ablate", "mean_ablate", "cap"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SteerConfig:
    """What is done to the residual stream, in generation and extraction alike. Default: nothing."""

    source: str | None = None
    """Where the direction comes from: a run with a fit (folder or URL), an axis (.safetensors, or the reference's
    .pt), or caps (.json of `personaspace caps`, or the reference's .pt). Default: no intervention."""
    method: Method = "cap"
    """`add`: h + c v. `ablate`: take out what lies along v. `mean_ablate`: set it to its mean over all rollouts. `cap`:
    lift the projection to a threshold where it falls below (the paper's cap)."""
    direction: str = "axis"
    """`axis` (to the Assistant), `PC1`, `PC2`, ... (as in the report), or the id of a role (from the mean role to it)
    or of a trait. Files of axes and caps hold `axis` only. Caps are along the axis."""
    layers: str | None = None
    """Such as `22-25` or `14`: blocks behind which it is done. Default: the fit's target layer for `add`, the paper's
    range at this depth for `cap`, all for the ablations; of a file of caps, those of the experiment."""
    coefficient: float | None = None
    """For `add`: how far along v, in units of `unit`. Below 0 is away from the Assistant."""
    unit: Literal["norm", "vector", "residual"] = "norm"
    """Of `coefficient`. `norm`: typical length of the residual stream there. `vector`: length of the direction itself,
    1 being the way from the mean role to default. `residual`: the stream's own unit."""
    percentile: Annotated[float, Gt(0), Lt(100)] | None = None
    """For `cap`, of a run: the lower, the stronger, as in `personaspace caps`. Default: 25, the paper's."""
    threshold: float | None = None
    """For `cap`, in place of a percentile: lowest allowed projection, in the residual stream's unit."""
    experiment: str | None = None
    """For `cap`, of a file of caps: id of the experiment, such as layers_22:26-p0.25."""
    positions: Positions = "all"
    """`all` tokens, or those of the `response` that is sampled, with its prompt left as it is."""
