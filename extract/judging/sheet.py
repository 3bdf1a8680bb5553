"""Sheets of scored rollouts that a human checks by hand, and the scores in a filled one."""

import csv
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from itertools import zip_longest
from pathlib import Path

import jinja2

from personaspace.extract.judging.instructions import conversation_text
from personaspace.extract.judging.work import stored_roles
from personaspace.store.errors import InputError
from personaspace.store.holding import holding
from personaspace.store.manifest import refuse_frozen, require_manifest, write_manifest
from personaspace.store.objects import Folder
from personaspace.store.provenance import session_entry
from personaspace.store.rollouts import read_rollouts
from personaspace.store.scores import Judgement, Score, commit_scores, read_judgements

HUMAN = "human_score"
"""Column that is filled in."""
NOTE = "human_note"
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""A cell that begins so would be carried out by a spreadsheet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One rollout of a sheet. The fields are the columns."""

    row: int
    rollout_id: str
    role: str
    description: str
    question: str
    response: str
    judge_score: str = ""
    judge_reason: str = ""
    human_score: str = ""
    """0, 1, 2 or 3."""
    human_note: str = ""


def write_sheet(folder: Folder, file: Path, *, judge: str, count: int, seed: int = 0, is_blind: bool = False) -> int:
    """Write ``count`` of a judge's rollouts, spread over its scores and the roles, to a .csv or .html file.

    Returns how many it wrote. ``is_blind`` leaves out what the judge said. Raises InputError for another kind of file
    and a judge without scores.
    """
    if file.suffix not in (".csv", ".html"):
        raise InputError(f"judge-sheet: {file} is neither .csv nor .html.")
    manifest = require_manifest(folder)
    scores = {row: score for unit in read_judgements(folder, judge).values() for row, score in unit.scores.items()}
    if not scores:
        raise InputError(
            f"{folder.url}: {judge!r} has scored nothing here. `personaspace store show` names the judges."
        )
    descriptions = {role.id: role.description for role in stored_roles(manifest)}
    unit_rows = manifest.layout.unit_rows
    columns = ["row", "rollout_id", "role", "messages", "response"]
    strata: dict[tuple[int, str], list[tuple[str, int]]] = {}
    for entry in read_rollouts(folder, sorted({row // unit_rows for row in scores}), columns[:3]).to_pylist():
        if entry["row"] in scores:
            stratum = (round(scores[entry["row"]].score), entry["role"])
            strata.setdefault(stratum, []).append((entry["rollout_id"], entry["row"]))
    rows = _choose(strata, count, seed)
    texts = {
        entry["row"]: entry
        for entry in read_rollouts(folder, sorted({row // unit_rows for row in rows}), columns).to_pylist()
    }
    lines = [
        Line(
            row=row,
            rollout_id=texts[row]["rollout_id"],
            role=texts[row]["role"],
            description=descriptions.get(texts[row]["role"], ""),
            question=conversation_text(texts[row]["messages"]),
            response=texts[row]["response"],
            judge_score="" if is_blind else f"{scores[row].score:g}",
            judge_reason="" if is_blind else scores[row].reason or "",
        )
        for row in rows
    ]
    file.write_text(_csv(lines) if file.suffix == ".csv" else _html(lines, folder.url, judge), encoding="utf-8")
    print(f"{file}: {len(lines)} rollouts scored by {judge}; fill in {HUMAN} (0, 1, 2 or 3)")
    return len(lines)


def read_sheet(folder: Folder, file: Path, *, judge: str = "human", lease_timeout: float = 60.0) -> int:
    """Commit the scores that were filled into a .csv sheet, as those of ``judge``; returns how many.

    Lines without a score are left out. Raises InputError naming the line for a score that is none, for a rollout that
    the run does not have, and for one that ``judge`` has scored otherwise.
    """
    manifest = require_manifest(folder)
    refuse_frozen(folder, manifest)
    given = _filled(file)
    unit_rows = manifest.layout.unit_rows
    ids = read_rollouts(folder, sorted({row // unit_rows for row in given}), ["row", "rollout_id"]).to_pylist()
    known = {entry["row"]: entry["rollout_id"] for entry in ids}
    for row, (line, rollout, _) in given.items():
        if known.get(row) != rollout:
            raise InputError(f"{file}:{line}: row {row} of {folder.url} is not the rollout {rollout!r}.")
    judgements = read_judgements(folder, judge)
    for row, (line, _, score) in given.items():
        before = judgements.get(row // unit_rows, Judgement()).scores.get(row)
        if before is not None and before.score != score.score:
            raise InputError(
                f"{file}:{line}: {judge!r} has scored row {row} already, with {before.score:g}. The scores of a judge "
                "don't change: give these another name."
            )
    with holding(folder, manifest, timeout=lease_timeout, say=print) as fence:
        sessions = (*manifest.sessions, session_entry(fence.epoch))
        write_manifest(fence, manifest, replace(manifest, sessions=sessions))
        for unit in sorted({row // unit_rows for row in given}):
            old = judgements.get(unit, Judgement())
            new = {row: score for row, (_, _, score) in given.items() if row // unit_rows == unit}
            if new.keys() <= old.scores.keys():
                continue
            scores = {**new, **old.scores}
            commit_scores(
                fence,
                manifest.layout,
                judge,
                unit,
                [scores[row] for row in sorted(scores)],
                about={"model": "human"},
                generation=old.generation + 1,
            )
    print(f"{folder.url}: {len(given)} scores of {judge}")
    return len(given)


def _choose(strata: Mapping[tuple[int, str], Sequence[tuple[str, int]]], count: int, seed: int) -> list[int]:
    """Rows of (score, role) -> (rollout id, row): scores take turns, and within a score the roles.

    Which rollouts of a role, and which roles first, is decided by their ids and the seed alone.
    """

    def by_chance(text: object) -> bytes:
        return hashlib.sha256(f"{seed} {text}".encode()).digest()

    by_score: dict[int, list[list[tuple[str, int]]]] = {}
    for (score, _), entries in sorted(strata.items(), key=lambda item: by_chance(item[0])):
        by_score.setdefault(score, []).append(sorted(entries, key=lambda entry: by_chance(entry[0])))
    in_turn = [_take_turns(by_score[score]) for score in sorted(by_score)]
    return sorted(row for _, row in _take_turns(in_turn)[:count])


def _take_turns(lists: Sequence[Sequence[tuple[str, int]]]) -> list[tuple[str, int]]:
    return [entry for entries in zip_longest(*lists) for entry in entries if entry is not None]


def _csv(lines: Sequence[Line]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(Line.__dataclass_fields__))
    writer.writeheader()
    for line in lines:
        cells = asdict(line).items()
        writer.writerow({name: f"'{cell}" if str(cell).startswith(_FORMULA) else cell for name, cell in cells})
    return file.getvalue()


def _html(lines: Sequence[Line], run: str, judge: str) -> str:
    source = (resources.files("personaspace") / "extract" / "judging" / "sheet.html.j2").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source)
    return page.render(
        lines=[asdict(line) for line in lines], columns=list(Line.__dataclass_fields__), run=run, judge=judge
    )


def _filled(file: Path) -> dict[int, tuple[int, str, Score]]:
    """Row -> (line of the file, rollout id, score) of each line with a score."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read as UTF-8 text: {error}") from error
    # A spreadsheet in a language with decimal commas writes semicolons.
    delimiter = ";" if text.split("\n", 1)[0].count(";") > text.split("\n", 1)[0].count(",") else ","
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    missing = {"row", "rollout_id", HUMAN} - set(reader.fieldnames or ())
    if missing:
        raise InputError(
            f"{file}: has no column {' and '.join(sorted(missing))}; give a sheet of `judge-sheet` as .csv."
        )
    found: dict[int, tuple[int, str, Score]] = {}
    for entry in reader:
        score = (entry[HUMAN] or "").strip()
        if not score:
            continue
        if score not in ("0", "1", "2", "3") or not (entry["row"] or "").isdigit():
            raise InputError(
                f"{file}:{reader.line_num}: {HUMAN} is {score!r} and row {entry['row']!r}; a score is 0, 1, 2 or 3."
            )
        row = int(entry["row"])
        if row in found:
            raise InputError(f"{file}:{reader.line_num}: row {row} is there twice; remove one of the two.")
        note = (entry.get(NOTE) or "").strip() or None
        found[row] = (reader.line_num, entry["rollout_id"], Score(row=row, score=float(score), reason=note))
    if not found:
        raise InputError(f"{file}: no line has a {HUMAN}; fill in 0, 1, 2 or 3.")
    return found
