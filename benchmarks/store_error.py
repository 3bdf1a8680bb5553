"""Bytes and error of every precision, in units of what the values are used for.

Legend: R roles, N rows, L layers, D hidden, K components.
"""

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import subspace_angles
from store_data import Tiles

from personaspace.store.config import Precision
from personaspace.store.layout import Layout
from personaspace.store.schema import decode_shard, encode_shard

COMPONENTS = 10
BF16 = "bf16"
KINDS = (*get_args(Precision), BF16)


@dataclass
class RoleSums:
    """What one role adds to the statistics of one kind."""

    bytes: int
    mean_LD: NDArray[np.float64]
    squared_error_LD: NDArray[np.float64]


def measure_errors(tiles: Tiles) -> dict[str, Any]:
    """Kind -> bytes per value (but for bf16, whose files say it) and errors."""
    processes = os.cpu_count() or 1
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        roles = list(pool.map(_role, [tiles] * tiles.roles, range(tiles.roles)))
    layout = tiles.layout
    std_LD = _std([moments for moments, _ in roles], layout.rows)
    exact_RLD = np.stack([moments[0] / tiles.rows_per_role for moments, _ in roles])
    figures = {}
    for kind in KINDS:
        sums = [by_kind[kind] for _, by_kind in roles]
        rms_LD = np.sqrt(sum(s.squared_error_LD for s in sums) / layout.rows)
        mean_RLD = np.stack([s.mean_LD for s in sums])
        angle_L = [_angle(axis, exact) for axis, exact in zip(_axis(mean_RLD), _axis(exact_RLD), strict=True)]
        subspace_L, component_L = zip(
            *(_pca_angles(mean_RLD[1:, layer], exact_RLD[1:, layer]) for layer in range(layout.layers)), strict=True
        )
        stored = sum(s.bytes for s in sums)
        figures[kind] = {
            "bytes_per_value": stored / (layout.rows * layout.layers * layout.hidden) if stored else None,
            "worst_dimension_rms_over_std": float((rms_LD / std_LD).max()),
            "axis_angle_rad": float(max(angle_L)),
            "pca_subspace_angle_rad": float(max(subspace_L)),
            "pca_component_sin": float(max(component_L)),
            "pca_component_sin_median_layer": float(np.median(component_L)),
        }
    return figures


def _role(tiles: Tiles, role: int) -> tuple[tuple[Any, Any], dict[str, RoleSums]]:
    """Sum and sum of squares of the exact values, and what each kind makes of them."""
    exact_NLD = tiles.role_values(role)
    precise_NLD = exact_NLD.astype(np.float64)
    by_kind = {}
    for kind in KINDS:
        if kind == BF16:
            size, stored_NLD = 0, torch.from_numpy(exact_NLD).to(torch.bfloat16).to(torch.float64).numpy()
        else:
            size, stored = _through_store(exact_NLD, tiles.layout, cast(Precision, kind))
            stored_NLD = stored.astype(np.float64)
        by_kind[kind] = RoleSums(size, stored_NLD.mean(axis=0), ((stored_NLD - precise_NLD) ** 2).sum(axis=0))
    return (precise_NLD.sum(axis=0), (precise_NLD**2).sum(axis=0)), by_kind


def _through_store(
    exact_NLD: NDArray[np.float32], layout: Layout, precision: Precision
) -> tuple[int, NDArray[np.float32]]:
    """Bytes of the shards, and the values that they decode to."""
    size = 0
    read_NLD = np.empty_like(exact_NLD)
    for start in range(0, len(exact_NLD), layout.unit_rows):
        for group in range(layout.groups):
            layers = layout.group_layers(group)
            place = slice(start, start + layout.unit_rows), slice(layers.start, layers.stop)
            data = encode_shard(exact_NLD[place], layout, precision)
            size += len(data)
            read_NLD[place] = decode_shard(data, layout, len(layers))
    return size, read_NLD


def _std(moments: list[tuple[Any, Any]], rows: int) -> NDArray[np.float64]:
    mean_LD = sum(total for total, _ in moments) / rows
    std_LD: NDArray[np.float64] = np.sqrt(sum(squares for _, squares in moments) / rows - mean_LD**2)
    return std_LD


def _axis(mean_RLD: NDArray[np.float64]) -> NDArray[np.float64]:
    """The Assistant Axis of each layer: `default` minus the mean of the roles."""
    axis_LD: NDArray[np.float64] = mean_RLD[0] - mean_RLD[1:].mean(axis=0)
    return axis_LD


def _angle(one_D: NDArray[np.float64], other_D: NDArray[np.float64]) -> float:
    one_D, other_D = one_D / np.linalg.norm(one_D), other_D / np.linalg.norm(other_D)
    # Not the arc cosine, which knows no angle below 1e-8.
    return 2 * float(np.arcsin(np.clip(np.linalg.norm(one_D - other_D) / 2, 0, 1)))


def _pca_angles(one_RD: NDArray[np.float64], other_RD: NDArray[np.float64]) -> tuple[float, float]:
    """Largest angle between the spaces of the first components, and largest sine between two of one rank."""
    one_KD, other_KD = (
        np.linalg.svd(mean_RD - mean_RD.mean(axis=0), full_matrices=False)[2][: min(COMPONENTS, len(mean_RD) - 1)]
        for mean_RD in (one_RD, other_RD)
    )
    sines = [np.sin(min(_angle(a, b), _angle(a, -b))) for a, b in zip(one_KD, other_KD, strict=True)]
    return float(subspace_angles(one_KD.T, other_KD.T).max()), float(max(sines))
