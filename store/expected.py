"""Which objects may lie in a run folder: what each key means, without reading anything."""

import re
from collections.abc import Callable
from functools import partial

from personaspace.store.catalog import REPORT
from personaspace.store.committed import chunk_slot
from personaspace.store.index import INDEX, TABLE
from personaspace.store.layout import ZARR_GROUP, coordinate_key, rollouts_key, shard_key
from personaspace.store.lease import LEASE
from personaspace.store.manifest import MANIFEST, MANIFEST_COPY, Manifest
from personaspace.store.objects import LOCK
from personaspace.store.records import COORDINATES_RECORD, ROLLOUTS, SPAN_COORDINATES_RECORD, Slot
from personaspace.store.rollouts import decode_rollouts
from personaspace.store.schema import COORDINATES, SPAN_COORDINATES, SPANS, decode_coordinate, decode_shard
from personaspace.store.scores import SCORES
from personaspace.store.space import LATEST

KNOWN = {MANIFEST, MANIFEST_COPY, LEASE, LOCK, INDEX, TABLE, REPORT, LATEST}
"""Objects that are there once, without a record."""
_ROLLOUTS = re.compile(rf"{ROLLOUTS}/(\d{{6,}})\.parquet")
_SCORES = re.compile(rf"{SCORES}/([A-Za-z0-9][A-Za-z0-9._-]*)/(\d{{6,}})(\.\d{{3,}})?(\.copy)?\.parquet")


def orphan_slot(key: str, manifest: Manifest) -> Slot | None:
    """The slot of this run whose record would make the object count; None if there is no such slot."""
    slot = _slot(key)
    if slot is None:
        return None
    array, unit, group = slot
    layout = manifest.layout
    arrays = {spec.record for spec in manifest.arrays}
    if not 0 <= unit < layout.units or not 0 <= group < layout.groups:
        return None
    known = array in (ROLLOUTS, COORDINATES_RECORD, SPAN_COORDINATES_RECORD) or array in arrays
    return slot if known or array.startswith(f"{SCORES}.") else None


def decoders(slot: Slot, manifest: Manifest) -> dict[str, Callable[[bytes], object]]:
    """Key -> what decodes it, or raises IntegrityError, for the objects of a slot whose record can't be asked."""
    array, unit, group = slot
    layout = manifest.layout
    if array == ROLLOUTS:
        return {rollouts_key(unit): decode_rollouts}
    if array == COORDINATES_RECORD:
        return {
            coordinate_key(name, unit): partial(decode_coordinate, layout=layout, name=name) for name in COORDINATES
        }
    spans = layout.of_spans(manifest.spans_per_rollout)
    if array == SPAN_COORDINATES_RECORD:
        return {
            coordinate_key(f"{SPANS}/{name}", unit): partial(decode_coordinate, layout=spans, name=name, spans=True)
            for name in SPAN_COORDINATES
        }
    return {
        shard_key(spec.path, unit, group): partial(
            decode_shard, layout=spans if spec.spans else layout, layers=len(layout.group_layers(group))
        )
        for spec in manifest.arrays
        if spec.record == array
    }


def _slot(key: str) -> Slot | None:
    if match := _ROLLOUTS.fullmatch(key):
        return (ROLLOUTS, int(match[1]), 0)
    if match := _SCORES.fullmatch(key):
        return (f"{SCORES}.{match[1]}", int(match[2]), 0)
    if key.startswith(f"{ZARR_GROUP}/"):
        return chunk_slot(key.removeprefix(f"{ZARR_GROUP}/"))
    return None
