"""PCA of one layer from disk: ours against scikit-learn, dask-ml, and the least that any exact method has to do.

    python benchmarks/pca.py --json out.json
    python benchmarks/pca.py --quick

Every contender reads the same stored shards, in a fresh process, on one thread. The floor reads, decodes and multiplies
every block once (one symmetric product in float32), and computes nothing else. CPU seconds are user and system time;
peak is resident memory above that of a process that has imported everything. The truth is a float64
eigendecomposition. The slower contenders run at 20,000 rows only; ours and the floor also at ten times as many.

Legend: N rows, D hidden, K components.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
from dask_ml import decomposition
from machine import describe_machine, isolated, peak, reset_peak
from numpy.typing import NDArray
from scipy.linalg import eigh
from scipy.linalg.blas import ssyrk
from sklearn.decomposition import PCA, IncrementalPCA
from threadpoolctl import threadpool_limits

from personaspace.analysis.layers import summarise_part
from personaspace.analysis.pca.estimator import ExactIncrementalPCA
from personaspace.analysis.summary import BLOCK_ROWS, Rows
from personaspace.store.layout import Layout, shard_key
from personaspace.store.local import LocalFolder
from personaspace.store.schema import encode_shard
from personaspace.store.shards import CommittedShards

ARRAY, UNIT_ROWS, COMPONENTS, RANK = "resid_post_mean", 120, 10, 64
SIZES = ((20_400, 576), (20_400, 1024), (20_400, 4096))
TEN_TIMES = 204_000
QUICK = ((2_400, 128),)
LAYERS = 4
"""Layers with the same values, for two workers against one."""
Matrix = NDArray[Any]


def write_layers(folder: Path, rows: int, hidden: int, layers: int) -> CommittedShards:
    """Rows with 64 leading directions, a mean far from 0, and noise, in the store's own shards; all layers alike."""
    layout = Layout(segments=(rows,), layers=layers, hidden=hidden, unit_rows=UNIT_ROWS, layer_group=layers)
    generator = np.random.default_rng(hidden)
    direction_KD = np.linalg.qr(generator.normal(size=(hidden, RANK)))[0].T * (8 * 0.93 ** np.arange(RANK))[:, None]
    mean_D = generator.normal(0, 3, size=hidden) + 200 * (np.arange(hidden) == 7)
    for unit in range(layout.units):
        x_ND = generator.normal(size=(UNIT_ROWS, RANK)) @ direction_KD + mean_D
        x_ND = (x_ND + generator.normal(0, 0.3, size=(UNIT_ROWS, hidden))).astype(np.float32)
        file = folder / shard_key(ARRAY, unit, 0)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode_shard(np.repeat(x_ND[:, None], layers, axis=1), layout, "16"))
    return CommittedShards(LocalFolder(folder), ARRAY, layout, np.zeros((layout.units, 1), dtype=int))


