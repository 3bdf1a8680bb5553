"""What each dose does to the responses: who they say is speaking, and whether they hold together.

A sweep is a run for each dose, with the same prompts and noise (arXiv 2601.10387, section 4, does so along the
Assistant Axis, and section 5 with caps). What a response is, a judge of categories says; without one, who speaks is
known by phrases (configs/quality/speakers.yaml), so that shares are floors. Where neither says anything it is `unsaid`.
Shape suffixes: N rollouts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from personaspace.analysis.doses.turns import Turns, read_turns
from personaspace.analysis.quality.detect import COLUMNS, detect
from personaspace.analysis.quality.phrases import load_phrases, said_aloud
from personaspace.analysis.quality.shares import Share
from personaspace.store.errors import InputError
from personaspace.store.formats.role_names import SCENARIO
from personaspace.store.location import Location, open_folder
from personaspace.store.manifest import require_manifest
from personaspace.store.objects import Folder
from personaspace.store.rollouts import read_rollouts
from personaspace.store.scores import read_judgements

UNSAID = "unsaid"
SPEAKERS = ("assistant", "human", "nonhuman", "mystical", UNSAID)
"""Who a response may say is speaking; the first that fits counts."""
BROKEN = ("empty", "only_thought", "looping", "other_script")
"""Flaws of a response that does not hold together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Said:
    """One response at one dose."""

    prompt: str
    """Key of the same prompt at all doses."""
    role: str
    question: str
    response: str
    category: str
    """Of the dose's `categories`."""
    coherent: bool
    whole: bool
    """It ended by itself, and was not cut off."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dose:
    """All responses at one dose."""

    name: str
    """For people, such as `-0.5` or `cap p25`."""
    value: float
    """Its place on the axis of a chart."""
    said: tuple[Said, ...]
    steer: Mapping[str, object]
    """What the run says of its intervention; empty where there is none."""
    categories: tuple[str, ...] = SPEAKERS
    turns: Turns | None = None
    """Of its conversations; None where there are none."""

    def shares(self) -> dict[str, Share]:
        """Share of the responses in each category."""
        return {name: self._share(one.category == name for one in self.said) for name in self.categories}

    @property
    def coherent(self) -> Share:
        """Share of the responses that hold together: not empty, no loop, no foreign script."""
        return self._share(one.coherent for one in self.said)

    @property
    def words(self) -> float:
        """Median length of a response."""
        return float(np.median([len(one.response.split()) for one in self.said]))

    def _share(self, which: object) -> Share:
        found = list(which)  # type: ignore[call-overload]
        return Share(count=sum(found), total=len(found))


@dataclass(frozen=True, kw_only=True, slots=True)
class DoseRun:
    """Where a dose's responses lie."""

    name: str
    value: float
    run: Location


def read_doses(runs: Sequence[DoseRun], *, judge: str | None = None, space: Location | None = None) -> list[Dose]:
    """The responses of each run, in the order of ``runs``.

    ``judge``: a judge of categories that has scored them all; ``space``: a fitted run in which conversations are
    placed. Raises InputError where there are no responses, or where two doses were not asked the same.
    """
    doses = [_read_dose(one, judge, space) for one in runs]
    if not doses or not all(dose.said for dose in doses):
        raise InputError("sweep: a dose has no responses yet. Run the sweep again; it goes on where it stopped.")
    asked = {tuple(sorted(one.prompt for one in dose.said)) for dose in doses}
    if len({len(prompts) for prompts in asked}) > 1:
        raise InputError("sweep: the doses have different numbers of responses, so they can't be compared.")
    return doses


def speakers(texts: pa.Array) -> NDArray[np.str_]:
    """Who each response says is speaking ``(N,)``, of `SPEAKERS`."""
    said = said_aloud(texts)
    known = load_phrases("speakers.yaml")
    found = {"assistant": load_phrases()["broke_role"].find(said), **{name: known[name].find(said) for name in known}}
    return np.select([found[name] for name in SPEAKERS[:-1]], SPEAKERS[:-1], default=SPEAKERS[-1])


def _read_dose(one: DoseRun, judge: str | None, space: Location | None) -> Dose:
    folder = open_folder(one.run)
    manifest = require_manifest(folder)
    roles, questions = manifest.tables["roles"], manifest.tables["questions"]
    table = read_rollouts(folder, columns=[*COLUMNS, "sample"])
    flaws = detect(table, np.zeros(len(roles), dtype=bool))
    broken_N = np.any([flaws[name] for name in BROKEN], axis=0)
    categories: tuple[str, ...] = SPEAKERS
    category_N = speakers(table["response"].combine_chunks())
    if judge is not None:
        categories, category_N = _judged(folder, judge, table["row"].to_numpy())
    said = [
        Said(
            prompt=f"{roles[entry['role_id']]['id']}/{entry['prompt']}/{entry['question']}/{entry['sample']}",
            role=str(roles[entry["role_id"]]["id"]),
            question=_asked(entry["messages"], str(questions[entry["question"]]["text"])),
            response=entry["response"],
            category=str(category_N[place]),
            coherent=not broken_N[place],
            whole=entry["finish_reason"] == "stop",
        )
        for place, entry in enumerate(table.to_pylist())
    ]
    talks = any(role.get("kind") == SCENARIO for role in roles)
    return Dose(
        name=one.name,
        value=one.value,
        said=tuple(said),
        steer=dict(manifest.identity.get("steer", {})),
        categories=categories,
        turns=read_turns(folder, space) if talks and space is not None else None,
    )


def _judged(folder: Folder, judge: str, row_N: NDArray[np.int64]) -> tuple[tuple[str, ...], NDArray[np.str_]]:
    """What the categories are, and that of each row."""
    judgements = read_judgements(folder, judge).values()
    labels = next((tuple(judgement.about["labels"]) for judgement in judgements if judgement.about), None)
    if labels is None:
        raise InputError(f"{folder.url}: {judge} has judged nothing yet. Run the sweep again.")
    of_row = {row: labels[round(score.score)] for one in judgements for row, score in one.scores.items()}
    return (*labels, UNSAID), np.array([of_row.get(int(row), UNSAID) for row in row_N])


def _asked(messages: Sequence[Mapping[str, str]], question: str) -> str:
    """What the response answers: of a conversation its last turn, and not its topic."""
    said = [message["content"] for message in messages if message["role"] == "user"]
    return said[-1] if said else question


def doses_table(doses: Sequence[Dose]) -> pa.Table:
    """A row for each response: dose, value, role, question, response, category, coherent, whole."""
    return pa.Table.from_pylist(
        [
            {
                "dose": dose.name,
                "value": dose.value,
                "role": one.role,
                "question": one.question,
                "response": one.response,
                "category": one.category,
                "coherent": one.coherent,
                "whole": one.whole,
            }
            for dose in doses
            for one in dose.said
        ]
    )
