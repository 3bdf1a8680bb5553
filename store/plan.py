"""The planned rollouts of a run: one Parquet file for each segment, kept twice since nothing else holds it.

It says which rollout belongs to which row before any is generated, so that a run can be resumed and grown by a
config whose roles and questions come in another order.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa

from personaspace.store.manifest import Manifest
from personaspace.store.objects import Folder
from personaspace.store.parquet import decode_table, encode_table
from personaspace.store.records import read_object

PLAN = "plan"
SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("rollout_id", pa.string(), nullable=False),
        pa.field("role_id", pa.int32(), nullable=False),
        pa.field("prompt", pa.int32(), nullable=False),
        pa.field("question", pa.int32(), nullable=False),
        pa.field("sample", pa.int32(), nullable=False),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedRow:
    """One row of the rollout axis: which rollout it is."""

    row: int
    rollout_id: str
    role_id: int
    prompt: int
    question: int
    sample: int


def rollout_id(role: str, messages: Sequence[dict[str, str]], generation: str, sample: int) -> str:
    """Permanent id of a rollout: 16 hex digits of a hash over all that decides it."""
    content = json.dumps([role, list(messages), generation, sample], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def steered_id(plain_id: str, steering: str) -> str:
    """Permanent id of a rollout of a model that is changed while it runs, from the one that it has without."""
    return hashlib.sha256(f"{plain_id} {steering}".encode()).hexdigest()[:16]


def plan_key(segment: int) -> str:
    return f"{PLAN}/{segment:06d}.parquet"


def encode_plan(rows: Sequence[PlannedRow]) -> bytes:
    """One segment's rows as Parquet."""
    return encode_table(pa.Table.from_pylist([asdict(row) for row in rows], schema=SCHEMA))


def read_plan_table(folder: Folder, manifest: Manifest) -> pa.Table:
    """All planned rows, in order. Raises IntegrityError if a segment's file is damaged."""
    parts = [decode_table(read_object(folder, stored), SCHEMA) for stored in manifest.plan]
    return pa.concat_tables([SCHEMA.empty_table(), *parts])


def read_plan(folder: Folder, manifest: Manifest) -> list[PlannedRow]:
    """All planned rows, in order. Raises IntegrityError if a segment's file is damaged."""
    return [PlannedRow(**entry) for entry in read_plan_table(folder, manifest).to_pylist()]
