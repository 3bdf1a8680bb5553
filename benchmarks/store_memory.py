"""Memory of writers and readers: the peak of a fresh process above what it took after its imports."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask
import dask.array
import numpy as np
from machine import isolated, peak, reset_peak
from store_data import Tiles, create_run, load_source, plan_tiles, write_units

from personaspace.store import open_run, select
from personaspace.store.config import Precision
from personaspace.store.lease import Fence
from personaspace.store.local import LocalFolder
from personaspace.store.schema import RESID_POST_MEAN

WIDE_LAYERS, WIDE_HIDDEN, WIDE_ROWS = 8, 8192, 128


def measure_memory(
    folder: Path, tiles: Tiles, precision: Precision, gigabytes: float, quick: bool
) -> dict[str, dict[str, Any]]:
    """Peaks for a quarter of the run, for shards of 31 MB, and for the run, which stays at ``folder / "run"``."""
    runs = {"small": (folder / "small", plan_tiles(tiles.source, gigabytes / 4)), "large": (folder / "run", tiles)}
    if not quick:
        runs["wide"] = (folder / "wide", widen(tiles, folder / "wide_source", gigabytes / 4))
    counts = (2,) if quick else (1, 2, 4)
    figures = {}
    for name, (run, sizes) in runs.items():
        layout = sizes.layout
        written = {}
        for threads in counts:
            shutil.rmtree(run, ignore_errors=True)
            written[_threads(threads)] = _write_measured(run, sizes, precision, threads)
        figures[name] = {
            "float32_bytes": sizes.bytes,
            "shard_bytes": 4 * layout.unit_rows * layout.layer_group * layout.hidden,
            "write": written,
            "read": {
                "open": isolated(_read, str(run), "open", 1),
                **{
                    f"{what}, {_threads(threads)}": isolated(_read, str(run), what, threads)
                    for what in ("one layer", "all layers")
                    for threads in counts
                },
            },
        }
        if name != "large":
            shutil.rmtree(run)
    return figures


def _write_measured(folder: Path, tiles: Tiles, precision: Precision, threads: int) -> int:
    """Write a whole run; returns the peak of the process that wrote its units."""
    with create_run(LocalFolder(folder), tiles, precision) as fence:
        taken: int = isolated(_write, fence, tiles, precision, threads)
    return taken


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def widen(tiles: Tiles, folder: Path, gigabytes: float) -> Tiles:
    """The same source as a model of hidden size 8,192 whose shards hold eight layers: 31 MB each."""
    folder.mkdir(parents=True)
    for name, values in zip(("mean_SLD", "deviation_NLD"), load_source(tiles.source), strict=True):
        layers = np.arange(WIDE_LAYERS) % values.shape[1]
        hidden = np.arange(WIDE_HIDDEN) % values.shape[2]
        np.save(folder / f"{name}.npy", values[:WIDE_ROWS, layers][..., hidden])
    rows = tiles.layout.unit_rows
    units = max(4, round(gigabytes * 1e9 / (4 * rows * WIDE_LAYERS * WIDE_HIDDEN)))
    layout = replace(
        tiles.layout, segments=(units * rows,), layers=WIDE_LAYERS, hidden=WIDE_HIDDEN, layer_group=WIDE_LAYERS
    )
    return Tiles(source=folder, layout=layout, rows_per_role=rows)


def _write(fence: Fence, tiles: Tiles, precision: Precision, threads: int) -> int:
    load_source(tiles.source)
    before = reset_peak()
    write_units(fence, tiles, precision, threads)
    return peak() - before


def _read(run: str, what: str, threads: int) -> int:
    before = reset_peak()
    opened = open_run(run)
    if what != "open":
        chosen = select(opened, layer=opened.sizes["layer"] // 2) if what == "one layer" else opened
        with dask.config.set(scheduler="threads", num_workers=threads):
            chosen[RESID_POST_MEAN].mean("rollout").compute()
    return peak() - before
