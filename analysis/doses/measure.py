"""What each dose does to the responses: who they say is speaking, and whether they hold together.

A sweep is a run for each dose, with the same prompts and noise (arXiv 2601.10387, section 4, does so along the
Assistant Axis). Who speaks is known by phrases (configs/quality/speakers.yaml), so the shares are floors: a response
that says nothing of its speaker is `unsaid`. Shape suffixes: N rollouts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from personaspace.analysis.quality.detect import COLUMNS, detect
from personaspace.analysis.quality.phrases import load_phrases, said_aloud
from personaspace.analysis.quality.shares import Share
from personaspace.store.errors import InputError
from personaspace.store.location import Location, open_folder
from personaspace.store.manifest import require_manifest
from personaspace.store.objects import Folder
from personaspace.store.rollouts import read_rollouts

SPEAKERS = ("assistant", "human", "nonhuman", "mystical", "unsaid")
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
    speaker: str
    coherent: bool
    whole: bool
    """It ended by itself, and was not cut off."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dose:
    """All responses at one dose."""

    value: float
    said: tuple[Said, ...]
    steer: Mapping[str, object]
    """What the run says of its intervention; empty where there is none."""

    def speakers(self) -> dict[str, Share]:
        """Share of the responses in which each speaks."""
        return {name: self._share(one.speaker == name for one in self.said) for name in SPEAKERS}

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


def read_doses(runs: Mapping[float, Location]) -> list[Dose]:
    """The responses of a run for each dose, lowest dose first.

    Raises InputError where there is none, or where two doses were not asked the same.
    """
    doses = [_read_dose(value, open_folder(runs[value])) for value in sorted(runs)]
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


def _read_dose(value: float, folder: Folder) -> Dose:
    manifest = require_manifest(folder)
    roles, questions = manifest.tables["roles"], manifest.tables["questions"]
    table = read_rollouts(folder, columns=[*COLUMNS, "sample"])
    flaws = detect(table, np.zeros(len(roles), dtype=bool))
    broken_N = np.any([flaws[name] for name in BROKEN], axis=0)
    who_N = speakers(table["response"].combine_chunks())
    said = [
        Said(
            prompt=f"{roles[entry['role_id']]['id']}/{entry['prompt']}/{entry['question']}/{entry['sample']}",
            role=str(roles[entry["role_id"]]["id"]),
            question=str(questions[entry["question"]]["text"]),
            response=entry["response"],
            speaker=str(who_N[place]),
            coherent=not broken_N[place],
            whole=entry["finish_reason"] == "stop",
        )
        for place, entry in enumerate(table.to_pylist())
    ]
    return Dose(value=value, said=tuple(said), steer=dict(manifest.identity.get("steer", {})))


def doses_table(doses: Sequence[Dose]) -> pa.Table:
    """A row for each response: dose, role, question, response, speaker, coherent, whole."""
    return pa.Table.from_pylist(
        [
            {
                "dose": dose.value,
                "role": one.role,
                "question": one.question,
                "response": one.response,
                "speaker": one.speaker,
                "coherent": one.coherent,
                "whole": one.whole,
            }
            for dose in doses
            for one in dose.said
        ]
    )
