"""Memory of one micro-batch above the loaded model: the peak of a fresh process."""

import ctypes
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from extract_methods import bare, hidden_states, ours, reference
from machine import isolated, peak, reset_peak

from personaspace.extract.checkpoint import Checkpoint
from personaspace.extract.packing import MicroBatch
from personaspace.extract.slicing import load_slice
from personaspace.extract.stage import Stage

CONSTANT = 64_000_000
"""Bytes that the bound grants to everything that doesn't grow: thread stacks, kernels' scratch, the allocator."""
PROCESSES = 5
M_MMAP_THRESHOLD = -3
"""glibc's number of this setting, from malloc.h."""
METHODS: Mapping[str, Any] = {
    "ours": ours,
    "bare": bare,
    "hidden_states": hidden_states,
    "reference": reference,
}


def measure_memory(checkpoint: Checkpoint, shapes: list[tuple[int, int]]) -> dict[str, dict[str, int]]:
    """Shape, such as `16x512` -> bytes at peak above the model, of each method, and the bound for ours."""
    figures = {}
    for rows, length in shapes:
        measured = {name: _typical(_extra, checkpoint, name, rows, length) for name in METHODS}
        layer = _typical(_one_layer, checkpoint, rows, length)
        sums = rows * checkpoint.layers * checkpoint.hidden * 4
        figures[f"{rows}x{length}"] = {**measured, "one_layer": layer, "sums": sums, "bound": sums + layer + CONSTANT}
    return figures


def _typical(measure: Callable[..., int], *arguments: Any) -> int:
    """Median of several fresh processes: the allocator's luck moves single ones by up to 70 MB."""
    measured: list[int] = [isolated(measure, *arguments) for _ in range(PROCESSES)]
    return statistics.median_low(measured)


def _extra(checkpoint: Checkpoint, name: str, rows: int, length: int) -> int:
    run = METHODS[name](checkpoint, "bfloat16")
    return _peak_of(run, rows, length)


def _one_layer(checkpoint: Checkpoint, rows: int, length: int) -> int:
    """What a single block takes: the backbone, stopped after its first one, with nothing read."""
    with Stage(load_slice(checkpoint, first=0, stop=1, dtype="bfloat16"), layers=()) as stage:
        return _peak_of(lambda batch: stage.forward(batch), rows, length)


def _peak_of(run: Any, rows: int, length: int) -> int:
    torch.manual_seed(0)
    libc = ctypes.CDLL("libc.so.6")
    # By default glibc keeps freed blocks of up to 32 MB; only what is in use shall count.
    libc.mallopt(M_MMAP_THRESHOLD, 1_000_000)
    run(_batch(2, 16))
    # What loading has freed is still the process's; the micro-batch must not hide in it.
    libc.malloc_trim(0)
    before = reset_peak()
    kept = run(_batch(rows, length))
    taken = peak() - before
    del kept
    return taken


def _batch(rows: int, length: int) -> MicroBatch:
    ids_BT = torch.randint(1000, (rows, length)).tolist()
    return MicroBatch(
        rows=tuple(range(rows)),
        token_ids=tuple(tuple(ids) for ids in ids_BT),
        segments=tuple(((length // 4, length),) for _ in range(rows)),
    )
