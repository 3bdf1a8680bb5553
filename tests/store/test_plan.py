"""The planned rollouts: what was written comes back, in order, or an error that names the file."""

import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from personaspace.store.errors import IntegrityError
from personaspace.store.lease import Fence, acquire
from personaspace.store.local import LocalFolder
from personaspace.store.manifest import Manifest
from personaspace.store.plan import SCHEMA, PlannedRow, encode_plan, plan_key, read_plan
from personaspace.store.records import copy_key, describe
from tests.store.small_runs import LAYOUT, create, grow, planned, small_manifest

INDICES = st.integers(0, 2**31 - 1)
ROWS = st.builds(
    PlannedRow,
    row=st.integers(0, 2**40),
    rollout_id=st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    role_id=INDICES,
    prompt=INDICES,
    question=INDICES,
    sample=INDICES,
)


@pytest.fixture
def fence(tmp_path: Path) -> Iterator[Fence]:
    with acquire(LocalFolder(tmp_path / "run"), timeout=60, say=pytest.fail) as lease:
        yield lease.fence


@pytest.fixture
def run(fence: Fence) -> Manifest:
    """Two segments, ten and three rows."""
    return grow(fence, create(fence), 3)


@given(st.lists(st.lists(ROWS, max_size=4), max_size=3))
@settings(max_examples=40, deadline=None)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, segments: list[list[PlannedRow]]) -> None:
    folder = LocalFolder(tmp_path_factory.mktemp("run"))
    stored = []
    for number, rows in enumerate(segments):
        folder.put_new(plan_key(number), encode_plan(rows))
        stored.append(describe(plan_key(number), encode_plan(rows)))
    assert read_plan(folder, small_manifest(plan=tuple(stored))) == [row for rows in segments for row in rows]


def test_any_parquet_reader_can_read_it(fence: Fence, run: Manifest) -> None:
    table = pq.read_table(Path(fence.folder.url) / plan_key(1))
    assert table.schema.names == ["row", "rollout_id", "role_id", "prompt", "question", "sample"]
    assert table.schema.equals(SCHEMA)
    assert table["row"].to_pylist() == [12, 13, 14]


def test_segments_are_read_in_order(fence: Fence, run: Manifest) -> None:
    assert [stored.key for stored in run.plan] == ["plan/000000.parquet", "plan/000001.parquet"]
    assert read_plan(fence.folder, run) == planned(LAYOUT.grow(3))
    assert [row.row for row in read_plan(fence.folder, run)] == [*range(10), 12, 13, 14]


def test_every_segment_is_kept_twice(fence: Fence, run: Manifest) -> None:
    for stored in run.plan:
        assert fence.folder.get(copy_key(stored.key)) == fence.folder.get(stored.key)
    assert copy_key(plan_key(3)) == "plan/000003.copy.parquet"


@pytest.mark.parametrize("segment", [0, 1])
def test_a_damaged_or_missing_segment_is_refused(fence: Fence, run: Manifest, segment: int) -> None:
    key = plan_key(segment)
    where = f"^{re.escape(f'{fence.folder.url}/{key}')}: "
    data = bytearray(fence.folder.get(key))
    data[-1] ^= 1
    fence.folder.replace(key, bytes(data))
    with pytest.raises(IntegrityError, match=where + r"\d+ bytes that differ from their record\.$"):
        read_plan(fence.folder, run)
    fence.folder.delete(key)
    with pytest.raises(IntegrityError, match=where + r"is recorded, but missing\.$"):
        read_plan(fence.folder, run)


@pytest.mark.parametrize("data", [b"no parquet", None])
def test_a_recorded_file_that_is_no_plan_is_refused(fence: Fence, data: bytes | None) -> None:
    if data is None:
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"row": ["a"]}), sink)
        data = sink.getvalue().to_pybytes()
    fence.folder.put_new(plan_key(0), data)
    with pytest.raises(IntegrityError, match=r"do not decode as a Parquet part: |Parquet part has columns \['row'\]"):
        read_plan(fence.folder, small_manifest(plan=(describe(plan_key(0), data),)))
