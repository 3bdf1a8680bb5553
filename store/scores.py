"""Scores that a judge gave to rollouts: Parquet parts per judge version, joined when a run is opened.

A score says how far a response plays its role: 0 (refused) to 3 (fully). It can't be computed again from the
store, so every part is kept twice. A part says in its metadata what the judge was, and which rollouts it couldn't
score. A rollout's score is final; a part gets a next generation where more of its unit's rollouts are scored.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from personaspace.store.commit import commit, publish
from personaspace.store.errors import InputError, IntegrityError
from personaspace.store.layout import Layout
from personaspace.store.lease import Fence
from personaspace.store.location import check_run_name
from personaspace.store.objects import Folder
from personaspace.store.parquet import decode_table, encode_table
from personaspace.store.records import (
    READ_THREADS,
    Record,
    Slot,
    committed_slots,
    copy_key,
    describe,
    read_object,
    read_record,
    read_slots,
)

SCORES = "scores"
LABELLER = ".labels"
"""Ends the name of a judge whose numbers are places in a list of categories (`labels` of what is known of it), and
never taken for how far a role is played."""
SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
        pa.field("reason", pa.string()),
    ]
)
_ABOUT, _UNJUDGED = b"judge", b"unjudged"
"""Keys of a part's metadata, both JSON objects."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """What a judge said of one rollout."""

    row: int
    score: float
    """0 to 3."""
    reason: str | None = None
    """The judge's own words, where they are kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """What a judge has said of one unit's rollouts."""

    scores: Mapping[int, Score] = field(default_factory=dict)
    """By row."""
    unjudged: Mapping[int, str] = field(default_factory=dict)
    """Row -> why the judge could give no score."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What the judge is: its model, the hash of its instructions, and the like; empty where nothing says it."""
    generation: int = -1
    """Of the record; -1 where nothing is recorded."""


def commit_scores(
    fence: Fence,
    layout: Layout,
    judge: str,
    unit: int,
    scores: Sequence[Score],
    *,
    unjudged: Mapping[int, str] | None = None,
    about: Mapping[str, Any] | None = None,
    generation: int = 0,
) -> None:
    """Publish and record the scores of one unit, given by one version of a judge.

    ``unjudged`` are rows that it could not score, with the reasons; ``about`` says what it is. A later ``generation``
    holds all that the one before it held. What is recorded stays: other scores need another name of the judge. Raises
    InputError for rows of other units.
    """
    planned = layout.unit_row_range(unit)
    for row in (*(score.row for score in scores), *(unjudged or {})):
        if row not in planned:
            rows = f"{planned.start} to {planned.stop - 1}"
            raise InputError(f"scores of unit {unit}: row {row} is none of its rows {rows}.")
    said = {_ABOUT: json.dumps(dict(about or {}), sort_keys=True), _UNJUDGED: json.dumps(dict(unjudged or {}))}
    table = pa.Table.from_pylist([asdict(score) for score in scores], schema=SCHEMA)
    data = encode_table(table.replace_schema_metadata(said if about or unjudged else None))
    key = scores_key(judge, unit, generation)
    commit(
        fence,
        scores_slot(judge, unit),
        {key: data, copy_key(key): data},
        rows=planned,
        dropped={},
        generation=generation,
    )


def restore_scores(fence: Fence, layout: Layout, slot: Slot, generation: int) -> bool:
    """Restore one unit's damaged or unrecorded scores from a sound copy. False if there is none.

    ``generation`` is that of the slot's newest record, damaged or not; -1 where there is none.
    """
    array, unit, _ = slot
    judge = array.removeprefix(f"{SCORES}.")
    try:
        stored = read_record(fence.folder, slot, generation).objects[0]
        recorded, keys = stored.sha256, [stored.key]
    except (FileNotFoundError, IntegrityError):
        recorded, keys = None, [scores_key(judge, unit, number) for number in range(max(generation, 0), -1, -1)]
    for candidate in [name for key in keys for name in (key, copy_key(key))]:
        try:
            data = fence.folder.get(candidate)
            decode_table(data, SCHEMA)
        except (FileNotFoundError, IntegrityError):
            continue
        if recorded not in (None, describe(candidate, data).sha256):
            continue
        key = keys[0] if recorded is not None else scores_key(judge, unit, generation + 1)
        objects = {key: data, copy_key(key): data}
        if recorded is None:
            commit(fence, slot, objects, rows=layout.unit_row_range(unit), dropped={}, generation=generation + 1)
        for other in objects:
            publish(fence, other, data)
        return True
    return False


