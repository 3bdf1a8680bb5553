"""Activation caps: thresholds on the Assistant Axis, and what they would touch (arXiv 2601.10387, section 5).

The paper's cap keeps a token's projection on the axis from falling below a threshold tau:
h <- h - v min(<h, v> - tau, 0), with v the unit axis, which points to the Assistant. Files of the reference project
hold the same thing seen from the other side: a vector away from the Assistant, and the highest projection on it that
is allowed. That vector is -axis, and its `cap` is -tau.

A percentile p is counted from the Assistant's end, as in the reference project: p percent of the rollouts lie on the
Assistant's side of the threshold, where a cap leaves them alone, and the others are touched. So the lower, the
stronger. On the axis, which points the other way, p is the (100 - p)th percentile.

"Raw" projections are <x, v> of mean-pooled x, not centred on anything, in units of the residual stream: what a hook
compares with tau. Shape suffixes: N rollouts, L layers, P percentiles, G groups, R ranges of layers, Q quantiles.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from personaspace.analysis.caps.ranges import PERCENTILES, Over, check_ranges, range_id, suggested_ranges
from personaspace.analysis.groups import PARTS, part_of
from personaspace.store.errors import InputError
from personaspace.store.formats.directions import CappingConfig, CapVector
from personaspace.store.location import Location, open_folder
from personaspace.store.manifest import Manifest, require_manifest
from personaspace.store.objects import Folder
from personaspace.store.reader import open_run
from personaspace.store.space import open_space

Floats = NDArray[np.float64]
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Of each group's projections, towards the Assistant: lowest first."""
SITE = "resid_post"
"""What a hook at a block's output can cap."""


def compute_caps(
    run: Location,
    *,
    over: Over = "all",
    percentiles: Sequence[float] = PERCENTILES,
    ranges: Sequence[range] | None = None,
) -> xr.Dataset:
    """Thresholds of every fitted layer, exact over the chosen rollouts of ``run``'s latest fit, and what they touch.

    ``over``: whose projections the percentiles are of: `all` (default, roles and both poles of traits, as in the
    paper), `roles`, or `default`. ``percentiles``: percent, from the Assistant's end. ``ranges``: layers that are
    capped together; default: `suggested_ranges`. Memory holds one layer's projections, and a bit for each rollout,
    range and percentile. Variables, in units of the residual stream where not said otherwise:

    - ``threshold`` (percentile, layer): tau; ``cap`` (percentile, layer): -tau, the reference files' number.
    - ``touched`` (group, percentile, layer): share of the group's rollouts that lie beyond it.
    - ``touched_anywhere`` (group, range, percentile): share that lies beyond it in one of the range's layers or more.
    - ``projection`` (group, quantile, layer): quantiles of each group's projections.
    - ``default_mean``, ``role_mean`` (layer): projections of the default vector, and of the mean of the role vectors.
    - ``default_percentile`` (layer): percent of the chosen rollouts on the Assistant's side of ``default_mean``.

    Raises InputError where there is no fit, where it is not of the residual stream after blocks, and for percentiles,
    groups and ranges that can't be.
    """
    folder = open_folder(run)
    manifest, space = require_manifest(folder), open_space(folder)
    _check(space, folder, over, percentiles)
    layers = [int(layer) for layer in space["layer"].values]
    if ranges is None:
        ranges = [chosen for chosen in suggested_ranges(manifest.layout.layers) if set(chosen) <= set(layers)]
    check_ranges(ranges, layers)
    group_N = rollout_groups(space, manifest)
    chosen_N = group_N >= 0 if over == "all" else group_N == PARTS.index(over)
    if not chosen_N.any():
        raise InputError(f"{folder.url}: the fit has no rollouts of {over!r}; take the percentiles over others.")
    members = {name: group_N == number for number, name in enumerate(PARTS) if (group_N == number).any()}
    share_P = np.array(percentiles, dtype=np.float64) / 100
    cap_PL = np.empty((len(share_P), len(layers)))
    touched_GPL = np.empty((len(members), *cap_PL.shape))
    projection_GQL = np.empty((len(members), len(QUANTILES), len(layers)))
    beyond_RNP = np.zeros((len(ranges), len(group_N), len(share_P)), dtype=bool)
    means_L = []
    for place, (layer, raw_N, means) in enumerate(raw_projections(space, open_run(folder))):
        # Seen from the other side first, so that ties and interpolation are those of the reference project.
        cap_PL[:, place] = np.quantile(-raw_N[chosen_N], share_P)
        touched_NP = -raw_N[:, None] > cap_PL[:, place]
        for number, member_N in enumerate(members.values()):
            touched_GPL[number, :, place] = touched_NP[member_N].mean(axis=0)
            projection_GQL[number, :, place] = np.quantile(raw_N[member_N], QUANTILES)
        for number, chosen in enumerate(ranges):
            if layer in chosen:
                beyond_RNP[number] |= touched_NP
        means_L.append((*means, 100 * float((raw_N[chosen_N] > means[0]).mean())))
    anywhere_GRP = np.stack([beyond_RNP[:, member_N].mean(axis=1) for member_N in members.values()])
    default_L, role_L, percentile_L = np.array(means_L).T
    return xr.Dataset(
        {
            "threshold": (("percentile", "layer"), -cap_PL),
            "cap": (("percentile", "layer"), cap_PL),
            "touched": (("group", "percentile", "layer"), touched_GPL),
            "touched_anywhere": (("group", "range", "percentile"), anywhere_GRP),
            "projection": (("group", "quantile", "layer"), projection_GQL),
            "default_mean": (("layer",), default_L),
            "role_mean": (("layer",), role_L),
            "default_percentile": (("layer",), percentile_L),
        },
        coords={
            "layer": layers,
            "percentile": list(map(float, percentiles)),
            "group": list(members),
            "group_count": ("group", [int(member_N.sum()) for member_N in members.values()]),
            "range": [range_id(chosen) for chosen in ranges],
            "range_start": ("range", [chosen.start for chosen in ranges]),
            "range_stop": ("range", [chosen.stop for chosen in ranges]),
            "quantile": list(QUANTILES),
        },
        attrs={
            "over": over,
            "over_count": int(chosen_N.sum()),
            "target_layer": int(space.attrs["target_layer"]),
            "identity_hash": manifest.identity_hash,
            "fitted": str(space.attrs["fitted"]),
        },
    )


