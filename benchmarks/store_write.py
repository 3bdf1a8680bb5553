"""Writing through the real writer, as stage actors do it, against copying the very shards that it wrote."""

import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from machine import median
from numpy.typing import NDArray
from store_data import Tiles, commit_shard, create_run, encode_group

from personaspace.store.config import Precision
from personaspace.store.layout import ZARR_GROUP
from personaspace.store.lease import Fence
from personaspace.store.local import LocalFolder
from personaspace.store.schema import RESID_POST_MEAN

WORKERS = {"1 process": [1], "2 threads": [2], "2 processes": [1, 1]}
"""Threads of each writing process. A stage actor is a process with one writing thread."""
_share: dict[int, NDArray[np.float32]] = {}


def measure_writes(folder: Path, tiles: Tiles, precision: Precision, sample: int, repeats: int) -> dict[str, Any]:
    """Seconds of our writer, and of copies of its shards; medians over ``repeats``. ``sample`` are bytes of float32."""
    layout = tiles.layout
    each = 4 * layout.unit_rows * layout.layers * layout.hidden
    units = range(min(layout.units, max(4, sample // each)))
    written = folder / "written"
    ours = {
        name: [_write(written, tiles, precision, units, threads) for _ in range(repeats)]
        for name, threads in WORKERS.items()
    }
    shards = written / ZARR_GROUP / RESID_POST_MEAN
    copies = [_copy(shards, folder / "copy") for _ in range(repeats)]
    stored = sum(file.stat().st_size for file in shards.rglob("0"))
    shutil.rmtree(written)
    return {
        "float32_bytes": each * len(units),
        "stored_bytes": stored,
        "shards": len(units) * layout.groups,
        "ours": {name: {key: median(run[key] for run in runs) for key in runs[0]} for name, runs in ours.items()},
        "copy_s": {name: median(copy[name] for copy in copies) for name in copies[0]},
    }


def _write(folder: Path, tiles: Tiles, precision: Precision, units: range, threads: Sequence[int]) -> dict[str, float]:
    """Write the units into a new run by so many processes with so many threads each."""
    shutil.rmtree(folder, ignore_errors=True)
    total = sum(threads)
    pools = [ProcessPoolExecutor(1, mp_context=get_context("spawn")) for _ in threads]
    shares = []
    for first, count in zip(np.cumsum([0, *threads[:-1]]).tolist(), threads, strict=True):
        shares.append([units[thread::total] for thread in range(first, first + count)])
    with create_run(LocalFolder(folder), tiles, precision) as fence:
        for pool, share in zip(pools, shares, strict=True):
            pool.submit(_prepare, tiles, precision, [unit for part in share for unit in part]).result()
        os.sync()
        start = time.perf_counter()
        work = [
            pool.submit(_write_share, fence, tiles, precision, share) for pool, share in zip(pools, shares, strict=True)
        ]
        parts = [part for done in work for part in done.result()]
        seconds = time.perf_counter() - start
    for pool in pools:
        pool.shutdown()
    encode, commit = (sum(part[place] for part in parts) for place in (0, 1))
    return {"s": seconds, "encode_s": encode, "commit_s": commit}


def _prepare(tiles: Tiles, precision: Precision, units: Sequence[int]) -> None:
    """Make the values that this process will write, and warm up."""
    _share.update({unit: tiles.unit_ULD(unit) for unit in units})
    encode_group(_share[units[0]], tiles.layout, 0, precision)


def _write_share(
    fence: Fence, tiles: Tiles, precision: Precision, shares: Sequence[Sequence[int]]
) -> list[tuple[float, float]]:
    """Write each share of units in a thread; returns the seconds that each took to encode and to commit."""

    def write(units: Sequence[int]) -> tuple[float, float]:
        encode = commit = 0.0
        for unit in units:
            for group in range(tiles.layout.groups):
                start = time.perf_counter()
                data = encode_group(_share[unit], tiles.layout, group, precision)
                encoded = time.perf_counter()
                commit_shard(fence, tiles.layout, unit, group, data)
                encode += encoded - start
                commit += time.perf_counter() - encoded
        return encode, commit

    with ThreadPoolExecutor(len(shares)) as threads:
        return list(threads.map(write, shares))


def _copy(shards: Path, target: Path) -> dict[str, float]:
    """Seconds to copy the shards: file by file with and without fsync, and with `cp -r`."""
    files = [file for file in shards.rglob("0") if file.is_file()]

    def copy(file: Path) -> Path:
        place = target / file.relative_to(shards)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
        return place

    def copy_durably(file: Path) -> Path:
        with copy(file).open("rb") as written:
            os.fsync(written.fileno())
        return file

    def timed(work: Any) -> float:
        shutil.rmtree(target, ignore_errors=True)
        os.sync()
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def in_threads() -> None:
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(copy_durably, files))

    try:
        return {
            "copyfile": timed(lambda: [copy(file) for file in files]),
            "copyfile and fsync": timed(lambda: [copy_durably(file) for file in files]),
            "copyfile and fsync, 2 threads": timed(in_threads),
            "cp -r": timed(lambda: subprocess.run(["cp", "-r", shards, target], check=True)),
            "cp -r and sync": timed(
                lambda: subprocess.run(["sh", "-c", 'cp -r "$0" "$1" && sync -f "$1"', shards, target], check=True)
            ),
        }
    finally:
        shutil.rmtree(target, ignore_errors=True)
