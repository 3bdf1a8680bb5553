"""Size, error, speed and memory of the store, next to what else one could keep activations in.

    python benchmarks/store.py --folder /scratch          # tiles runs/demo (make demo) to 4 GB; some 15 minutes
    python benchmarks/store.py --quick --json out.json    # 0.1 GB, in a minute; the figures are rough
    python benchmarks/store.py --run s3://bucket/big      # any other complete run as the source

The values are a real run's: each role is a role's mean plus the deviations of rows drawn anew, with relative noise of
1e-3, so outlier dimensions and tails stay and nothing compresses across tiles. Takes three times the bytes in a
folder of its own in the scratch folder, and removes it. Root measures reads with a cold page cache, too; in a virtual
machine that says nothing of the host's cache.

Peers: bf16 `.pt` files per role, as the reference project keeps them (dict of key -> tensor), bf16 safetensors with
one tensor per role, and float32 Zarr with Zarr's default chunks and codecs.

`reference_layer_read_over_ours`: seconds of the `.pt` files over ours, `open_run` counted in; the smaller one of cold
and warm cache. `write_over_copy`: our seconds, one process, over those of copying the same stored bytes file by file
with an fsync each. `writer_peak_bytes`, `reader_peak_bytes`: highest peak, of all numbers of threads, at the full size.
"""

import argparse
import json
import math
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import store_peers
from machine import describe_machine, isolated
from store_data import Tiles, plan_tiles, save_source
from store_error import measure_errors
from store_memory import measure_memory
from store_read import OURS, measure_reads
from store_write import measure_writes

from personaspace.store.config import Precision

PRECISION: Precision = "16"
SAMPLE_BYTES = 10**9
QUESTIONS = {
    "layer": "one layer of all rollouts",
    "role": "one role, all layers",
    "rows": "1,000 random rollouts, one layer",
}


def measure(run: str, folder: Path, gigabytes: float, quick: bool) -> dict[str, Any]:
    """All figures; ``folder`` is empty, and may be left full."""
    machine = describe_machine(folder)
    repeats = 1 if quick else 5
    source = save_source(run, folder / "source")
    tiles = plan_tiles(folder / "source", gigabytes)
    say(f"{source['model']}, {source['rows']} rollouts, tiled to {tiles.layout.rows}: {tiles.bytes / 1e9:.2f} GB")
    say("bytes and errors ...")
    errors = isolated(measure_errors, tiles)
    say("writing ...")
    writes = measure_writes(folder, tiles, PRECISION, SAMPLE_BYTES, 1 if quick else 3)
    say("memory ...")
    memory = measure_memory(folder, tiles, PRECISION, gigabytes, quick)
    say("peers ...")
    peer_bytes = {peer: isolated(store_peers.write_peer, peer, folder, tiles) for peer in store_peers.PEERS}
    say("reading ...")
    reads = measure_reads(str(folder / "run"), folder, tiles, repeats)
    values = tiles.bytes / 4
    return {
        "bytes_per_value": {
            **{kind: figures.pop("bytes_per_value") for kind, figures in errors.items() if kind != "bf16"},
            "bf16 pt": peer_bytes["pt"] / values,
            "bf16 safetensors": peer_bytes["safetensors"] / values,
            "float32 zarr defaults": peer_bytes["zarr"] / values,
        },
        "reference_layer_read_over_ours": min(layer_ratios(reads).values()),
        "write_over_copy": writes["ours"]["1 process"]["s"] / writes["copy_s"]["copyfile and fsync"],
        "reader_peak_bytes": max(memory["large"]["read"].values()),
        "writer_peak_bytes": max(memory["large"]["write"].values()),
        "error": errors,
        "layer_read_ratios": layer_ratios(reads),
        "reads": reads,
        "writes": writes,
        "memory": memory,
        "source": source,
        "tiled": describe_tiles(tiles),
        "precision": PRECISION,
        "repeats": repeats,
        "machine": machine,
    }


