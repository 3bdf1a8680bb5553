"""Scores of the reference project's judge, put onto the rollouts of a run.

A file's keys hold its own indices. Which rollout a key means:

- question: where the run's questions have ids `aaN` (they came from the project's files), N is the file's index; else
  the index is the question's place in the run, as this project exports it.
- prompt: the index of the role's system prompt. A run of imported responses keeps no such indices, only their order:
  its first prompt is the smallest index of the role's responses, and so on. They are taken from `responses` beside
  `scores`; without those, from the scores, if they have as many prompts as the run.

Where there are responses beside the scores, they must be those of the run, word for word.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from personaspace.store.errors import InputError, IntegrityError
from personaspace.store.formats.assistant_axis import Response, question_numbers, read_role_responses
from personaspace.store.formats.assistant_axis_scores import iter_scores, parse_key, response_key
from personaspace.store.formats.directions import some
from personaspace.store.holding import holding
from personaspace.store.layout import Layout
from personaspace.store.lease import Fence
from personaspace.store.manifest import Manifest, refuse_frozen, require_manifest, write_manifest
from personaspace.store.objects import Folder
from personaspace.store.parquet import decode_table
from personaspace.store.plan import PlannedRow, read_plan
from personaspace.store.provenance import session_entry
from personaspace.store.records import committed_slots, read_object, read_record
from personaspace.store.rollouts import read_rollouts
from personaspace.store.scores import SCHEMA, Score, commit_scores, scores_key, scores_slot

Texts = Callable[[Sequence[int]], Mapping[int, str]]
"""Responses of rows as the run has them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreFiles:
    """Where the scores are, and the responses that they were given for, if those are there."""

    scores: Path
    responses: Path | None

    @classmethod
    def of(cls, source: Path) -> "ScoreFiles":
        """In an output folder of the project, or in its folder `scores`. Raises InputError if there is none."""
        scores = source / "scores" if (source / "scores").is_dir() else source
        if not scores.is_dir():
            raise InputError(f"{source}: is no folder; give one that holds ROLE.json files with scores.")
        responses = scores.parent / "responses"
        return cls(scores=scores, responses=responses if responses.is_dir() else None)


