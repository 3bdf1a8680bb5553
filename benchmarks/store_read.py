"""Reading: time, and bytes from storage, of ours and of the peers, each in a process of its own."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import store_peers
import torch
from machine import bytes_read, can_drop_caches, drop_caches, isolated, median
from numpy.typing import NDArray
from store_data import Tiles

from personaspace.store import open_run, select
from personaspace.store.schema import RESID_POST_MEAN

QUESTIONS = ("layer", "role", "rows")
OURS = "ours"


def measure_reads(run: str, folder: Path, tiles: Tiles, repeats: int) -> dict[str, Any]:
    """Reader -> question -> seconds and bytes, medians over ``repeats``, with a cold and a warm page cache."""
    readers = (OURS, *store_peers.PEERS)
    figures = {reader: isolated(_measure, reader, run, folder, tiles, repeats) for reader in readers}
    for question in QUESTIONS:
        found = {
            reader: (by_question[question]["values"], by_question[question]["sum"])
            for reader, by_question in figures.items()
        }
        if not all(np.allclose(one, found[OURS], rtol=1e-2) for one in found.values()):
            raise SystemExit(f"{question}: the readers found other values (how many, sum of magnitudes): {found}")
    return figures


def random_rows(tiles: Tiles) -> NDArray[np.intp]:
    count = min(1000, tiles.layout.rows // 2)
    return np.sort(np.random.default_rng(1).choice(tiles.layout.rows, count, replace=False))


def _measure(reader: str, run: str, folder: Path, tiles: Tiles, repeats: int) -> dict[str, dict[str, float]]:
    figures: dict[str, dict[str, float]] = {}
    for question in QUESTIONS:
        read = _reader(reader, question, run, folder, tiles)
        values = read()[1]  # The first call imports what is still missing.
        figures[question] = {"values": float(np.prod(values.shape)), "sum": float(abs(values).sum(dtype=_wide(values)))}
        for cache in ("cold", "warm") if can_drop_caches() else ("warm",):
            figures[question] |= _repeat(read, cache, repeats)
    return figures


def _repeat(read: Callable[[], tuple[float, Any]], cache: str, repeats: int) -> dict[str, float]:
    taken: dict[str, list[float]] = {"s": [], "open_s": [], "read_bytes": [], "storage_bytes": []}
    for _ in range(repeats):
        if cache == "cold":
            drop_caches()
        before = bytes_read()
        start = time.perf_counter()
        opened, _ = read()
        taken["s"].append(time.perf_counter() - start)
        taken["open_s"].append(opened - start)
        for name, now, then in zip(("read_bytes", "storage_bytes"), bytes_read(), before, strict=True):
            taken[name].append(now - then)
    return {f"{cache}_{name}": median(values) for name, values in taken.items()}


def _wide(values: Any) -> Any:
    return np.float64 if isinstance(values, np.ndarray) else torch.float64


def _reader(reader: str, question: str, run: str, folder: Path, tiles: Tiles) -> Callable[[], tuple[float, Any]]:
    """A function that reads, and returns when it had opened, and the values."""
    layer, role, rows = tiles.layout.layers // 2, tiles.roles // 2, random_rows(tiles)

    def ours() -> tuple[float, Any]:
        opened = open_run(run)
        now = time.perf_counter()
        if question == "role":
            return now, select(opened, role=tiles.name(role))[RESID_POST_MEAN].values
        chosen = select(opened, layer=layer)
        return now, (chosen.isel(rollout=rows) if question == "rows" else chosen)[RESID_POST_MEAN].values

    def peer() -> tuple[float, Any]:
        now = time.perf_counter()
        if question == "role":
            return now, store_peers.read_role(reader, folder, tiles, role)
        if question == "layer":
            return now, store_peers.read_layer(reader, folder, tiles, layer)
        return now, store_peers.read_rows(reader, folder, tiles, layer, rows)

    return ours if reader == OURS else peer