def layer_ratios(reads: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of the reference's files over ours for one layer of all rollouts, with ``open_run`` counted in."""
    ours, reference = reads[OURS]["layer"], reads["pt"]["layer"]
    return {cache: reference[f"{cache}_s"] / ours[f"{cache}_s"] for cache in ("cold", "warm") if f"{cache}_s" in ours}


def describe_tiles(tiles: Tiles) -> dict[str, Any]:
    layout = tiles.layout
    return {
        "float32_bytes": tiles.bytes,
        "rollouts": layout.rows,
        "roles": tiles.roles,
        "layers": layout.layers,
        "hidden": layout.hidden,
        "unit_rows": layout.unit_rows,
        "layer_group": layout.layer_group,
        "shard_bytes": 4 * layout.unit_rows * layout.layer_group * layout.hidden,
    }


def say(text: str) -> None:
    print(text, flush=True)


def show(figures: Mapping[str, Any]) -> None:
    """The tables."""
    say("\nbytes per value; errors of what is read back")
    say(f"  {'':22s} {'bytes':>6s} {'rms/std':>9s} {'axis':>9s} {'PCA space':>9s} {'PCA comp.':>9s}")
    for kind, size in figures["bytes_per_value"].items():
        error = figures["error"]["bf16" if kind.startswith("bf16") else "lossless" if "zarr" in kind else kind]
        names = ("worst_dimension_rms_over_std", "axis_angle_rad", "pca_subspace_angle_rad", "pca_component_sin")
        say(f"  {kind:22s} {size:6.3f} " + " ".join(f"{error[name]:9.1e}" for name in names))
    say("  rms/std: worst dimension; axis, PCA space (10 components): angle in rad; component: sine. Worst layers.")

    writes = figures["writes"]
    stored, exact = writes["stored_bytes"] / 1e6, writes["float32_bytes"] / 1e6
    say(f"\nwriting {exact:.0f} MB of float32 as {stored:.0f} MB in {writes['shards']} shards")
    for name, run in writes["ours"].items():
        parts = f"encoding {run['encode_s']:.2f} s, committing {run['commit_s']:.2f} s, over all workers"
        say(f"  ours, {name:27s} {run['s']:7.2f} s {exact / run['s']:6.0f} MB/s of float32; {parts}")
    for name, took in writes["copy_s"].items():
        say(f"  {name:33s} {took:7.2f} s {stored / took:6.0f} MB/s of stored bytes")
    say(f"  ours (1 process) over copyfile and fsync: {figures['write_over_copy']:.2f}")

    for question, text in QUESTIONS.items():
        say(f"\nreading {text}")
        titles = f"{'cold s':>8s} {'warm s':>8s} {'of it opening':>13s} {'MB read':>8s} {'MB from disk, cold':>18s}"
        say(f"  {'':12s} {titles}")
        for reader, by_question in figures["reads"].items():
            read = by_question[question]
            cold, fetched = read.get("cold_s", math.nan), read.get("cold_storage_bytes", math.nan) / 1e6
            line = f"  {reader:12s} {cold:8.3f} {read['warm_s']:8.3f} {read['warm_open_s']:13.3f}"
            say(f"{line} {read['warm_read_bytes'] / 1e6:8.1f} {fetched:18.1f}")
    ratios = ", ".join(f"{cache} {ratio:.1f}" for cache, ratio in figures["layer_read_ratios"].items())
    say(f"  reference (pt) over ours, one layer of all rollouts, page cache: {ratios}")

    say("\npeak memory above a process that has imported, MB")
    for name, run in figures["memory"].items():
        shard = run["shard_bytes"]
        say(f"  {name}: {run['float32_bytes'] / 1e9:.2f} GB of float32, shards of {shard / 1e6:.1f} MB")
        for doing in ("write", "read"):
            peaks = "; ".join(f"{what} {taken / 1e6:.0f}" for what, taken in run[doing].items())
            say(f"    {doing}: {peaks}")
    machine = figures["machine"]
    load = f"load {machine['load_average']:.1f} at the start"
    say(f"\n{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB, {machine['file_system']}, {load}")
    say(f"{machine['date']}: {machine['command']}")
    say(", ".join(f"{name} {text}" for name, text in {"python": machine["python"], **machine["versions"]}.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="runs/demo", help="folder or URL of the run that is tiled")
    parser.add_argument("--gigabytes", type=float, help="float32 bytes of the tiled run, at least (4; quick: 0.1)")
    parser.add_argument("--folder", type=Path, help="scratch folder; default: the system's")
    parser.add_argument("--quick", action="store_true", help="each figure measured once")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()

    gigabytes = arguments.gigabytes or (0.1 if arguments.quick else 4)
    if arguments.folder:
        arguments.folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="personaspace-benchmark-", dir=arguments.folder)).resolve()
    try:
        figures = measure(arguments.run, scratch, gigabytes, arguments.quick)
    finally:
        shutil.rmtree(scratch)
    show(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
