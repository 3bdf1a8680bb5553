"""The job: everything that is decided before any work, resolved and checked, with nothing written yet."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from personaspace.cluster.arrays import count_span_places, merge_arrays
from personaspace.extract.anatomy import check_supported
from personaspace.extract.catalogue import Question, Role
from personaspace.extract.chat import ChatFormat
from personaspace.extract.checkpoint import Checkpoint, resolve
from personaspace.extract.config import AuditorConfig, ExtractConfig, GenerateConfig, ModelConfig, PersonasConfig
from personaspace.extract.generate.capture import check_capturable
from personaspace.extract.growth import Change, StoredPlan, continue_plan
from personaspace.extract.hooks import LayerHook
from personaspace.extract.imported import plan_finished
from personaspace.extract.packing import chooses_packed, windows
from personaspace.extract.personas import PersonaPlan, PlannedRollout, plan_personas, steered
from personaspace.extract.quantization import check_packages
from personaspace.extract.reductions import Readout
from personaspace.extract.sites import check_compilable
from personaspace.store.config import StoreConfig
from personaspace.store.errors import InputError
from personaspace.store.layout import Layout, choose_layer_group, choose_unit_rows, interleave
from personaspace.store.location import run_folder
from personaspace.store.manifest import Manifest, check_identity, read_manifest, refuse_frozen
from personaspace.store.objects import Folder
from personaspace.store.plan import PlannedRow, read_plan
from personaspace.store.records import Slot, committed_slots
from personaspace.store.schema import span_parts


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A run as planned: pure data, shared by all steps and actors."""

    folder: Folder
    model: ModelConfig
    generate: GenerateConfig
    auditor: AuditorConfig = field(default_factory=AuditorConfig)
    """Who is the user in conversations of several turns."""
    extract: ExtractConfig
    store: StoreConfig
    checkpoint: Checkpoint
    plan: PersonaPlan
    manifest: Manifest
    """What run.json will say."""
    existing: Manifest | None
    """What it says now; None where there is no run."""
    redo: Mapping[Slot, int] = field(default_factory=dict)
    """Damaged pieces -> the generation in which a repair makes them again."""
    rows: Mapping[int, PlannedRollout]
    """Row of the rollout axis -> its rollout."""
    hooks: tuple[LayerHook, ...] = ()
    """Changes to the residual stream, wherever the model runs."""

    @property
    def layout(self) -> Layout:
        return self.manifest.layout

    @property
    def packed(self) -> bool:
        """How micro-batches are formed."""
        return chooses_packed(self.extract.packing, self.model.attention)

    @property
    def parts(self) -> tuple[str, ...]:
        """Parts of assistant turns that get a row each in the arrays of spans."""
        return span_parts(self.manifest.arrays)

    @property
    def groups_run(self) -> int:
        """Layer groups that are run: nothing behind the last one that is asked for."""
        return 1 + max(group for spec in self.manifest.arrays for group in spec.wanted_groups(self.layout))

    def missing_shards(self, committed: Mapping[Slot, int], unit: int) -> tuple[tuple[str, int], ...]:
        """Shards of a unit that are asked for and have no record: (array's name in records, layer group)."""
        return tuple(
            (spec.record, group)
            for spec in self.manifest.arrays
            for group in spec.wanted_groups(self.layout)
            if (spec.record, unit, group) not in committed
        )

    @property
    def windows(self) -> list[tuple[int, ...]]:
        """Units that are packed and committed together, in order."""
        return self._by_segment(self.extract.window_rows)

    @property
    def generation_batches(self) -> list[tuple[int, ...]]:
        """Units that are decoded together: fixed by the plan, so that a resume repeats them exactly."""
        return self._by_segment(self.generate.batch_rows)

    def committed(self) -> dict[Slot, int]:
        """Slot -> committed generation, without what a repair has yet to make again."""
        stored = committed_slots(self.folder)
        return {slot: number for slot, number in stored.items() if number >= self.redo.get(slot, 0)}

    def ids(self, unit: int) -> dict[int, str]:
        """Row -> rollout id of a unit's planned rows."""
        return {row: self.rows[row].rollout_id for row in self.layout.unit_row_range(unit)}

    def planned_rows(self) -> list[PlannedRow]:
        """The plan as it is stored."""
        names = list(PlannedRow.__dataclass_fields__)
        return [PlannedRow(**{name: getattr(row, name) for name in names}) for row in self.plan.rows]

    def _by_segment(self, rows: int) -> list[tuple[int, ...]]:
        # Growth must not move the borders of what is there, so none spans two segments.
        return [
            group
            for units in self.layout.segment_units
            for group in windows(
                [unit for unit in self.manifest.unit_order if unit in units], self.layout.unit_rows, rows
            )
        ]