def blocks(values: CommittedShards, size: int = BLOCK_ROWS) -> Iterator[Matrix]:
    """The rows of the first layer, about ``size`` at a time."""
    size = max(1, size // UNIT_ROWS) * UNIT_ROWS
    for start in range(0, values.shape[0], size):
        yield values[slice(start, start + size), 0, slice(None)]


def floor(values: CommittedShards) -> None:
    scatter_DD = np.zeros((values.shape[2],) * 2, dtype=np.float32)
    for x_ND in blocks(values):
        ssyrk(1.0, x_ND.T, beta=1.0, c=scatter_DD.T, overwrite_c=1)


def ours(values: CommittedShards) -> Matrix:
    pca = ExactIncrementalPCA(COMPONENTS, dtype="float32")
    for x_ND in blocks(values):
        pca.partial_fit(x_ND)
    return pca.components_


def sklearn_pca(values: CommittedShards) -> Matrix:
    return np.asarray(PCA(COMPONENTS).fit(values[slice(None), 0, slice(None)]).components_)


def sklearn_incremental(values: CommittedShards) -> Matrix:
    """In batches of 5 D rows, scikit-learn's own choice."""
    pca = IncrementalPCA(COMPONENTS)
    for x_ND in blocks(values, 5 * values.shape[2]):
        pca.partial_fit(x_ND)
    return np.asarray(pca.components_)


def dask_ml_tsqr(values: CommittedShards) -> Matrix:
    size = max(BLOCK_ROWS, values.shape[2]) // UNIT_ROWS * UNIT_ROWS + UNIT_ROWS
    rows_N = da.from_array(values, chunks=(size, 1, values.shape[2]), asarray=False)[:, 0]
    with dask.config.set(scheduler="synchronous"):
        return np.asarray(decomposition.PCA(COMPONENTS, svd_solver="tsqr").fit(rows_N).components_)


def truth(values: CommittedShards) -> Matrix:
    mean_D = sum(x_ND.sum(0, dtype=np.float64) for x_ND in blocks(values)) / values.shape[0]
    scatter_DD = np.zeros((values.shape[2],) * 2)
    for x_ND in blocks(values):
        centred_ND = x_ND - mean_D
        scatter_DD += centred_ND.T @ centred_ND
    last = values.shape[2] - 1
    return np.asarray(eigh(scatter_DD, subset_by_index=[last - COMPONENTS + 1, last])[1].T)


CONTENDERS: dict[str, Callable[[CommittedShards], Matrix | None]] = {
    "floor": floor,
    "ours": ours,
    "sklearn PCA": sklearn_pca,
    "sklearn IncrementalPCA": sklearn_incremental,
    "dask-ml tsqr": dask_ml_tsqr,
}


def run_alone(name: str, values: CommittedShards) -> dict[str, Any]:
    """One contender in a process of its own: CPU seconds, seconds, peak bytes, components."""
    with threadpool_limits(limits=1):
        before, start, clock = reset_peak(), os.times(), time.perf_counter()
        found = CONTENDERS[name](values)
        end = os.times()
        return {
            "cpu_seconds": end.user - start.user + end.system - start.system,
            "seconds": time.perf_counter() - clock,
            "peak_bytes": peak() - before,
            "components": None if found is None else found.tolist(),
        }


def sine(found_KD: Matrix, true_KD: Matrix) -> float:
    """Sine of the largest angle between the two subspaces."""
    rest_KD = found_KD - found_KD @ true_KD.T @ true_KD
    return float(np.linalg.norm(rest_KD, 2))


def measure(values: CommittedShards, names: list[str], rounds: int) -> dict[str, dict[str, Any]]:
    """Medians over rounds, each contender in turn."""
    true_KD = isolated(truth, values)
    kept: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            kept[name].append(isolated(run_alone, name, values))
    figures = {}
    for name, runs in kept.items():
        figures[name] = {
            key: float(np.median([run[key] for run in runs])) for key in ("cpu_seconds", "seconds", "peak_bytes")
        }
        components = runs[0]["components"]
        if components is not None:
            figures[name]["sin_theta_top10"] = sine(np.array(components), true_KD)
        error = f", sine {figures[name]['sin_theta_top10']:.1e}" if components is not None else ""
        print(
            f"{values.shape[0]:>7} x {values.shape[2]:<5} {name:<24}{figures[name]['cpu_seconds']:8.2f} CPU s, "
            f"peak {figures[name]['peak_bytes'] / 1e6:7.0f} MB{error}",
            flush=True,
        )
    return figures


def workers(values: CommittedShards) -> dict[str, float]:
    """Seconds for the summaries of four layers on one Dask thread, and on two."""
    count = values.shape[0]
    rows = Rows(
        row_N=np.arange(count),
        cell_N=np.arange(count) % 24,
        pooled_N=np.ones(count, dtype=bool),
        cells=24,
        unit_rows=UNIT_ROWS,
    )
    found = {}
    for threads in (1, 2):
        with threadpool_limits(limits=1, user_api="blas"):
            start = time.perf_counter()
            tasks = [dask.delayed(summarise_part)(values, layer, rows, 0, 1) for layer in range(LAYERS)]
            dask.compute(*tasks, scheduler="threads", num_workers=threads)
            found[str(threads)] = time.perf_counter() - start
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"), help="where the data lie for a while")
    parser.add_argument("--rounds", type=int, default=3, help="times that each contender runs (default 3)")
    parser.add_argument("--quick", action="store_true", help="2,400 rows of 128 dimensions, once")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    sizes, rounds = (QUICK, 1) if arguments.quick else (SIZES, arguments.rounds)
    figures: dict[str, Any] = {"machine": describe_machine(arguments.folder), "sizes": {}}
    for rows, hidden in sizes:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
            values = write_layers(Path(scratch), rows, hidden, LAYERS)
            figures["sizes"][f"{rows}x{hidden}"] = found = measure(values, list(CONTENDERS), rounds)
            if hidden == 1024 or arguments.quick:
                threads = isolated(workers, values)
                figures |= headline(found) | {"two_workers_over_one": threads["2"] / threads["1"]}
        if hidden == 1024:
            with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
                many = measure(write_layers(Path(scratch), TEN_TIMES, hidden, 1), ["floor", "ours"], rounds)
                figures["sizes"][f"{TEN_TIMES}x{hidden}"] = many
                figures["ten_times_the_rows"] = {
                    key: many["ours"][key] / found["ours"][key] for key in ("cpu_seconds", "peak_bytes")
                }
    for key, value in figures.items():
        if key not in ("machine", "sizes"):
            print(f"{key}: {value if isinstance(value, dict) else f'{value:.3g}'}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


def headline(found: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The ratios of one size."""
    own = found["ours"]["cpu_seconds"]
    return {
        "sklearn_incremental_cpu_over_ours": found["sklearn IncrementalPCA"]["cpu_seconds"] / own,
        "dask_ml_tsqr_cpu_over_ours": found["dask-ml tsqr"]["cpu_seconds"] / own,
        "ours_over_floor": own / found["floor"]["cpu_seconds"],
        "sin_theta_top10": found["ours"]["sin_theta_top10"],
        "peak_bytes": found["ours"]["peak_bytes"],
    }


if __name__ == "__main__":
    main()
