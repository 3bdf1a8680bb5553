"""The arrays of a run: those that it has, and those that the config asks for."""

from collections.abc import Sequence
from dataclasses import replace

from personaspace.extract.config import ExtractConfig
from personaspace.extract.personas import PersonaPlan
from personaspace.extract.reductions import plan_arrays
from personaspace.store.errors import IdentityError, InputError
from personaspace.store.layout import Layout
from personaspace.store.manifest import Manifest
from personaspace.store.objects import Folder
from personaspace.store.rollouts import read_rollouts
from personaspace.store.schema import ArraySpec, span_parts


def merge_arrays(
    existing: Manifest | None, extract: ExtractConfig, layout: Layout, grow: bool, where: str
) -> tuple[ArraySpec, ...]:
    """The run's arrays, with the arrays and layers of the config added.

    Raises InputError for arrays that can't be or can't be added, IdentityError if they may not (``grow``).
    """
    asked = extract.layers
    if asked is not None:
        outside = [layer for layer in asked if not 0 <= layer < layout.layers]
        if outside or not asked:
            raise InputError(f"extract.layers: {outside or asked}; give some of the layers 0 to {layout.layers - 1}.")
    new = plan_arrays(extract.sites, extract.reductions, None if asked is None else tuple(sorted(set(asked))))
    if existing is None:
        return new
    stored = {spec.record: spec for spec in existing.arrays}
    merged = dict(stored)
    # All arrays of spans share their coordinates, whatever their site.
    parts = span_parts(existing.arrays)
    for spec in new:
        if spec.spans and parts and spec.spans != parts:
            raise InputError(
                f"extract.reductions: the spans of this run are the parts {parts} of turns, not {spec.spans}; "
                "use the reductions that the run began with, or another --store.run."
            )
        known = merged.setdefault(spec.record, spec)
        if known.layers is not None:
            layers = None if spec.layers is None else tuple(sorted({*known.layers, *spec.layers}))
            merged[spec.record] = replace(known, layers=layers)
    if merged != stored and not grow:
        added = [spec.path for record, spec in merged.items() if record not in stored]
        raise IdentityError(
            f"{where}: the config asks for more than this run stores "
            f"({f'the arrays {added}' if added else 'other layers'}). Add --store.grow to extract that, too. Nothing "
            "was changed."
        )
    return tuple(merged.values())


def count_span_places(folder: Folder, existing: Manifest | None, arrays: Sequence[ArraySpec], plan: PersonaPlan) -> int:
    """Places of each rollout in the arrays of spans; fixed once there are such arrays."""
    where = folder.url
    parts = span_parts(arrays)
    turns = max(row.turns for row in plan.rows)
    if parts and existing is not None and not existing.spans_per_rollout:
        # The config may lack rollouts that are stored, and those may have more turns.
        stored = read_rollouts(folder, columns=["spans"])["spans"].to_pylist()
        turns = max([turns, *(1 + span["turn"] for spans in stored for span in spans)])
    needed = turns * len(parts)
    if existing is None or not existing.spans_per_rollout:
        return needed
    if needed > existing.spans_per_rollout:
        raise InputError(
            f"{where}: rollouts of up to {turns} assistant turns need {needed} places for spans, and this run has "
            f"{existing.spans_per_rollout} for each. Use another --store.run for longer conversations."
        )
    return existing.spans_per_rollout