def prepare(
    *,
    model: ModelConfig,
    personas: PersonasConfig,
    generate: GenerateConfig,
    extract: ExtractConfig,
    store: StoreConfig,
    execution: Mapping[str, Any],
    keep: bool = False,
    hooks: Sequence[LayerHook] = (),
    steering: Mapping[str, Any] | None = None,
) -> Job:
    """Resolve the model, plan the rollouts, lay out the store. Writes nothing.

    ``hooks`` change the model wherever it runs; ``steering`` describes them, as far as they decide numbers.
    ``keep`` holds to the rollouts and arrays that the run has, whatever the config plans. Raises InputError for
    anything unusable, and IdentityError if the run exists with other settings or, unless it may grow, with other
    rollouts.
    """
    folder = run_folder(store.root, store.run)
    existing = read_manifest(folder)
    refuse_frozen(folder, existing)
    checkpoint = resolve(model)
    check_supported(checkpoint)
    check_packages(checkpoint.source, checkpoint.quantization)
    chat = ChatFormat(checkpoint, model)
    plan = plan_rollouts(personas, generate, checkpoint.name)
    if steering is not None:
        plan = steered(plan, json.dumps(steering, sort_keys=True))
    layout = _layout(plan, checkpoint, store, None if existing is None else existing.layout)
    identity = {
        "model": {
            "name": checkpoint.name,
            "revision": checkpoint.revision,
            "files": checkpoint.files,
            "dtype": model.settled_dtype,
            "attention": model.attention,
            "template_hash": chat.template_hash,
            "system_policy": chat.system_policy,
            # Only where weights are quantised: runs of other models stay the same.
            **({"quantization": checkpoint.quantization} if checkpoint.quantization else {}),
        },
        "generate": _generation(generate),
        # Only where it is so, as with all that came later.
        **({} if steering is None else {"steer": steering}),
        "extract": {
            "pooling": "sums in float32",
            "packed": chooses_packed(extract.packing, model.attention),
            "micro_batch_tokens": extract.micro_batch_tokens,
            "window_rows": extract.window_rows,
            "generate_batch_rows": generate.batch_rows,
            # Only where they are so: runs from before there were these settings stay the same.
            **({"compiled": True} if extract.compile else {}),
            **({"captured": True} if generate.capture else {}),
        },
        "store": {
            "layers": layout.layers,
            "hidden": layout.hidden,
            "unit_rows": layout.unit_rows,
            "layer_group": layout.layer_group,
            "precision": store.precision,
        },
    }
    if existing is not None:
        check_identity(folder, existing, identity)
        stored = _stored_plan(folder, existing)
        change: Change = "keep" if keep else "grow" if store.grow else "refuse"
        plan = continue_plan(stored, plan, existing.layout, change=change, where=folder.url)
        added = len(plan.rows) - len(stored.rows)
        layout = existing.layout.grow(added) if added else existing.layout
    rows = {row.row: row for row in plan.rows}
    arrays = existing.arrays if existing and keep else merge_arrays(existing, extract, layout, store.grow, folder.url)
    if extract.compile:
        check_compilable(Readout.of_arrays(arrays).sites)
    if generate.capture:
        check_capturable(Readout.of_arrays(arrays), generate)
    manifest = Manifest(
        identity=identity,
        layout=layout,
        arrays=arrays,
        spans_per_rollout=count_span_places(folder, existing, arrays, plan),
        tables={"roles": [asdict(role) for role in plan.roles], "questions": [asdict(q) for q in plan.questions]},
        plan=() if existing is None else existing.plan,
        unit_order=_unit_order(layout, rows),
        metadata=() if existing is None else existing.metadata,
        execution={**execution, "source": checkpoint.source},
        sessions=() if existing is None else existing.sessions,
    )
    return Job(
        folder=folder,
        model=model,
        generate=generate,
        auditor=personas.auditor,
        extract=extract,
        store=store,
        checkpoint=checkpoint,
        plan=plan,
        rows=rows,
        manifest=manifest,
        existing=existing,
        hooks=tuple(hooks),
    )


