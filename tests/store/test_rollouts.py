"""Rollouts in Parquet: every field survives, in row order, and damage never passes for data."""

import random
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from personaspace.store.commit import commit
from personaspace.store.errors import IntegrityError
from personaspace.store.layout import rollouts_key
from personaspace.store.lease import Fence, acquire
from personaspace.store.local import LocalFolder
from personaspace.store.records import ROLLOUTS
from personaspace.store.rollouts import (
    SCHEMA,
    Rollout,
    Span,
    decode_rollouts,
    encode_rollouts,
    read_rollouts,
    to_rollouts,
)


def rollout(row: int, **changes: Any) -> Rollout:
    fields: dict[str, Any] = {
        "row": row,
        "rollout_id": f"id{row}",
        "role": "poet",
        "role_id": 1,
        "prompt": 0,
        "question": row % 3,
        "sample": 0,
        "messages": [{"role": "system", "content": "You rhyme."}, {"role": "user", "content": "How are you?"}],
        "response": "Well, as you can tell.",
        "prompt_token_ids": [1, 2, 3],
        "response_token_ids": [4, 5, row],
        "finish_reason": "stop",
        "template_hash": "ab12",
        "sampling": '{"temperature": 0.7}',
        "seed": 7,
    }
    return Rollout(**{**fields, **changes})


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NUMBER = st.integers(0, 2**31 - 1)
IDS = st.lists(NUMBER, max_size=5)
PART = st.sampled_from(["whole", "think", "answer"])
ROLLOUTS_OF_A_UNIT = st.lists(
    st.builds(
        Rollout,
        row=st.integers(0, 2**40),
        rollout_id=TEXT,
        role=TEXT,
        role_id=NUMBER,
        prompt=st.integers(0, 9),
        question=st.integers(0, 999),
        sample=st.integers(0, 9),
        messages=st.lists(st.fixed_dictionaries({"role": TEXT, "content": TEXT}), max_size=3),
        response=TEXT,
        prompt_token_ids=IDS,
        response_token_ids=IDS,
        spans=st.lists(st.builds(Span, turn=NUMBER, part=PART, start=NUMBER, stop=NUMBER), max_size=3),
        finish_reason=st.sampled_from(["stop", "length", "imported"]),
        template_hash=TEXT,
        sampling=TEXT,
        seed=st.integers(0, 2**64 - 1),
        dropped=st.none() | TEXT,
    ),
    max_size=4,
)


@given(ROLLOUTS_OF_A_UNIT)
@settings(max_examples=50, deadline=None)
def test_round_trip(rollouts: list[Rollout]) -> None:
    table = decode_rollouts(encode_rollouts(rollouts))
    assert table.schema.equals(SCHEMA)
    assert table.schema.metadata == {b"schema_version": b"2"}
    assert to_rollouts(table) == rollouts


def test_same_rollouts_give_the_same_bytes() -> None:
    assert encode_rollouts([rollout(0)]) == encode_rollouts([rollout(0)])


GOOD = [rollout(row, dropped="the response is empty" if row == 2 else None) for row in range(6)]
GOOD_BYTES = encode_rollouts(GOOD)
COLUMNS = pq.read_metadata(pa.BufferReader(GOOD_BYTES)).row_group(0)


@pytest.mark.parametrize("length", [0, 3, 100, len(GOOD_BYTES) // 2, len(GOOD_BYTES) - 1])
def test_a_cut_part_is_refused(length: int) -> None:
    with pytest.raises(IntegrityError, match=rf"^{length} bytes do not decode as a Parquet part: "):
        decode_rollouts(GOOD_BYTES[:length])


@pytest.mark.parametrize("column", range(COLUMNS.num_columns))
def test_a_damaged_page_is_refused(column: int) -> None:
    last = COLUMNS.column(column).data_page_offset + COLUMNS.column(column).total_compressed_size - 1
    if COLUMNS.column(column).has_dictionary_page:
        last = COLUMNS.column(column).data_page_offset - 1  # The end of the dictionary's page.
    damaged = bytearray(GOOD_BYTES)
    damaged[last] ^= 1
    with pytest.raises(IntegrityError, match=r"do not decode as a Parquet part: "):
        decode_rollouts(bytes(damaged))


def test_a_damaged_name_in_the_footer_is_refused() -> None:
    at = GOOD_BYTES.index(b"rollout_id", COLUMNS.column(COLUMNS.num_columns - 1).data_page_offset)
    with pytest.raises(IntegrityError, match="Parquet part"):
        decode_rollouts(GOOD_BYTES[:at] + b"\xec" + GOOD_BYTES[at + 1 :])


def test_other_columns_are_refused() -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"row": [1]}), sink)
    with pytest.raises(IntegrityError, match=r"^Parquet part has columns \['row'\], expected \['row', 'rollout_id', "):
        decode_rollouts(sink.getvalue().to_pybytes())


@pytest.fixture
def fence(tmp_path: Path) -> Iterator[Fence]:
    with acquire(LocalFolder(tmp_path / "run"), timeout=60, say=pytest.fail) as lease:
        yield lease.fence


def commit_unit(fence: Fence, unit: int) -> None:
    rollouts = [rollout(row) for row in range(unit * 3, unit * 3 + 3)]
    commit(
        fence,
        (ROLLOUTS, unit, 0),
        {rollouts_key(unit): encode_rollouts(rollouts)},
        rows=range(unit * 3, unit * 3 + 3),
        dropped={},
    )


def test_committed_rollouts_come_in_row_order(fence: Fence) -> None:
    for unit in (11, 2, 0, 7):
        commit_unit(fence, unit)
    assert read_rollouts(fence.folder)["row"].to_pylist() == [0, 1, 2, 6, 7, 8, 21, 22, 23, 33, 34, 35]
    assert read_rollouts(fence.folder, units=[7, 0])["row"].to_pylist() == [21, 22, 23, 0, 1, 2]
    assert read_rollouts(fence.folder).to_pylist()[0] == asdict(rollout(0))


def test_columns_can_be_chosen(fence: Fence) -> None:
    commit_unit(fence, 0)
    assert read_rollouts(fence.folder, columns=["row", "response"]).schema.names == ["row", "response"]


def test_only_committed_parts_are_read(fence: Fence) -> None:
    assert read_rollouts(fence.folder).num_rows == 0
    fence.folder.put_new(rollouts_key(0), GOOD_BYTES)
    table = read_rollouts(fence.folder)
    assert table.num_rows == 0
    assert table.schema.equals(SCHEMA)


def test_a_part_that_is_not_the_recorded_one_is_refused(fence: Fence) -> None:
    commit_unit(fence, 0)
    recorded = fence.folder.get(rollouts_key(0))
    chance = random.Random(0)
    other = encode_rollouts([rollout(row, response="Something else.") for row in range(3)])
    flipped = [bytearray(recorded) for _ in range(50)]
    for damaged in flipped:
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
    for wrong in (other, *map(bytes, flipped)):
        fence.folder.replace(rollouts_key(0), wrong)
        with pytest.raises(IntegrityError, match=r"rollouts/000000\.parquet"):
            read_rollouts(fence.folder)
