"""Rollouts in Parquet: one part per unit, published whole and recorded like any other object."""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from personaspace.store.objects import Folder
from personaspace.store.parquet import decode_table, encode_table
from personaspace.store.records import READ_THREADS, ROLLOUTS, Record, read_object, read_records

SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("rollout_id", pa.string(), nullable=False),
        pa.field("role", pa.string(), nullable=False),
        pa.field("role_id", pa.int32(), nullable=False),
        pa.field("prompt", pa.int32(), nullable=False),
        pa.field("question", pa.int32(), nullable=False),
        pa.field("sample", pa.int32(), nullable=False),
        pa.field("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])), nullable=False),
        pa.field("response", pa.string(), nullable=False),
        pa.field("prompt_token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("response_token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field(
            "spans",
            pa.list_(
                pa.struct([("turn", pa.int32()), ("part", pa.string()), ("start", pa.int32()), ("stop", pa.int32())])
            ),
            nullable=False,
        ),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("template_hash", pa.string(), nullable=False),
        pa.field("sampling", pa.string(), nullable=False),
        pa.field("seed", pa.uint64(), nullable=False),
        pa.field("dropped", pa.string()),
    ],
    metadata={"schema_version": "2"},
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Tokens ``[start, stop)`` of a rollout, prompt and response counted together, that belong together."""

    turn: int
    """Assistant turn of the conversation, 0-based."""
    part: str
    """`whole` turn, its `think` part, or its `answer` part."""
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One conversation that ends with an assistant response, as stored. Columns of the Parquet parts."""

    row: int
    """Place on the rollout axis of the arrays."""
    rollout_id: str
    """Hash of persona, messages, generation settings and sample: stable when questions are added or reordered."""
    role: str
    role_id: int
    prompt: int
    question: int
    sample: int
    messages: list[dict[str, str]]
    """The conversation before the response: [{role, content}]."""
    response: str
    prompt_token_ids: list[int]
    response_token_ids: list[int]
    """The last assistant turn, without the end-of-turn token."""
    spans: list[Span] = field(default_factory=list)
    """What can be averaged: every assistant turn, whole and in parts; the response comes last. Empty if dropped."""
    finish_reason: str
    """`stop` (the model ended its turn), `length` (cut off) or `imported`."""
    template_hash: str
    """Of the chat template as used, date pinned."""
    sampling: str
    """Sampling parameters as JSON."""
    seed: int
    dropped: str | None = None
    """Why the rollout can't be used (nothing to average, for example), or None."""


def decode_spans(entries: Iterable[Mapping[str, Any]]) -> list[Span]:
    """Spans of one rollout, as the column `spans` holds them."""
    return [Span(**entry) for entry in entries]


def to_rollouts(table: pa.Table) -> list[Rollout]:
    """Rollouts of a table with all columns."""
    return [Rollout(**{**entry, "spans": decode_spans(entry["spans"])}) for entry in table.to_pylist()]


def encode_rollouts(rollouts: Sequence[Rollout]) -> bytes:
    """One Parquet part, with page checksums."""
    return encode_table(pa.Table.from_pylist([asdict(rollout) for rollout in rollouts], schema=SCHEMA))


def decode_rollouts(data: bytes) -> pa.Table:
    """Table of one part. Raises IntegrityError if it is damaged or has other columns."""
    return decode_table(data, SCHEMA)


def read_rollouts(folder: Folder, units: Iterable[int] | None = None, columns: list[str] | None = None) -> pa.Table:
    """Committed rollouts: all of them in row order, or those of ``units`` in their order; all columns, or some."""
    chosen = None if units is None else list(units)
    by_unit = {unit: record for (_, unit, _), record in read_records(folder, ROLLOUTS, chosen).items()}
    records = [by_unit[unit] for unit in (sorted(by_unit) if chosen is None else chosen) if unit in by_unit]

    def part(record: Record) -> pa.Table:
        table = decode_rollouts(read_object(folder, record.objects[0]))
        return table if columns is None else table.select(columns)

    with ThreadPoolExecutor(READ_THREADS) as threads:
        parts = list(threads.map(part, records))
    empty = SCHEMA.empty_table() if columns is None else SCHEMA.empty_table().select(columns)
    return pa.concat_tables([empty, *parts])
