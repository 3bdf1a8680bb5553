"""Reading: time, and bytes from storage, of ours and of the peers, each in a process of its own."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import store_peers
from numpy.typing import NDArray
from store_data import Tiles
from store_machine import bytes_read, can_drop_caches, drop_caches, isolated, median

from personaspace.store import open_run, select
from personaspace.store.schema import RESID_POST_MEAN

QUESTIONS = ("layer", "role", "rows")
OURS = "ours"


def measure_reads(run: str, folder: Path, tiles: Tiles, repeats: int) -> dict[str, Any]:
    """question -> reader -> seconds and bytes, medians over ``repeats``, with a cold and a warm page cache."""
    return {
        question: {
            reader: isolated(_measure, reader, question, run, folder, tiles, repeats)
            for reader in (OURS, *store_peers.PEERS)
        }
        for question in QUESTIONS
    }


def random_rows(tiles: Tiles) -> NDArray[np.intp]:
    count = min(1000, tiles.layout.rows // 2)
    return np.sort(np.random.default_rng(1).choice(tiles.layout.rows, count, replace=False))


def _measure(reader: str, question: str, run: str, folder: Path, tiles: Tiles, repeats: int) -> dict[str, float]:
    read = _reader(reader, question, run, folder, tiles)
    shape = tuple(read()[1].shape)  # The first call imports what is still missing.
    figures: dict[str, float] = {"values": float(np.prod(shape))}
    for cache in ("cold", "warm"):
        if cache == "cold" and not can_drop_caches():
            continue
        took, opening, called, fetched = [], [], [], []
        for _ in range(repeats):
            if cache == "cold":
                drop_caches()
            before = bytes_read()
            start = time.perf_counter()
            opened, _ = read()
            took.append(time.perf_counter() - start)
            opening.append(opened - start)
            after = bytes_read()
            called.append(after[0] - before[0])
            fetched.append(after[1] - before[1])
        figures |= {f"{cache}_s": median(took), f"{cache}_open_s": median(opening)}
        figures |= {f"{cache}_read_bytes": median(called), f"{cache}_storage_bytes": median(fetched)}
    return figures


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