def check_judge(judge: str) -> str:
    """The name of a judge. Raises InputError for one that could leave the folder."""
    return check_run_name(judge, "judge")


def scores_slot(judge: str, unit: int) -> Slot:
    """Slot of one unit's scores. Raises InputError for a judge's name that could leave the folder."""
    return (f"{SCORES}.{check_judge(judge)}", unit, 0)


def scores_key(judge: str, unit: int, generation: int = 0) -> str:
    """Each generation has an object of its own: a crash between publish and record leaves the one before it whole."""
    later = f".{generation:03d}" if generation else ""
    return f"{SCORES}/{check_judge(judge)}/{unit:06d}{later}.parquet"


def is_scores(slot: Slot) -> bool:
    return slot[0].startswith(f"{SCORES}.")


def judges(committed: Mapping[Slot, int]) -> list[str]:
    """Names of the judge versions that have said how far something plays its role; not those of categories."""
    return [name for name in all_judges(committed) if not name.endswith(LABELLER)]


def all_judges(committed: Mapping[Slot, int]) -> list[str]:
    """Names of the judge versions that have scored something, those of categories among them."""
    return sorted({slot[0].removeprefix(f"{SCORES}.") for slot in committed if is_scores(slot)})


def read_scores(
    folder: Folder, layout: Layout, committed: Mapping[Slot, int], judge: str | None = None
) -> NDArray[np.float32] | None:
    """Score of each row of the rollout axis, NaN where there is none; None if nothing was scored.

    ``judge`` may be left out where there is one. Raises InputError for an unknown or ambiguous judge.
    """
    known = judges(committed)
    if judge is None and len(known) != 1:
        return None
    name = known[0] if judge is None else judge
    if name not in all_judges(committed):
        there = ", ".join(all_judges(committed))
        raise InputError(f"{folder.url}: no scores of {name!r}. Judges with scores: {there or 'none'}.")
    wanted = {slot: number for slot, number in committed.items() if slot[0] == f"{SCORES}.{name}"}
    scores = np.full(layout.padded_rows, np.nan, dtype=np.float32)
    for record in read_slots(folder, wanted).values():
        table = decode_table(read_object(folder, record.objects[0]), SCHEMA)
        scores[table["row"].to_numpy()] = table["score"].to_numpy()
    return scores


def read_judgements(folder: Folder, judge: str, units: Iterable[int] | None = None) -> dict[int, Judgement]:
    """Unit -> what the judge has said of it; of all units, or of some. Raises IntegrityError for damaged parts."""
    chosen = None if units is None else set(units)
    wanted = {
        slot: number
        for slot, number in committed_slots(folder).items()
        if slot[0] == f"{SCORES}.{check_judge(judge)}" and (chosen is None or slot[1] in chosen)
    }
    records = {unit: record for (_, unit, _), record in read_slots(folder, wanted).items()}
    with ThreadPoolExecutor(READ_THREADS) as threads:
        judgements = threads.map(lambda record: _judgement(folder, record), records.values())
        return dict(zip(records, judgements, strict=True))


def _judgement(folder: Folder, record: Record) -> Judgement:
    table = decode_table(read_object(folder, record.objects[0]), SCHEMA)
    said = {key: json.loads(text) for key, text in (table.schema.metadata or {}).items()}
    return Judgement(
        scores={entry["row"]: Score(**entry) for entry in table.to_pylist()},
        unjudged={int(row): why for row, why in said.get(_UNJUDGED, {}).items()},
        about=said.get(_ABOUT, {}),
        generation=record.generation,
    )
