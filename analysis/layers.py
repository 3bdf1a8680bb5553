"""Layers in parallel on Dask, within a stated memory: on threads, or on the workers of `distributed`, wherever they
run.

A layer's rows are split where there are more workers than layers in flight; the parts' summaries are merged in pairs.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import dask
import psutil
from dask.delayed import Delayed
from dask.system import CPU_COUNT
from distributed import Client, get_client
from threadpoolctl import threadpool_limits

from personaspace.analysis.layer_fit import LayerFit, Plan, finish_layer
from personaspace.analysis.pca.moments import Precision
from personaspace.analysis.summary import Rows, Summary, Values, summarise, summary_bytes
from personaspace.store.errors import InputError

log = logging.getLogger(__name__)
SHARE_OF_MEMORY = 0.5
"""Of what is free, where nothing else is said."""
PART_BLOCKS = 4
"""A part of a layer's rows has at least so many blocks: merging costs about as much as one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """How the layers are worked on."""

    in_flight: int
    """Layers at a time."""
    parts: int
    """Parts that each layer's rows are split into."""
    workers: int
    """Tasks that can run at a time."""
    layer_bytes: int
    """Most memory of one part of a layer."""


def plan_layers(layers: int, rows: int, layer_bytes: int, *, workers: int, memory: int) -> Schedule:
    """As many layers at a time as the memory holds, then as many parts of each as keep the workers busy.

    Raises InputError where not even one layer fits.
    """
    fit = memory // layer_bytes
    if not fit:
        raise InputError(
            f"analysis.memory: {memory / 1e9:.2f} GB; one layer takes {layer_bytes / 1e9:.2f} GB while it is fitted. "
            "Give more, or fit on machines that have it."
        )
    tasks = min(workers, fit)
    in_flight = min(layers, tasks)
    return Schedule(
        in_flight=in_flight,
        parts=max(1, min(tasks // in_flight, rows // PART_BLOCKS)),
        workers=tasks,
        layer_bytes=layer_bytes,
    )


def fit_layers(values: Values, layers: Sequence[int], plan: Plan, *, memory: int | None) -> list[LayerFit]:
    """Fit every layer. ``memory``: bytes for all that is in flight together; default: half of what is free."""
    client = _client()
    # Threads of this process run each task once, so that nothing needs a copy.
    merge = Summary.merge if client is None else Summary.merged
    workers = CPU_COUNT if client is None else sum(worker["nthreads"] for worker in _workers(client))
    schedule = plan_layers(
        len(layers),
        sum(1 for _ in plan.rows.blocks()),
        summary_bytes(values.shape[2], plan.rows.cells, plan.config.precision),
        workers=workers,
        memory=memory if memory is not None else _free_memory(client),
    )
    # Wrapped whole, so that Dask neither looks into them nor sends them with every task.
    shared = [dask.delayed(what, traverse=False, pure=False) for what in (values, plan, plan.rows)]
    fitted: list[LayerFit] = []
    # Each task multiplies on one thread; several at a time keep all of them busy.
    with threadpool_limits(limits=max(1, CPU_COUNT // schedule.workers), user_api="blas"):
        for start in range(0, len(layers), schedule.in_flight):
            wave = [
                _one_layer(layer, schedule.parts, plan.config.precision, merge, *shared)
                for layer in layers[start : start + schedule.in_flight]
            ]
            fitted.extend(dask.compute(*wave, num_workers=schedule.workers))
    return fitted


def _one_layer(
    layer: int,
    parts: int,
    precision: Precision,
    merge: Callable[[Summary, Summary], Summary],
    values: Delayed,
    plan: Delayed,
    rows: Delayed,
) -> Delayed:
    summaries = [
        dask.delayed(summarise_part, pure=False)(values, layer, rows, part, parts, precision) for part in range(parts)
    ]
    while len(summaries) > 1:
        odd = summaries[len(summaries) // 2 * 2 :]
        pairs = zip(summaries[0::2], summaries[1::2], strict=False)
        summaries = [dask.delayed(merge, pure=False)(first, second) for first, second in pairs] + odd
    return dask.delayed(finish_layer, pure=False)(summaries[0], values, layer, plan)


def summarise_part(
    values: Values, layer: int, rows: Rows, part: int, parts: int, precision: Precision = "float32"
) -> Summary:
    """The summary of one of ``parts`` parts of a layer's rows."""
    return summarise(values, layer, rows.parts(parts)[part], precision)


def _client() -> Client | None:
    """The active client of `distributed`, if there is one."""
    try:
        return get_client()
    except ValueError:
        return None


def _workers(client: Client) -> list[dict[str, Any]]:
    return list(client.scheduler_info(n_workers=-1)["workers"].values())


def _free_memory(client: Client | None) -> int:
    if client is None:
        return int(SHARE_OF_MEMORY * psutil.virtual_memory().available)
    return int(SHARE_OF_MEMORY * sum(worker["memory_limit"] or 0 for worker in _workers(client)))
