"""From what was computed of each layer to the Dataset in ``space/``, which report, compare, drift and caps read.

Shape suffixes: L layers, R role vectors, T traits, D hidden, K components, N rollouts.
"""

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from personaspace.analysis.evidence import RESAMPLED
from personaspace.analysis.layer_fit import LayerFit
from personaspace.analysis.space import VARIANCE_THRESHOLDS, layer_signs

Floats = NDArray[np.floating]
BOUNDS = ("low", "high")
NULLS = {
    "cos_axis_pc1": "cos_null_p99",
    "kind_auc": "kind_auc_null_p99",
    "rank_correlation": "rank_correlation_null_p99",
}
"""Measure -> the 99th percentile of its null."""


def space_dataset(fitted: Sequence[LayerFit], layers: Sequence[int]) -> xr.Dataset:
    """All layers in one Dataset, float32, still without coordinates of roles and rollouts."""

    def stack(read: Callable[[LayerFit], Any]) -> Floats:
        return np.stack([np.asarray(read(layer)) for layer in fitted])

    sign_LK = layer_signs([layer.space.component_KD for layer in fitted])
    component_LKD = stack(lambda fit: fit.space.component_KD) * sign_LK[:, :, None]
    axis_LD, origin_LD = stack(lambda fit: fit.space.axis_D), stack(lambda fit: fit.space.origin_D)
    role_LRD, trait_LTD = stack(lambda fit: fit.space.role_RD), stack(lambda fit: fit.trait_TD)
    centred_LRD = role_LRD - origin_LD[:, None]
    score_LRK = np.einsum("lrd,lkd->lrk", centred_LRD, component_LKD)
    norm_L = np.linalg.norm(axis_LD, axis=1)
    unit_LD = axis_LD / norm_L[:, None]
    pooled_LKD = _alike([fit.pooled.component_KD for fit in fitted])
    arrays: dict[str, tuple[tuple[str, ...], Floats]] = {
        "axis": (("layer", "hidden"), axis_LD),
        "axis_norm": (("layer",), norm_L),
        "default_vector": (("layer", "hidden"), stack(lambda fit: fit.space.default_D)),
        "role_vector": (("role", "layer", "hidden"), role_LRD.swapaxes(0, 1)),
        "component_vector": (("layer", "component", "hidden"), component_LKD),
        "explained_variance_ratio": (("layer", "component"), stack(lambda fit: fit.space.variance_ratio_K)),
        "components_needed": (("layer", "variance"), stack(lambda fit: fit.space.needed_T)),
        "role_score": (("role", "layer", "component"), score_LRK.swapaxes(0, 1)),
        "role_component_cosine": (
            ("role", "layer", "component"),
            (score_LRK / np.linalg.norm(centred_LRD, axis=2)[:, :, None]).swapaxes(0, 1),
        ),
        # default - origin is the axis itself.
        "default_score": (("layer", "component"), np.einsum("ld,lkd->lk", axis_LD, component_LKD)),
        "role_position": (("role", "layer"), (np.einsum("lrd,ld->lr", centred_LRD, unit_LD) / norm_L[:, None]).T),
        "rollout_position": (("rollout", "layer"), stack(lambda fit: fit.position_N).T),
        "rollout_score": (
            ("rollout", "layer", "component"),
            (stack(lambda fit: fit.score_NK) * sign_LK[:, None]).swapaxes(0, 1),
        ),
        "rollout_component_vector": (("layer", "component", "hidden"), pooled_LKD),
        "rollout_explained_variance_ratio": (
            ("layer", "component"),
            _alike([fit.pooled.variance_ratio_K for fit in fitted]),
        ),
        "rollout_mean": (("layer", "hidden"), stack(lambda fit: fit.mean_D)),
        "rollout_norm": (("layer",), stack(lambda fit: fit.norm)),
        "rollout_pc1_axis_cosine": (("layer",), np.abs(np.einsum("ld,ld->l", pooled_LKD[:, 0], unit_LD))),
        "length_correlation": (("layer",), stack(lambda fit: fit.length_correlation[0])),
        "length_correlation_within": (("layer",), stack(lambda fit: fit.length_correlation[1])),
        **_evidence(fitted),
    }
    if trait_LTD.shape[1]:
        length_LT = np.linalg.norm(trait_LTD, axis=2)
        along_LTK = np.einsum("ltd,lkd->ltk", trait_LTD, component_LKD) / length_LT[:, :, None]
        arrays |= {
            "trait_vector": (("trait", "layer", "hidden"), trait_LTD.swapaxes(0, 1)),
            "trait_axis_cosine": (("trait", "layer"), (np.einsum("ltd,ld->lt", trait_LTD, unit_LD) / length_LT).T),
            "trait_component_cosine": (("trait", "layer", "component"), along_LTK.swapaxes(0, 1)),
        }
    components = component_LKD.shape[1]
    # The pooled PCA is cut to as many components as the roles have, so that both share a dimension.
    kept = {name: (dims, _cut(values, dims, components)) for name, (dims, values) in arrays.items()}
    return xr.Dataset(
        {name: (dims, values.astype(np.float32)) for name, (dims, values) in kept.items()},
        coords={
            "layer": np.array(layers, dtype=np.int32),
            "variance": list(VARIANCE_THRESHOLDS),
            "resampled": text(RESAMPLED),
            "bound": text(BOUNDS),
        },
    )


