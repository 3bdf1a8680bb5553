"""The job: everything that is decided before any work, resolved and checked, with nothing written yet."""

import importlib.metadata
import json
import platform
import re
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from personaspace.extract.chat import ChatFormat
from personaspace.extract.checkpoint import Checkpoint, resolve
from personaspace.extract.config import ExtractConfig, GenerateConfig, ModelConfig, PersonasConfig
from personaspace.extract.packing import windows
from personaspace.extract.personas import DEFAULT_ROLE, PersonaPlan, plan_imported, plan_personas
from personaspace.store.config import StoreConfig
from personaspace.store.errors import InputError
from personaspace.store.layout import Layout, choose_layer_group, choose_unit_rows, interleave
from personaspace.store.manifest import Manifest, check_identity
from personaspace.store.objects import LocalFolder
from personaspace.store.schema import RESID_POST_MEAN

_PACKAGES = ("personaspace", "torch", "transformers", "accelerate", "ray", "zarr", "numcodecs", "numpy", "pyarrow")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A run as planned: pure data, shared by all steps and actors."""

    folder: LocalFolder
    model: ModelConfig
    generate: GenerateConfig
    extract: ExtractConfig
    store: StoreConfig
    checkpoint: Checkpoint
    plan: PersonaPlan
    layout: Layout
    unit_order: tuple[int, ...]
    """Units in the order in which they are worked on."""
    manifest: Manifest
    """What run.json will say."""

    @property
    def windows(self) -> list[tuple[int, ...]]:
        """Units that are packed and committed together, in order."""
        return windows(self.unit_order, self.layout.unit_rows, self.extract.window_rows)

    @property
    def generation_batches(self) -> list[tuple[int, ...]]:
        """Units that are decoded together: fixed by the plan, so that a resume repeats them exactly."""
        return windows(self.unit_order, self.layout.unit_rows, self.generate.batch_rows)


def prepare(
    *,
    model: ModelConfig,
    personas: PersonasConfig,
    generate: GenerateConfig,
    extract: ExtractConfig,
    store: StoreConfig,
    execution: Mapping[str, Any],
) -> Job:
    """Resolve the model, plan the rollouts, lay out the store. Writes nothing.

    Raises InputError for anything unusable, and IdentityError if the run exists with other settings.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", store.run):
        raise InputError(f"store.run: {store.run!r} is no run name; use letters, digits, '.', '_' and '-'.")
    checkpoint = resolve(model)
    chat = ChatFormat(checkpoint, model)
    plan = _plan(personas, generate, checkpoint)
    layout = _layout(plan, checkpoint, store)
    order = interleave([plan.rows[unit * layout.unit_rows].role_id for unit in range(layout.units)])
    batching = {**asdict(extract), "generate_batch_rows": generate.batch_rows}
    manifest = Manifest(
        identity={
            "model": {
                "name": checkpoint.name,
                "revision": checkpoint.revision,
                "files": checkpoint.files,
                "dtype": model.dtype,
                "template_hash": chat.template_hash,
                "system_policy": chat.system_policy,
            },
            "personas": {"rows": len(plan.rows), "conversations": plan.content_hash()},
            "generate": _generation(generate),
            "extract": {"arrays": [RESID_POST_MEAN], "pooling": "mean over response tokens, float32", **batching},
            "store": {**asdict(layout), "precision": store.precision},
        },
        layout=layout,
        tables={"roles": [asdict(role) for role in plan.roles], "questions": [asdict(q) for q in plan.questions]},
        plan={"rows": len(plan.rows), "rows_per_role": plan.rows_per_role(), "unit_order": order},
        execution={**execution, "model": {"source": checkpoint.source}},
    )
    folder = LocalFolder(Path(store.root).expanduser().resolve() / store.run)
    check_identity(folder, manifest)
    return Job(
        folder=folder,
        model=model,
        generate=generate,
        extract=extract,
        store=store,
        checkpoint=checkpoint,
        plan=plan,
        layout=layout,
        unit_order=tuple(order),
        manifest=manifest,
    )


def session_entry(epoch: int) -> dict[str, Any]:
    """What run.json keeps about one driver: who, where, when, and with which software."""
    return {
        "epoch": epoch,
        "host": socket.gethostname(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "git_commit": _git_commit(),
    }


def _plan(personas: PersonasConfig, generate: GenerateConfig, checkpoint: Checkpoint) -> PersonaPlan:
    if generate.responses is None:
        generation = json.dumps(_generation(generate), sort_keys=True)
        return plan_personas(personas, model_name=checkpoint.name, generation=generation)
    folder = Path(generate.responses).expanduser()
    if not folder.is_dir():
        raise InputError(
            f"generate.responses: {generate.responses} is no folder; give one that holds ROLE.jsonl files."
        )
    if personas != PersonasConfig():
        changed = [name for name, value in asdict(personas).items() if value != getattr(PersonasConfig(), name)]
        raise InputError(
            f"personas.{changed[0]}: has no effect together with generate.responses, where roles and questions come "
            "from the files. Remove one of the two."
        )
    plan = plan_imported(folder)
    counts = Counter(plan.roles[row.role_id].id for row in plan.rows)
    if DEFAULT_ROLE not in counts or len(counts) < 2:
        raise InputError(
            f"generate.responses: {folder} holds {sorted(counts)}; `default` and at least one role needed."
        )
    return plan


def _generation(generate: GenerateConfig) -> dict[str, Any]:
    """The settings that decide a response's text, or that there is none to generate."""
    if generate.responses is not None:
        return {"imported": True}
    return {
        "engine": "transformers",
        "max_new_tokens": generate.max_new_tokens,
        "temperature": generate.temperature,
        "top_p": generate.top_p,
        "seed": generate.seed,
    }


def _layout(plan: PersonaPlan, checkpoint: Checkpoint, store: StoreConfig) -> Layout:
    if store.layer_group is not None and store.layer_group > checkpoint.layers:
        raise InputError(f"store.layer_group: {store.layer_group} is more than the model's {checkpoint.layers} layers.")
    return Layout(
        rows=len(plan.rows),
        layers=checkpoint.layers,
        hidden=checkpoint.hidden,
        unit_rows=store.unit_rows or choose_unit_rows(plan.rows_per_role()),
        layer_group=store.layer_group or choose_layer_group(checkpoint.layers),
    )


def _git_commit() -> str | None:
    """Commit of the source tree that this package runs from, with `+` where it has changes; None if not in git."""
    source = Path(__file__).resolve()

    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", *arguments], cwd=source.parent, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        # An installed copy may lie inside somebody else's repository.
        if git("ls-files", "--error-unmatch", source.name) is None:
            return None
        return git("describe", "--always", "--dirty=+", "--abbrev=40", "--exclude=*")
    except FileNotFoundError:
        return None