def plan_rollouts(personas: PersonasConfig, generate: GenerateConfig, model_name: str) -> PersonaPlan:
    """The rollouts that a config plans, to generate or to import; ``model_name`` fills `{model_name}`."""
    if generate.responses is None:
        if generate.first_turns is not None:
            raise InputError(
                "generate.first_turns: cuts imported transcripts, and generate.responses names none. Of conversations "
                "that are held here, personas.turns says how many turns they have."
            )
        generation = json.dumps(_generation(generate), sort_keys=True)
        return plan_personas(personas, model_name=model_name, generation=generation)
    return plan_finished(generate, personas)


def _generation(generate: GenerateConfig) -> dict[str, Any]:
    """The settings that decide a response's text, or that there is none to generate."""
    if generate.responses is not None:
        return {"imported": True}
    served = generate.endpoint.model if generate.engine == "openai" else None
    return {
        "engine": generate.engine,
        # Which model a server's name stands for, nobody can see from here.
        **({} if served is None else {"served_model": served}),
        "max_new_tokens": generate.max_new_tokens,
        "temperature": generate.temperature,
        "top_p": generate.top_p,
        "seed": generate.seed,
        # Only where it is so: rollouts from before there was this setting keep their ids.
        **({"batching": generate.batching} if generate.batching != "static" else {}),
    }


def _layout(plan: PersonaPlan, checkpoint: Checkpoint, store: StoreConfig, existing: Layout | None) -> Layout:
    """The layout of a new run. R and G are an existing run's where the config leaves them open."""
    if store.layer_group is not None and store.layer_group > checkpoint.layers:
        raise InputError(f"store.layer_group: {store.layer_group} is more than the model's {checkpoint.layers} layers.")
    return Layout(
        segments=(len(plan.rows),),
        layers=checkpoint.layers,
        hidden=checkpoint.hidden,
        unit_rows=store.unit_rows or (existing.unit_rows if existing else choose_unit_rows(plan.rows_per_role())),
        layer_group=store.layer_group or (existing.layer_group if existing else choose_layer_group(checkpoint.layers)),
    )


def _unit_order(layout: Layout, rows: Mapping[int, PlannedRollout]) -> tuple[int, ...]:
    """All units in the order of work: interleaved over roles, segment by segment."""
    order: list[int] = []
    for units in layout.segment_units:
        first_roles = [rows[layout.unit_row_range(unit).start].role_id for unit in units]
        order += [units.start + place for place in interleave(first_roles)]
    return tuple(order)


def _stored_plan(folder: Folder, manifest: Manifest) -> StoredPlan:
    roles: list[Any] = list(manifest.tables["roles"])
    questions: list[Any] = list(manifest.tables["questions"])
    return StoredPlan(
        roles=tuple(Role(**{**role, "prompts": tuple(role["prompts"])}) for role in roles),
        questions=tuple(Question(**question) for question in questions),
        rows=tuple(read_plan(folder, manifest)),
    )
