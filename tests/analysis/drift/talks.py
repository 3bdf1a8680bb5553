"""Conversations with a known way through a known space, for the tests of drift and its page."""

from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from personaspace.analysis.drift.run import Talk
from personaspace.analysis.drift.trajectories import trajectories

HIDDEN = 24
DEFAULTS = 400
EVIL = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1> & \ud83d"
TOPICS = {"coding": "A report that is too slow", "therapy": "Nobody here to talk to", "philosophy": "What answers?"}


def a_space(layers: int = 4, components: int = 4) -> xr.Dataset:
    """Axis along the first dimension, twice as long at each further layer; components along the next dimensions.

    The default rollouts' positions are spread evenly from 0.5 to 1.5, their scores from -1 to 1.
    """
    generator = np.random.default_rng(3)
    axis_LD = np.zeros((layers, HIDDEN))
    axis_LD[:, 0] = 2.0 ** np.arange(layers)
    origin_LD = generator.normal(size=(layers, HIDDEN))
    component_LKD = np.broadcast_to(np.eye(HIDDEN)[1 : components + 1], (layers, components, HIDDEN))
    even_N = np.linspace(-1, 1, DEFAULTS)
    roles_N = generator.normal(size=100) - 2
    data: dict[str, Any] = {
        "axis": (("layer", "hidden"), axis_LD),
        "default_vector": (("layer", "hidden"), origin_LD + axis_LD),
        "component_vector": (("layer", "component", "hidden"), component_LKD),
        "rollout_position": (
            ("rollout", "layer"),
            np.broadcast_to(np.concatenate([roles_N, 1 + even_N / 2])[:, None], (500, layers)),
        ),
        "rollout_score": (
            ("rollout", "layer", "component"),
            np.broadcast_to(np.concatenate([roles_N, even_N])[:, None, None], (500, layers, components)),
        ),
    }
    roles = np.array(["ghost"] * 100 + ["default"] * DEFAULTS, dtype=object)
    coords = {"layer": np.arange(layers), "rollout_role": ("rollout", roles)}
    attrs = {"array": "resid_post_mean", "target_layer": layers // 2, "fitted": "2026-11-22T00:00:00Z"}
    return xr.Dataset(data, coords, attrs)


def spans_of(
    ways: list[list[float]], space: xr.Dataset, scores: NDArray[np.float64] | None = None, first_row: int = 0
) -> xr.Dataset:
    """Turns at the positions of ``ways``, one list for each conversation; NaN for a turn that is not there.

    ``scores (span, component)``: along the components; default 0.
    """
    places = [(row, turn, x) for row, way in enumerate(ways) for turn, x in enumerate(way) if not np.isnan(x)]
    rows, turns, x_S = (np.array(column) for column in zip(*places, strict=True))
    axis_LD = space["axis"].values
    x_SLD = space["default_vector"].values - axis_LD + x_S[:, None, None] * axis_LD
    if scores is not None:
        x_SLD = x_SLD + np.einsum("sk,lkd->sld", scores, space["component_vector"].values)
    coords = {
        "rollout": ("span", rows + first_row),
        "turn": ("span", turns),
        "part": ("span", np.array(["whole"] * len(rows), dtype=object)),
        "count": ("span", 10 + turns),
        "layer": space["layer"].values,
    }
    return xr.Dataset({"resid_post_mean": (("span", "layer", "hidden"), x_SLD)}, coords, {"run": "runs/talks"})


def some_talks(count: int = 9, turns: int = 6, layers: int = 4) -> tuple[xr.Dataset, dict[int, Talk]]:
    """A dataset as ``drift_of`` gives it, and its talks: therapy drifts away, coding stays, philosophy wavers."""
    generator = np.random.default_rng(5)
    domains = [list(TOPICS)[number % 3] for number in range(count)]
    slope = {"coding": 0.0, "therapy": -0.25, "philosophy": -0.05}
    ways = [
        (0.95 + slope[domain] * np.arange(turns) + 0.08 * generator.normal(size=turns)).tolist() for domain in domains
    ]
    drift = trajectories(spans_of(ways, a_space(layers)), a_space(layers))
    drift.attrs |= {"run": "runs/talks", "space": "runs/demo", "model": "SmolLM2-135M-Instruct", "single_turn": 0}
    drift.attrs |= {"target_layer": 2, "fitted": "2026-11-22T00:00:00Z", "notes": []}
    labels = {
        "domain": domains,
        "scenario": [f"{domain}.number_{number}" for number, domain in enumerate(domains)],
        "topic": [f"{TOPICS[domain]} ({number})." for number, domain in enumerate(domains)],
        "rollout_id": [f"{number:016x}" for number in range(count)],
    }
    texts = {name: ("conversation", np.array(of, dtype=object)) for name, of in labels.items()}
    answer = "I hear you, and I am sorry. Let's look at it together, step by step; there is no hurry at all. "
    talks = {
        row: Talk(
            row=row,
            system="You are patient." if row % 2 else "",
            turns={turn: (f"And then, {turn}? What would you do?", answer * (1 + turn % 3)) for turn in range(turns)},
            written_by="SmolLM2-135M-Instruct",
        )
        for row in range(count)
    }
    return drift.assign_coords(texts | {"sample": ("conversation", np.zeros(count, np.int32))}), talks
