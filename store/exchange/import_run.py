"""Importing what the reference project has extracted: a complete run, without running any model.

The run's identity holds a digest of all imported files, so a run never mixes two sources. Token ids and counts are not
in the files: they are empty, and 0. Nothing here can be computed again; what gets lost is imported again.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from personaspace.store.commit import commit
from personaspace.store.config import Precision
from personaspace.store.coordinates import unit_coordinates
from personaspace.store.creation import refuse_foreign, write_run
from personaspace.store.errors import InputError
from personaspace.store.exchange.import_scores import ScoreFiles, commit_judgement, match_scores
from personaspace.store.exchange.source import Source, SourceRole, read_source
from personaspace.store.formats.assistant_axis import Response, read_role_responses
from personaspace.store.formats.role_names import DEFAULT_ROLE
from personaspace.store.holding import holding
from personaspace.store.index import write_index
from personaspace.store.layout import Layout, choose_layer_group, choose_unit_rows, rollouts_key, shard_key
from personaspace.store.lease import Fence
from personaspace.store.manifest import Manifest, check_identity, read_manifest, refuse_frozen
from personaspace.store.mend import drop_replaced_records
from personaspace.store.objects import Folder
from personaspace.store.plan import PlannedRow
from personaspace.store.provenance import session_entry
from personaspace.store.records import COORDINATES_RECORD, ROLLOUTS, Record, Slot, committed_slots
from personaspace.store.rollouts import Rollout, encode_rollouts
from personaspace.store.schema import RESID_POST_MEAN, ArraySpec, encode_shard
from personaspace.store.scores import scores_key
from personaspace.store.verify import verify

JUDGE = "assistant-axis"
UNKNOWN = "unknown"
TOKENS = 0
"""Length of a response that nobody has counted."""


def import_assistant_axis(
    source: Path,
    folder: Folder,
    *,
    model: str,
    precision: Precision = "16",
    unit_rows: int | None = None,
    layer_group: int | None = None,
    judge: str = JUDGE,
    repair: bool = False,
    lease_timeout: float = 60.0,
    say: Callable[[str], None] = print,
) -> None:
    """Make a run of SOURCE/responses and SOURCE/activations, and of SOURCE/scores where there are some.

    Everything but the values themselves is checked before anything is written. After a crash the same call goes on:
    what is committed stays, unless ``repair`` verifies it first, and imports again what is damaged. Memory holds one
    unit, or one role where a role's activations come in another order than its responses. Raises InputError naming
    file and line or key, and IdentityError if the folder holds another run.
    """
    if not model.strip():
        raise InputError("import: give the name of the model that wrote the responses, such as `Qwen/Qwen3-32B`.")
    scores_key(judge, 0)  # Refuses a bad name now, and not hours later.
    existing = read_manifest(folder)
    refuse_frozen(folder, existing)
    refuse_foreign(folder)
    found = read_source(source, say)
    if DEFAULT_ROLE not in {role.id for role in found.roles}:
        say(f"{source}: there is no role `{DEFAULT_ROLE}`; the run can be read and exported, but no axis can be fitted")
    layout = _layout(found, unit_rows, layer_group, None if existing is None else existing.layout)
    manifest = _manifest(source, found, layout, model, precision, existing)
    if existing is not None:
        check_identity(folder, existing, manifest.identity)
    judged = None
    if (source / "scores").is_dir():
        judged = match_scores(ScoreFiles.of(source), manifest, found.rows)
    with holding(folder, existing, timeout=lease_timeout, say=say) as fence:
        sessions = (*manifest.sessions, session_entry(fence.epoch))
        stored = write_run(fence, existing, replace(manifest, sessions=sessions), found.rows)
        redo = _damaged(fence) if repair and existing is not None else {}
        _Import(fence, stored, found, precision, redo, say).run()
        if redo:
            drop_replaced_records(fence, say)
        if judged is not None:
            commit_judgement(fence, stored.layout, judge, judged, say)
        write_index(fence, stored)
        folder.clear_scratch()
    say(f"{folder.url}: {layout.rows} rollouts of {len(found.roles)} roles, {layout.layers} layers x {layout.hidden}")


@dataclass(slots=True)
class _Draft:
    """A unit on its way."""

    value_RLD: NDArray[np.float32]
    rollouts: dict[int, Rollout] = field(default_factory=dict)


class _Import:
    """Units, filled by role after role in the order of the rows, and committed when they are whole."""

    def __init__(
        self,
        fence: Fence,
        manifest: Manifest,
        source: Source,
        precision: Precision,
        redo: Mapping[Slot, int],
        say: Callable[[str], None],
    ) -> None:
        self._fence, self._manifest, self._source, self._precision, self._say = fence, manifest, source, precision, say
        self._redo, self._damaged_units = redo, {unit for _, unit, _ in redo}
        self._layout = manifest.layout
        self._rows = {row.row: row for row in source.rows}
        self._committed = committed_slots(fence.folder)
        self._drafts: dict[int, _Draft] = {}

    def run(self) -> None:
        for number, role in enumerate(self._source.roles, start=1):
            missing = {row for row in role.rows.values() if not self._is_done(row // self._layout.unit_rows)}
            if missing:
                self._import_role(role, missing)
            self._say(f"{role.id}: {len(role.rows)} rollouts ({number} of {len(self._source.roles)} roles)")

    def _is_done(self, unit: int) -> bool:
        return (COORDINATES_RECORD, unit, 0) in self._committed and unit not in self._damaged_units

    def _import_role(self, role: SourceRole, missing: set[int]) -> None:
        from personaspace.store.formats.torch_files import iter_activations

        responses = dict(zip(role.rows.values(), read_role_responses(role.id, role.responses), strict=True))
        for key, act_LD in iter_activations(role.activations):
            row = role.rows[key]
            if row in missing:
                self._add(row, self._rollout(self._rows[row], responses[row]), act_LD)

    def _add(self, row: int, rollout: Rollout, act_LD: NDArray[np.float32]) -> None:
        layout, unit = self._layout, row // self._layout.unit_rows
        if unit not in self._drafts:
            shape = (layout.unit_rows, layout.layers, layout.hidden)
            self._drafts[unit] = _Draft(np.full(shape, np.nan, dtype=np.float32))
        draft = self._drafts[unit]
        draft.value_RLD[row - layout.unit_slice(unit).start] = act_LD
        draft.rollouts[row] = rollout
        if len(draft.rollouts) == len(layout.unit_row_range(unit)):
            self._commit(unit, self._drafts.pop(unit))

    def _commit(self, unit: int, draft: _Draft) -> None:
        layout, planned = self._layout, self._layout.unit_row_range(unit)
        part = encode_rollouts([draft.rollouts[row] for row in planned])
        source = self._commit_slot((ROLLOUTS, unit, 0), {rollouts_key(unit): part}).objects[0].sha256
        for group in range(layout.groups):
            slot = (RESID_POST_MEAN, unit, group)
            if self._is_needed(slot):
                layers = layout.group_layers(group)
                shard = encode_shard(draft.value_RLD[:, layers.start : layers.stop], layout, self._precision)
                self._commit_slot(slot, {shard_key(*slot): shard}, source=source)
        coordinates = unit_coordinates(
            self._manifest, unit, self._rows, dropped={}, tokens=dict.fromkeys(planned, TOKENS)
        )
        covers = tuple(f"{RESID_POST_MEAN}.{group:03d}" for group in range(layout.groups))
        self._commit_slot((COORDINATES_RECORD, unit, 0), coordinates, source=source, covers=covers)

    def _is_needed(self, slot: Slot) -> bool:
        return slot not in self._committed or slot in self._redo

    def _commit_slot(
        self, slot: Slot, objects: Mapping[str, bytes], *, source: str | None = None, covers: tuple[str, ...] = ()
    ) -> Record:
        return commit(
            self._fence,
            slot,
            objects,
            rows=self._layout.unit_row_range(slot[1]),
            dropped={},
            source=source,
            covers=covers,
            generation=self._redo.get(slot, self._committed.get(slot, 0)),
        )

    def _rollout(self, row: PlannedRow, response: Response) -> Rollout:
        return Rollout(
            row=row.row,
            rollout_id=row.rollout_id,
            role=response.role,
            role_id=row.role_id,
            prompt=row.prompt,
            question=row.question,
            sample=row.sample,
            messages=[dict(turn) for turn in response.conversation[:-1]],
            response=response.conversation[-1]["content"],
            prompt_token_ids=[],
            response_token_ids=[],
            finish_reason="imported",
            template_hash=UNKNOWN,
            sampling="{}",
            seed=0,
        )


def _damaged(fence: Fence) -> dict[Slot, int]:
    """What the files can give back -> the generation in which it is committed again."""
    redo: dict[Slot, int] = {}
    for problem in verify(fence.folder, own_epoch=fence.epoch).harmful:
        if problem.slot is not None and problem.slot[0] in (ROLLOUTS, RESID_POST_MEAN, COORDINATES_RECORD):
            redo[problem.slot] = max(redo.get(problem.slot, 0), problem.generation + 1)
    return redo


def _layout(source: Source, unit_rows: int | None, layer_group: int | None, existing: Layout | None) -> Layout:
    for name, given in (("unit_rows", unit_rows), ("layer_group", layer_group)):
        if given is not None and given < 1:
            raise InputError(f"{name}: {given}; it must be 1 or more.")
    if layer_group is not None and layer_group > source.layers:
        raise InputError(f"layer_group: {layer_group} is more than the {source.layers} layers of the activations.")
    return Layout(
        segments=(len(source.rows),),
        layers=source.layers,
        hidden=source.hidden,
        unit_rows=unit_rows
        or (existing.unit_rows if existing else choose_unit_rows([len(role.rows) for role in source.roles])),
        layer_group=layer_group or (existing.layer_group if existing else choose_layer_group(source.layers)),
    )


def _manifest(
    source: Path, found: Source, layout: Layout, model: str, precision: Precision, existing: Manifest | None
) -> Manifest:
    """What run.json will say."""
    identity = {
        "model": {
            "name": model,
            "revision": UNKNOWN,
            "files": {},
            "dtype": UNKNOWN,
            "template_hash": UNKNOWN,
            "system_policy": UNKNOWN,
            "imported": True,
        },
        "generate": {"imported": True},
        "extract": {
            "pooling": "mean over response tokens, as in the imported files",
            "imported": {"format": "assistant-axis", "sha256": found.digest},
        },
        "store": {
            "layers": layout.layers,
            "hidden": layout.hidden,
            "unit_rows": layout.unit_rows,
            "layer_group": layout.layer_group,
            "precision": precision,
        },
    }
    return Manifest(
        identity=identity,
        layout=layout,
        arrays=(
            ArraySpec(
                name=RESID_POST_MEAN,
                description="Mean over the response tokens of the residual stream after each block",
            ),
        ),
        tables=found.tables(),
        plan=() if existing is None else existing.plan,
        unit_order=tuple(range(layout.units)),
        metadata=() if existing is None else existing.metadata,
        execution={"imported_from": str(source.absolute())},
        sessions=() if existing is None else existing.sessions,
    )
