"""Persona drift: where each turn of a conversation lies in a persona space, and how that moves from turn to turn.

`trajectories` is pure: activations of turns (``store.open_spans``) and a fitted space (``store.space.open_space``) give
positions on the Assistant Axis and scores of the leading components, beside the range of the default rollouts, as in
section 5 of "The Assistant Axis" (arXiv 2601.10387). A position is ``(x - origin) . axis / |axis|^2``: 0 is the mean
role, 1 the mean of `default`.

Shape suffixes: S spans, C conversations, T turns, P pairs of turns, L layers, K components, D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy import stats

from personaspace.store.errors import InputError
from personaspace.store.formats.role_names import DEFAULT_ROLE
from personaspace.store.layout import ranges

Floats = NDArray[np.float64]

QUANTILES = (0.05, 0.95)
"""Of the default rollouts: the ends of the default range."""
COMPONENTS = 3
"""Leading principal components that turns are scored on."""
MIN_SLOPE_TURNS = 4
"""Fewest turns whose pairwise slopes can enclose a 95% interval."""
BOUNDS = ["low", "high"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Movement:
    """How some conversations move at one layer: all of them, or those of one domain."""

    name: str
    """Of the domain, or `all`."""
    conversations: int
    drift: float
    """Mean over conversations of the last position less the first."""
    drift_interval: tuple[float, float]
    """95% interval of that mean over conversations (Student's t); NaN for fewer than two."""
    first_below: float
    """Share of the conversations whose first turn lies below the default range already; 0.05 for default rollouts."""
    later_below: float
    """Share of all later turns that do."""
    left: int
    """Conversations that begin in or above the range, and have a turn below it."""


def trajectories(spans: xr.Dataset, space: xr.Dataset, *, layers: Sequence[int] | None = None) -> xr.Dataset:
    """Where every turn of all conversations of two turns or more lies, and how each conversation moves.

    ``spans``: activations by turn, dims ``(span, layer, hidden)``; only whole turns are used. ``space``: a fit of the
    same model, site and pooling. ``layers``: default all that both have. Returns float64, unitless, NaN where a
    conversation has no such turn:

    - ``position (conversation, turn, layer)``, ``score (conversation, turn, layer, component)``;
    - ``default_position (layer, bound)``, ``default_score (layer, component, bound)``: the 5% and 95% quantiles of the
      default rollouts, the default range;
    - ``drift (conversation, layer)``: last position less the first; ``slope (conversation, layer)`` per turn
      (Theil-Sen) and its 95% ``slope_interval (.., bound)``, NaN below four turns;
    - ``below``, ``above (conversation, layer)``: turns outside the range; ``first_below``: the first turn below it,
      0-based, or -1.

    Coordinates: ``conversation`` (row of ``open_run``), ``turn`` (0-based), ``tokens (conversation, turn)``, ``turns``.
    Raises InputError for arrays, sizes and layers that don't fit together, and where there is no conversation.
    """
    array = str(space.attrs["array"])
    if array not in spans:
        raise InputError(f"{_of(spans)}: has turns of {', '.join(map(str, spans.data_vars))}; the space is of {array}.")
    if spans.sizes["hidden"] != space.sizes["hidden"]:
        raise InputError(
            f"{_of(spans)}: turns of {spans.sizes['hidden']} dimensions, and a space of {space.sizes['hidden']}; fit a "
            "space of the same model."
        )
    chosen = _layers(spans, space, layers)
    place_S, conversation_C = _conversations(spans)
    at = space.sel(layer=chosen)
    projected_SLP = _project(spans[array].isel(span=place_S).sel(layer=chosen), at)
    turn_S, rollout_S = spans["turn"].values[place_S], spans["rollout"].values[place_S]
    where = (np.searchsorted(conversation_C, rollout_S), turn_S)
    shape = (len(conversation_C), int(turn_S.max()) + 1)
    projected_CTLP = np.full((*shape, *projected_SLP.shape[1:]), np.nan)
    projected_CTLP[where] = projected_SLP
    tokens_CT = np.zeros(shape, dtype=np.int32)
    tokens_CT[where] = spans["count"].values[place_S]
    position_CTL = projected_CTLP[..., 0]
    measured: dict[str, tuple[tuple[str, ...], Any]] = {
        "position": (("conversation", "turn", "layer"), position_CTL),
        "score": (("conversation", "turn", "layer", "component"), projected_CTLP[..., 1:]),
        **_default_range(at),
    }
    measured |= _movement(position_CTL, tokens_CT > 0, measured["default_position"][1])
    return xr.Dataset(
        measured,
        coords={
            "conversation": conversation_C,
            "turn": np.arange(shape[1]),
            "layer": chosen,
            "bound": BOUNDS,
            "component": np.arange(projected_CTLP.shape[-1] - 1),
            "tokens": (("conversation", "turn"), tokens_CT),
            "turns": ("conversation", (tokens_CT > 0).sum(1)),
        },
        attrs={
            "array": array,
            "quantiles": list(QUANTILES),
            "default_count": int((at["rollout_role"].values == DEFAULT_ROLE).sum()),
        },
    )


def movements(drift: xr.Dataset, layer: int, by: str = "domain") -> list[Movement]:
    """How the conversations of ``trajectories`` move at a layer: all together, then by a coordinate, if it is there.

    Conversations of the same scenario are no independent draws, and the intervals take them for such.
    """
    at = drift.sel(layer=layer)
    groups = {"all": np.ones(at.sizes["conversation"], dtype=bool)}
    if by in at.coords:
        names = at[by].values
        groups |= {str(name): names == name for name in dict.fromkeys(names)} if len(set(names)) > 1 else {}
    low = float(at["default_position"].sel(bound="low"))
    position_CT, present_CT = at["position"].values, at["tokens"].values > 0
    first_C = present_CT.argmax(axis=1)
    starts_below_C = position_CT[np.arange(len(first_C)), first_C] < low
    below_C = at["below"].values
    found = []
    for name, chosen_C in groups.items():
        drift_C = at["drift"].values[chosen_C]
        later = int(present_CT[chosen_C].sum()) - len(drift_C)
        found.append(
            Movement(
                name=name,
                conversations=len(drift_C),
                drift=float(drift_C.mean()),
                drift_interval=mean_interval(drift_C),
                first_below=float(starts_below_C[chosen_C].mean()),
                later_below=float((below_C - starts_below_C)[chosen_C].sum() / later),
                left=int(((below_C > 0) & ~starts_below_C)[chosen_C].sum()),
            )
        )
    return found


def _of(spans: xr.Dataset) -> str:
    return str(spans.attrs.get("run", "spans"))


def _layers(spans: xr.Dataset, space: xr.Dataset, asked: Sequence[int] | None) -> list[int]:
    """The layers to use, in order."""
    shared = sorted({int(layer) for layer in spans["layer"].values} & {int(layer) for layer in space["layer"].values})
    missing = [layer for layer in asked or () if layer not in shared]
    if missing or not shared:
        has = f"they share {ranges(shared)}" if shared else "they share none"
        wanted = f"layer {missing[0]}: not" if missing else "no layer is"
        raise InputError(f"{_of(spans)}: {wanted} in both the turns and the space; {has}.")
    return shared if asked is None else sorted(set(asked))


def _conversations(spans: xr.Dataset) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
    """Places of the spans that are whole turns of a conversation of two or more, and the conversations' rollouts."""
    whole_S = np.flatnonzero(spans["part"].values == "whole")
    rollout_C, turns_C = np.unique(spans["rollout"].values[whole_S], return_counts=True)
    conversation_C = rollout_C[turns_C >= 2].astype(np.int64)
    if not len(conversation_C):
        raise InputError(
            f"{_of(spans)}: no conversation of two turns or more is extracted yet, and with fewer nothing can drift. "
            "Let extraction go on, or hold conversations (docs/conversations.md)."
        )
    return whole_S[np.isin(spans["rollout"].values[whole_S], conversation_C)], conversation_C


def _project(x_SLD: xr.DataArray, space: xr.Dataset) -> Floats:
    """Position, then scores: ``(S, L, 1 + K)``, read shard by shard where ``x_SLD`` is lazy."""
    axis_LD = space["axis"].astype(np.float64)
    # The origin is the mean of the role vectors, and axis = default - origin.
    origin_LD = space["default_vector"].astype(np.float64) - axis_LD
    scale_LD = (axis_LD / (axis_LD**2).sum("hidden")).expand_dims(direction=1)
    component_LKD = space["component_vector"].isel(component=slice(COMPONENTS)).astype(np.float64)
    direction_LPD = xr.concat([scale_LD, component_LKD.rename(component="direction")], dim="direction").compute()
    centred_SLD = x_SLD.astype(np.float64) - origin_LD.compute()
    projected: Floats = xr.dot(centred_SLD, direction_LPD, dim="hidden").transpose("span", "layer", "direction").values
    return projected


def _default_range(space: xr.Dataset) -> dict[str, tuple[tuple[str, ...], Any]]:
    default_N = np.flatnonzero(space["rollout_role"].values == DEFAULT_ROLE)
    if not len(default_N):
        raise InputError(
            "the space has no position of a `default` rollout, so there is no default range; fit it again."
        )
    own = space.isel(rollout=default_N)
    position_NL = own["rollout_position"].transpose("rollout", "layer").values.astype(np.float64)
    score_NLK = own["rollout_score"].isel(component=slice(COMPONENTS)).transpose("rollout", "layer", "component").values
    return {
        "default_position": (("layer", "bound"), np.nanquantile(position_NL, QUANTILES, axis=0).T),
        "default_score": (
            ("layer", "component", "bound"),
            np.moveaxis(np.nanquantile(score_NLK.astype(np.float64), QUANTILES, axis=0), 0, -1),
        ),
    }


def _movement(
    position_CTL: Floats, present_CT: NDArray[np.bool_], range_L2: Floats
) -> dict[str, tuple[tuple[str, ...], Any]]:
    rows_C = np.arange(len(present_CT))
    first_C, last_C = present_CT.argmax(axis=1), present_CT.shape[1] - 1 - present_CT[:, ::-1].argmax(axis=1)
    below_CTL, above_CTL = position_CTL < range_L2[:, 0], position_CTL > range_L2[:, 1]
    slope_CL = np.full((len(rows_C), position_CTL.shape[2]), np.nan)
    interval_CL2 = np.full((*slope_CL.shape, 2), np.nan)
    for pattern_T in np.unique(present_CT, axis=0):
        alike_C = np.flatnonzero((present_CT == pattern_T).all(axis=1))
        turn_T = np.flatnonzero(pattern_T)
        slope_CL[alike_C], interval_CL2[alike_C] = _theil_sen(position_CTL[np.ix_(alike_C, turn_T)], turn_T)
    by_layer = ("conversation", "layer")
    return {
        "drift": (by_layer, position_CTL[rows_C, last_C] - position_CTL[rows_C, first_C]),
        "slope": (by_layer, slope_CL),
        "slope_interval": ((*by_layer, "bound"), interval_CL2),
        "below": (by_layer, below_CTL.sum(axis=1)),
        "above": (by_layer, above_CTL.sum(axis=1)),
        "first_below": (by_layer, np.where(below_CTL.any(axis=1), below_CTL.argmax(axis=1), -1)),
    }


def _theil_sen(y_CTL: Floats, turn_T: NDArray[np.intp]) -> tuple[Floats, Floats]:
    """Slopes ``(C, L)`` and 95% intervals ``(C, L, 2)`` of scipy.stats.theilslopes, all conversations at once."""
    early_P, late_P = np.triu_indices(len(turn_T), k=1)
    slope_CPL = (y_CTL[:, late_P] - y_CTL[:, early_P]) / (turn_T[late_P] - turn_T[early_P])[:, None]
    slope_CL = np.median(slope_CPL, axis=1)
    if len(turn_T) < MIN_SLOPE_TURNS:
        return slope_CL, np.full((*slope_CL.shape, 2), np.nan)
    # Sen (1968), as scipy has it: ranks of the sorted slopes from the variance of Kendall's statistic.
    n, pairs = len(turn_T), len(early_P)
    reach = stats.norm.ppf(0.975) * np.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    high, low = min(round((pairs + reach) / 2), pairs - 1), max(round((pairs - reach) / 2) - 1, 0)
    sorted_CPL = np.sort(slope_CPL, axis=1)
    return slope_CL, np.stack([sorted_CPL[:, low], sorted_CPL[:, high]], axis=-1)


def mean_interval(x_C: Floats) -> tuple[float, float]:
    """Student's 95% interval of the mean; NaN for fewer than two."""
    if len(x_C) < 2:
        return float("nan"), float("nan")
    reach = float(stats.t.ppf(0.975, len(x_C) - 1) * x_C.std(ddof=1) / np.sqrt(len(x_C)))
    return float(x_C.mean()) - reach, float(x_C.mean()) + reach