def raw_projections(space: xr.Dataset, run: xr.Dataset) -> Iterator[tuple[int, Floats, tuple[float, float]]]:
    """(layer, <x, v> of every rollout of the fit ``(N,)``, those of default vector and mean role), layer by layer.

    Within 1e-6 of a layer's spread, without a pass over the activations: from the stored positions
    (x - origin) . axis / |axis|^2. Only the constant <origin, v> is taken from the activations of one unit, since
    vectors that were rounded to float32 miss it where the mean of the residual stream is long.
    """
    x_NLD, row_N = run[str(space.attrs["array"])], space["rollout_row"].values
    unit_rows = x_NLD.data.chunksize[0]
    unit_N = np.flatnonzero(row_N // unit_rows == row_N[0] // unit_rows)
    for layer in space["layer"].values:
        here = space.sel(layer=layer)
        axis_D = here["axis"].values.astype(np.float64)
        length = float(np.linalg.norm(axis_D))
        if not length:
            raise InputError(f"Layer {layer}: the axis is zero: default and roles are the same, so there is no cap.")
        along_N = here["rollout_position"].values.astype(np.float64) * length
        x_ND = x_NLD.sel(layer=layer).isel(rollout=row_N[unit_N]).values.astype(np.float64)
        role_mean = float((x_ND @ (axis_D / length) - along_N[unit_N]).mean())
        yield int(layer), along_N + role_mean, (role_mean + length, role_mean)


def rollout_groups(space: xr.Dataset, manifest: Manifest) -> NDArray[np.intp]:
    """Place in ``groups.PARTS`` of each rollout of the fit ``(N,)``; -1 for conversations."""
    parts = {str(role["id"]): part_of(role) for role in manifest.tables["roles"]}
    place = {role: -1 if part is None else PARTS.index(part) for role, part in parts.items()}
    return np.array([place[str(role)] for role in space["rollout_role"].values], dtype=np.intp)


def capping_config(space: xr.Dataset, caps: xr.Dataset) -> CappingConfig:
    """An experiment for each range and percentile of ``caps``, by the reference project's ids, on -axis.

    The vectors are as long as the axis: whoever applies a cap divides by the norm.
    """
    ranges = cap_ranges(caps)
    used = sorted({layer for chosen in ranges for layer in chosen})
    vectors = {
        vector_name(layer): CapVector(layer=layer, vector_D=-space["axis"].sel(layer=layer).values.astype(np.float32))
        for layer in used
    }
    experiments = {
        experiment_id(chosen, percentile): tuple(
            (vector_name(layer), float(caps["cap"].sel(percentile=percentile, layer=layer))) for layer in chosen
        )
        for chosen in ranges
        for percentile in caps["percentile"].values.tolist()
    }
    return CappingConfig(vectors=vectors, experiments=experiments)


def cap_ranges(caps: xr.Dataset) -> list[range]:
    """The ranges of layers of a Dataset of ``compute_caps``."""
    starts, stops = caps["range_start"].values.tolist(), caps["range_stop"].values.tolist()
    return [range(start, stop) for start, stop in zip(starts, stops, strict=True)]


def experiment_id(layers: range, percentile: float) -> str:
    """Such as `layers_46:54-p0.25`: blocks 46 to 53, a quarter of the rollouts left alone."""
    return f"layers_{range_id(layers)}-p{percentile / 100:g}"


def vector_name(layer: int) -> str:
    """Name of a layer's vector, which points away from the Assistant."""
    return f"layer_{layer}/roles_minus_default"


def _check(space: xr.Dataset, folder: Folder, over: str, percentiles: Sequence[float]) -> None:
    array = str(space.attrs["array"])
    if not array.startswith(SITE):
        raise InputError(
            f"{folder.url}: the fit is of {array}; caps act on the residual stream after a block, so fit an array of "
            f"{SITE}: `personaspace fit {folder.url} --analysis.array {SITE}_mean`."
        )
    if over not in ("all", "roles", "default"):
        raise InputError(f"caps --over: {over!r}; allowed are all, roles and default.")
    if not percentiles:
        raise InputError("caps --percentiles: none is given; the paper's are 1 25 50 75.")
    for percentile in percentiles:
        if not 0 < percentile < 100:
            raise InputError(f"caps --percentiles: {percentile:g}; give percent above 0 and below 100, such as 25.")
    names = [f"{percentile / 100:g}" for percentile in percentiles]
    if len(set(names)) < len(names):
        raise InputError("caps --percentiles: one is given twice; give each once.")
