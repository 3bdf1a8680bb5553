"""What is exported of a run: its usable rollouts, read role by role, so that memory holds one role's at most.

Shapes: N rows of the rollout axis, L layers that are exported, D hidden size.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xarray as xr
from numpy.typing import NDArray

from personaspace.store.errors import InputError, IntegrityError
from personaspace.store.formats.assistant_axis import Response, question_numbers, write_responses
from personaspace.store.formats.assistant_axis_scores import response_key, write_scores
from personaspace.store.formats.directions import Directions, some
from personaspace.store.formats.files import replacing_parts
from personaspace.store.formats.role_names import DEFAULT_ROLE, check_role_name
from personaspace.store.layout import ranges
from personaspace.store.manifest import Manifest, require_manifest
from personaspace.store.objects import Folder
from personaspace.store.reader import open_run, stored_layers
from personaspace.store.records import committed_slots
from personaspace.store.rollouts import SCHEMA, read_rollouts
from personaspace.store.schema import RESID_POST_MEAN, STATUS
from personaspace.store.scores import judges

PARTS = ("responses", "scores", "activations", "vectors", "axis.pt")
"""What an output folder of the reference project holds."""
LABEL = "pos"
"""Polarity of every response: the reference's generator labels those of the default role so, too."""
TEXTS = ["row", "prompt", "question", "messages", "response"]
_TABLE = pa.schema(
    [
        *(SCHEMA.field(name) for name in ("rollout_id", "role", "prompt", "sample")),
        pa.field("question_id", pa.string(), nullable=False),
        pa.field("question", pa.string(), nullable=False),
        *(SCHEMA.field(name) for name in ("messages", "response", "finish_reason")),
        pa.field("n_tokens", pa.int32()),
        pa.field("score", pa.float32()),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RunPart:
    """The rollouts of a run that are exported."""

    folder: Folder
    manifest: Manifest
    run: xr.Dataset
    """As of ``open_run``, lazy."""
    rows: Mapping[str, list[int]]
    """Role -> its usable rows, ascending. Roles without any are left out."""
    score_N: NDArray[np.float32] | None
    """NaN where there is none; None: nobody has judged this run."""


def choose_rollouts(
    folder: Folder, *, roles: Sequence[str], sample: int | None, scores: str | None, say: Callable[[str], None]
) -> RunPart:
    """The usable rollouts of some roles, or of all; ``say`` tells how many are left out, and why.

    Raises InputError for unknown roles and judges, roles that can't be file names, and if nothing is usable.
    """
    manifest = require_manifest(folder)
    known = [str(role["id"]) for role in manifest.tables["roles"]]
    for role in roles or known:
        if role not in known:
            raise InputError(f"{folder.url}: no role {role!r} in this run; it has {some(known)}.")
        check_role_name(role, folder.url)
    chosen = {role: number for number, role in enumerate(known) if role in (roles or known)}
    run = _open(folder, scores)
    role_N, status_N = run["role_id"].values, run["status"].values
    asked_N = np.isin(role_N, list(chosen.values()))
    if sample is not None:
        asked_N &= run["sample"].values == sample
    counts = Counter(STATUS[code] for code in status_N[asked_N].tolist())
    usable_N = asked_N & (status_N == STATUS.index("ok"))
    rows = {role: np.flatnonzero(usable_N & (role_N == number)).tolist() for role, number in chosen.items()}
    if not counts["ok"]:
        which = "" if sample is None else f" with sample {sample}"
        raise InputError(
            f"{folder.url}: no usable rollouts of {some(chosen)}{which}: {counts['dropped']} are dropped, "
            f"{counts['pending']} pending. Extract first, or choose others."
        )
    say(
        f"{folder.url}: {counts['ok']} rollouts of {sum(map(bool, rows.values()))} roles; left out: "
        f"{counts['dropped']} dropped, {counts['pending']} pending"
    )
    return RunPart(
        folder=folder,
        manifest=manifest,
        run=run,
        rows={role: found for role, found in rows.items() if found},
        score_N=run["score"].values if "score" in run.coords else None,
    )


def write_assistant_axis(
    part: RunPart,
    destination: Path,
    directions: Directions | None,
    *,
    layers: Sequence[int],
    overwrite: bool,
    say: Callable[[str], None],
) -> None:
    """Writes an output folder of the reference project: everything, or, if anything is wrong, nothing.

    A question's index is N where the run's questions have ids `aaN`, else its place in the run. Raises InputError if
    a prompt and question have several samples, for which the format has no place.
    """
    from personaspace.store.formats.torch_files import write_activations

    stored = _stored_layers(part, layers)
    if directions is not None and list(directions.layers) != stored:
        raise InputError(
            f"{part.folder.url}: activations are stored of layers {ranges(stored)}, and the fit is of "
            f"{ranges(directions.layers)}. Fit again, or choose layers that both have."
        )
    keys = {role: _keys(part, role) for role in part.rows}
    with replacing_parts(destination, PARTS, overwrite=overwrite) as temporary:
        for number, role in enumerate(part.rows, start=1):
            write_responses(temporary / "responses", role, _responses(part, role))
            if part.score_N is not None and (scores := _role_scores(part, keys[role], part.score_N, role)):
                write_scores(temporary / "scores", role, scores)
            write_activations(temporary / "activations", role, _activations(part, keys[role], stored))
            say(f"{role}: {len(keys[role])} rollouts ({number} of {len(part.rows)} roles)")
        if directions is not None:
            write_vectors(temporary, directions)
    say(f"{destination}: layers {ranges(stored)}, one after another in each tensor")


def write_vectors(folder: Path, directions: Directions) -> None:
    """Writes vectors/ROLE.pt and axis.pt, those that there are."""
    from personaspace.store.formats.torch_files import RoleVector, write_axis, write_vector

    if directions.default_LD is not None:
        write_vector(folder / "vectors", RoleVector(role=DEFAULT_ROLE, kind="mean", vector_LD=directions.default_LD))
    for role in directions.roles:
        # The project takes any vector of kind `mean` for a default role's.
        vector = RoleVector(role=role, kind="pos_all", vector_LD=directions.role_LD(role))
        write_vector(folder / "vectors", vector)
    if directions.axis_LD is not None:
        write_axis(folder / "axis.pt", directions.axis_LD)


def rollout_tables(part: RunPart) -> Iterator[pa.Table]:
    """The rollouts as tables for a data set, one a unit and role; `n_tokens` and `score` are null where unknown."""
    questions: list[Any] = list(part.manifest.tables["questions"])
    tokens_N = part.run["n_tokens"].values
    for role in part.rows:
        for entries in _rollouts(part, role, [*SCHEMA.names]):
            rows = [entry["row"] for entry in entries]
            score = [None] * len(rows) if part.score_N is None else part.score_N[rows].tolist()
            columns = {name: [entry[name] for entry in entries] for name in _TABLE.names if name in SCHEMA.names}
            columns["question_id"] = [questions[entry["question"]]["id"] for entry in entries]
            columns["question"] = [questions[entry["question"]]["text"] for entry in entries]
            columns["n_tokens"] = [int(tokens_N[row]) or None for row in rows]
            columns["score"] = [None if value is None or value != value else value for value in score]
            yield pa.Table.from_pydict(columns, schema=_TABLE)


def _open(folder: Folder, judge: str | None) -> xr.Dataset:
    """The run with the scores of one judge, if there is one. Raises InputError if it isn't said which of several."""
    known = judges(committed_slots(folder))
    if judge is None and len(known) > 1:
        raise InputError(f"{folder.url}: {', '.join(known)} have judged this run; name one of them as `scores`.")
    return open_run(folder, scores=judge)


def _stored_layers(part: RunPart, asked: Sequence[int]) -> list[int]:
    spec = next((spec for spec in part.manifest.arrays if spec.path == RESID_POST_MEAN), None)
    if spec is None:
        raise InputError(f"{part.folder.url}: has no array {RESID_POST_MEAN}, which is what can be exported.")
    stored = stored_layers(part.folder, part.manifest, spec)
    unknown = sorted(set(asked) - set(stored))
    if unknown or not stored:
        raise InputError(
            f"{part.folder.url}: layers {unknown or list(asked)} are not stored for every rollout; "
            f"{ranges(stored) or 'none'} are."
        )
    return [layer for layer in stored if layer in asked] if asked else stored


def _keys(part: RunPart, role: str) -> dict[int, str]:
    """Row -> key. Raises InputError if two rows have the same."""
    numbers = question_numbers([str(question["id"]) for question in part.manifest.tables["questions"]])
    prompts, questions = part.run["prompt"].values, part.run["question"].values
    keys: dict[int, str] = {}
    rows: dict[str, int] = {}
    for row in part.rows[role]:
        keys[row] = response_key(LABEL, int(prompts[row]), numbers[questions[row]])
        other = rows.setdefault(keys[row], row)
        if other != row:
            samples = part.run["sample"].values
            raise InputError(
                f"{part.folder.url}: role {role!r} has samples {samples[other]} and {samples[row]} of prompt "
                f"{prompts[row]} and question {questions[row]}; the format has a place for one. "
                f"Choose one, such as sample {samples[other]}."
            )
    return keys


def _responses(part: RunPart, role: str) -> Iterator[Response]:
    roles: list[Any] = list(part.manifest.tables["roles"])
    prompts = next(entry["prompts"] for entry in roles if entry["id"] == role)
    questions: list[Any] = list(part.manifest.tables["questions"])
    numbers = question_numbers([question["id"] for question in questions])
    imported = bool(part.manifest.identity["generate"].get("imported"))
    for entries in _rollouts(part, role, TEXTS):
        for entry in entries:
            messages = [{"role": turn["role"], "content": turn["content"]} for turn in entry["messages"]]
            system = messages[0]["content"] if messages and messages[0]["role"] == "system" else ""
            yield Response(
                role=role,
                prompt=entry["prompt"],
                question=numbers[entry["question"]],
                question_text=questions[entry["question"]]["text"],
                label=LABEL,
                # An imported conversation may have its system prompt inside the user's turn.
                system_prompt=system or (prompts[entry["prompt"]] if imported else ""),
                conversation=(*messages, {"role": "assistant", "content": entry["response"]}),
            )


def _role_scores(part: RunPart, keys: Mapping[int, str], score_N: NDArray[np.float32], role: str) -> dict[str, int]:
    found = {key: float(score_N[row]) for row, key in keys.items() if not np.isnan(score_N[row])}
    for key, score in found.items():
        if not score.is_integer():
            raise InputError(f"{part.folder.url}: role {role!r}: score of {key} is {score}; the format has 0 to 3.")
    return {key: int(score) for key, score in found.items()}


def _activations(
    part: RunPart, keys: Mapping[int, str], layers: Sequence[int]
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    run = part.run[RESID_POST_MEAN].sel(layer=list(layers))
    for _, rows in _by_unit(part, list(keys)):
        for row, act_LD in zip(rows, run.isel(rollout=rows).values, strict=True):
            yield keys[row], act_LD


def _rollouts(part: RunPart, role: str, columns: list[str]) -> Iterator[list[dict[str, Any]]]:
    """The role's rollouts, unit by unit."""
    for unit, rows in _by_unit(part, part.rows[role]):
        by_row = {entry["row"]: entry for entry in read_rollouts(part.folder, [unit], columns).to_pylist()}
        if not set(rows) <= by_row.keys():
            raise IntegrityError(f"{part.folder.url}: unit {unit} has activations, but its rollouts are missing.")
        yield [by_row[row] for row in rows]


def _by_unit(part: RunPart, rows: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    for unit, found in groupby(rows, key=lambda row: row // part.manifest.layout.unit_rows):
        yield unit, list(found)