def import_scores(
    source: Path, folder: Folder, *, judge: str, lease_timeout: float = 60.0, say: Callable[[str], None] = print
) -> None:
    """Put SOURCE/ROLE.json (or SOURCE/scores/ROLE.json) onto a run's rollouts, as those of the judge version ``judge``.

    Everything is checked before anything is written. Raises InputError naming file and key for a role or key that the
    run does not have, and where it can't be told which rollout is meant, or ``judge`` has scored it otherwise.
    """
    manifest = require_manifest(folder)
    refuse_frozen(folder, manifest)
    scores_key(judge, 0)
    rows = manifest.layout.unit_rows

    def texts(wanted: Sequence[int]) -> dict[int, str]:
        table = read_rollouts(folder, sorted({row // rows for row in wanted}), ["row", "response"])
        return {entry["row"]: entry["response"] for entry in table.to_pylist()}

    judged = match_scores(ScoreFiles.of(source), manifest, read_plan(folder, manifest), texts)
    with holding(folder, manifest, timeout=lease_timeout, say=say) as fence:
        _missing_parts(fence, manifest.layout, judge, judged)  # Refuses before anything is written.
        sessions = (*manifest.sessions, session_entry(fence.epoch))
        write_manifest(fence, manifest, replace(manifest, sessions=sessions))
        commit_judgement(fence, manifest.layout, judge, judged, say)


def match_scores(
    files: ScoreFiles, manifest: Manifest, rows: Sequence[PlannedRow], texts: Texts | None = None
) -> dict[int, int]:
    """Row -> score. With ``texts``, responses beside the scores are compared with those of the run."""
    roles: list[Any] = list(manifest.tables["roles"])
    names = [role["id"] for role in roles]
    numbers = question_numbers([str(question["id"]) for question in manifest.tables["questions"]])
    place_of_question = {number: place for place, number in enumerate(numbers)}
    rows_of: dict[int, list[PlannedRow]] = {}
    for row in rows:
        rows_of.setdefault(row.role_id, []).append(row)
    judged: dict[int, int] = {}
    for role, scores in iter_scores(files.scores):
        file = files.scores / f"{role}.json"
        if role not in names:
            raise InputError(f"{file}: the run has no role {role!r}; it has {some(names)}.")
        role_id = names.index(role)
        responses = _responses(files, role)
        prompts = len(roles[role_id]["prompts"])
        if manifest.identity["generate"].get("imported"):
            place_of_prompt = _prompt_places(file, scores, responses, prompts)
        else:
            place_of_prompt = {prompt: prompt for prompt in range(prompts)}
        row_of = _row_of(rows_of.get(role_id, []), file)
        found: dict[int, str] = {}
        for key in scores:
            label, prompt, question = parse_key(key, str(file))
            place = (place_of_prompt.get(prompt, -1), place_of_question.get(question, -1))
            if label == "neg" or place not in row_of:
                raise InputError(f"{file}: {key}: the run has no such rollout of role {role!r}.")
            before = found.setdefault(row_of[place], key)
            if before != key:
                raise InputError(f"{file}: {before} and {key} mean the same rollout; remove one of the two.")
        if responses is not None and texts is not None and found:
            _compare(file, found, responses, texts(list(found)))
        judged.update((row, scores[key]) for row, key in found.items())
    if not judged:
        raise InputError(f"{files.scores}: its files hold no scores.")
    return judged


def commit_judgement(
    fence: Fence, layout: Layout, judge: str, judged: Mapping[int, int], say: Callable[[str], None]
) -> None:
    """Commit one part for each unit whose part is missing or damaged. Raises InputError if a part has other scores."""
    for unit, generation in _missing_parts(fence, layout, judge, judged).items():
        rows = [row for row in layout.unit_row_range(unit) if row in judged]
        commit_scores(
            fence, layout, judge, unit, [Score(row=row, score=judged[row]) for row in rows], generation=generation
        )
    say(f"{fence.folder.url}: {len(judged)} scores of {judge}")


def _missing_parts(fence: Fence, layout: Layout, judge: str, judged: Mapping[int, int]) -> dict[int, int]:
    """Unit -> generation in which its part is to be committed."""
    committed = committed_slots(fence.folder)
    missing: dict[int, int] = {}
    for unit in sorted({row // layout.unit_rows for row in judged}):
        slot, rows = scores_slot(judge, unit), layout.unit_row_range(unit)
        if slot not in committed:
            missing[unit] = 0
            continue
        try:
            record = read_record(fence.folder, slot, committed[slot])
            table = decode_table(read_object(fence.folder, record.objects[0]), SCHEMA)
        except IntegrityError:
            missing[unit] = committed[slot] + 1
            continue
        stored = dict(zip(table["row"].to_pylist(), table["score"].to_pylist(), strict=True))
        if stored != {row: judged[row] for row in rows if row in judged}:
            raise InputError(
                f"{fence.folder.url}: {judge!r} has scored the rows {rows.start} to {rows.stop - 1} already, and "
                "otherwise. The scores of a judge's version don't change: give these another name."
            )
    return missing


def _responses(files: ScoreFiles, role: str) -> list[Response] | None:
    file = None if files.responses is None else files.responses / f"{role}.jsonl"
    return read_role_responses(role, file) if file is not None and file.is_file() else None


def _prompt_places(
    file: Path, scores: Mapping[str, int], responses: Sequence[Response] | None, prompts: int
) -> dict[int, int]:
    """Index of a prompt in the file -> its place in the run, for a run of imported responses."""
    if responses is None:
        found, where = {parse_key(key, str(file))[1] for key in scores}, "scores"
    else:
        found, where = {response.prompt for response in responses}, "responses"
    if len(found) != prompts:
        raise InputError(
            f"{file}: the {where} have prompts {some(sorted(found))}, and the run has {prompts} of this role, so it "
            "can't be told which is which. Put the `responses` that the run was imported from beside `scores`."
        )
    return {prompt: place for place, prompt in enumerate(sorted(found))}


def _row_of(rows: Sequence[PlannedRow], file: Path) -> dict[tuple[int, int], int]:
    """(prompt, question) -> row."""
    found: dict[tuple[int, int], int] = {}
    for row in rows:
        if found.setdefault((row.prompt, row.question), row.row) != row.row:
            raise InputError(
                f"{file}: the run has several samples of prompt {row.prompt} and question {row.question}; the file "
                "can't say which of them is meant."
            )
    return found


def _compare(file: Path, found: Mapping[int, str], responses: Sequence[Response], texts: Mapping[int, str]) -> None:
    by_key = {response_key(entry.label, entry.prompt, entry.question): entry for entry in responses}
    for row, key in found.items():
        if key not in by_key:
            raise InputError(f"{file}: {key}: has no response in the folder `responses` beside it.")
        if row in texts and by_key[key].conversation[-1]["content"] != texts[row]:
            raise InputError(
                f"{by_key[key].where}: is not the response that the run has for {key}; these scores are of other text."
            )
