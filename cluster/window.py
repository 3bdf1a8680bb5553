"""A window's rollouts as the extraction needs them, read from the store."""

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from personaspace.cluster.generators import dropped_rows
from personaspace.cluster.job import Job
from personaspace.extract.collect import Expected
from personaspace.extract.packing import MicroBatch, token_hash
from personaspace.extract.reductions import Readout
from personaspace.extract.rollouts import micro_batches
from personaspace.store.records import ROLLOUTS, read_records
from personaspace.store.rollouts import Span, decode_spans, read_rollouts
from personaspace.store.schema import ArraySpec


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowWork:
    """A window's rollouts as the extraction needs them."""

    units: tuple[int, ...]
    batches: tuple[MicroBatch, ...]
    rollout_ids: dict[int, str]
    tokens: dict[int, int]
    """Response tokens of each row."""
    spans: dict[int, tuple[Span, ...]]
    """Of each row: those that have rows of their own in the arrays of spans."""
    dropped: dict[int, str]
    """Rows that were dropped before extraction."""
    expected: dict[int, Expected]
    """Of each row that is run: what its sums have to be of."""
    sources: dict[int, str]
    """Unit -> SHA-256 of its rollouts."""


def load_window(job: Job, units: tuple[int, ...], arrays: Sequence[ArraySpec]) -> WindowWork:
    """Read the rollouts of a window, and form micro-batches of what ``arrays`` need, ready to be sent."""
    columns = ["row", "rollout_id", "prompt_token_ids", "response_token_ids", "spans", "dropped"]
    table = read_rollouts(job.folder, units, columns)
    entries = table.select(["row", "rollout_id", "dropped"]).to_pylist()
    readout = Readout.of_arrays(arrays)
    batches = tuple(micro_batches(table, readout, job.extract.micro_batch_tokens, packed=job.packed))
    for batch in batches:
        _ = batch.flat_ids  # Here, and not in the driver's loop, which sends them.
    return WindowWork(
        units=units,
        batches=batches,
        rollout_ids={entry["row"]: entry["rollout_id"] for entry in entries},
        tokens=response_tokens(table),
        spans=span_rows(job, table),
        dropped=dropped_rows(entries),
        expected={
            row: Expected(token_hash=token_hash(ids), counts=tuple(stop - start for start, stop in segments))
            for batch in batches
            for row, ids, segments in zip(batch.rows, batch.token_ids, batch.segments, strict=True)
        },
        sources={
            unit: record.objects[0].sha256 for (_, unit, _), record in read_records(job.folder, ROLLOUTS, units).items()
        },
    )


def response_tokens(rollouts: pa.Table) -> dict[int, int]:
    """Response tokens of each row, from the columns `row` and `response_token_ids`."""
    lengths = pc.list_value_length(rollouts["response_token_ids"])
    return dict(zip(rollouts["row"].to_pylist(), lengths.to_pylist(), strict=True))


def span_rows(job: Job, rollouts: pa.Table) -> dict[int, tuple[Span, ...]]:
    """Spans of each row that have rows of their own, from the columns `row` and `spans`; empty if the run has none."""
    if not job.parts:
        return {}
    readout = Readout.of_arrays(job.manifest.arrays)
    return {
        entry["row"]: readout.spans(decode_spans(entry["spans"]))
        for entry in rollouts.select(["row", "spans"]).to_pylist()
    }