def suggest_layer(space: xr.Dataset) -> tuple[int, str]:
    """The layer whose axis is clearest, and why, for people.

    Each measure with a null is put on a scale where the null's 99th percentile is 0 and a perfect value 1; the layer
    with the largest mean wins. The lowest one of equals.
    """
    share_L = {name: ((space[name] - space[null]) / (1 - space[null])).values for name, null in NULLS.items()}
    known = [name for name, values in share_L.items() if np.isfinite(values).all()]
    if not known:
        return int(space["layer"].values[space.sizes["layer"] // 2]), "the middle: no measure could be computed"
    mean_L = np.mean([share_L[name] for name in known], axis=0)
    best = int(np.argmax(mean_L))
    found = ", ".join(f"{name} {float(space[name][best]):.2f}" for name in known)
    verdict = "above" if mean_L[best] > 0 else "not above"
    return int(space["layer"].values[best]), f"farthest above the nulls ({found}); on average {verdict} them"


def text(values: Sequence[str]) -> NDArray[Any]:
    """Variable-length strings, the only kind that Zarr v3 stores without a warning."""
    return np.array(values, dtype=np.dtypes.StringDType())


def _evidence(fitted: Sequence[LayerFit]) -> dict[str, tuple[tuple[str, ...], Floats]]:
    found: dict[str, tuple[tuple[str, ...], Floats]] = {}
    for name, null_name in NULLS.items():
        found[name] = (("layer",), np.array([getattr(fit.evidence.observed, name) for fit in fitted]))
        null = np.array([getattr(fit.evidence.null_p99, name) for fit in fitted])
        found[null_name] = (("layer",), null)
        found[f"{name}_interval"] = _intervals(fitted, attrgetter(name))
    found["cos_random_p99"] = (("layer",), np.array([fit.evidence.cos_random_p99 for fit in fitted]))
    dims, position_LSBR = _intervals(fitted, attrgetter("position_R"))
    # Only roles that the axis rests on are resampled; they come first.
    missing = len(fitted[0].space.role_RD) - position_LSBR.shape[-1]
    padded = np.pad(position_LSBR, ((0, 0), (0, 0), (0, 0), (0, missing)), constant_values=np.nan)
    found["role_position_interval"] = (("role", *dims), np.moveaxis(padded, -1, 0))
    nothing = dict.fromkeys(RESAMPLED, (np.nan, np.nan))
    auc_L = [np.nan if fit.default_auc is None else fit.default_auc.auc for fit in fitted]
    interval_L = [nothing if fit.default_auc is None else fit.default_auc.interval for fit in fitted]
    found["default_auc"] = (("layer",), np.array(auc_L))
    found["default_auc_interval"] = (
        dims,
        np.array([[interval[name] for name in RESAMPLED] for interval in interval_L]),
    )
    return found


def _intervals(fitted: Sequence[LayerFit], read: Callable[[Any], Any]) -> tuple[tuple[str, ...], Floats]:
    values = [
        [[read(bound) for bound in fit.evidence.intervals[resampled]] for resampled in RESAMPLED] for fit in fitted
    ]
    return ("layer", "resampled", "bound"), np.array(values)


def _alike(values: Sequence[Floats]) -> Floats:
    """Stacked layers, cut to the number of components that all of them have."""
    components = min(len(of_layer) for of_layer in values)
    return np.stack([of_layer[:components] for of_layer in values])


def _cut(values: Floats, dims: tuple[str, ...], components: int) -> Floats:
    if "component" not in dims:
        return values
    return values[tuple(slice(components) if dim == "component" else slice(None) for dim in dims)]
