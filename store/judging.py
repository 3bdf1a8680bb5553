"""What a judge that is at work keeps: answers whose unit isn't complete yet, and what was spent so far.

``judging/<judge>/<epoch>-<number>.parquet`` are small parts of answers, one every few seconds. The next session takes
them over, so that no answer is paid for twice; when their units are committed they are deleted.
``judging/<judge>/ledger.json`` says what the judge is and what its sessions have spent. Both are written by the holder
of the lease only.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa

from personaspace.store.commit import publish
from personaspace.store.errors import IntegrityError
from personaspace.store.lease import Fence
from personaspace.store.objects import Folder
from personaspace.store.parquet import decode_table, encode_table
from personaspace.store.scores import check_judge
from personaspace.store.sealed import seal, unseal

JUDGING = "judging"
SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("score", pa.float32()),
        pa.field("reason", pa.string()),
    ]
)
_KEY = re.compile(rf"{JUDGING}/[A-Za-z0-9][A-Za-z0-9._-]*/(\d{{6,}}-\d{{6,}}\.parquet|ledger\.json)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What came of one rollout."""

    row: int
    score: float | None
    """0 to 3; None where the judge could give none."""
    reason: str | None = None
    """The judge's words, or why there is no score."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spending:
    """What one session has spent."""

    requests: int = 0
    """Sent, those that failed included."""
    prompt_tokens: int = 0
    """As the endpoint counted them, else estimated."""
    completion_tokens: int = 0
    usd: float | None = None
    """By the prices given; None where none were."""
    granted_usd: float | None = None
    """The session spends no more than this before it says so here: what counts if it was killed."""
    models: Mapping[str, int] = field(default_factory=dict)
    """Name that the endpoint answered under -> answers."""

    @property
    def at_most_usd(self) -> float:
        """What it may have spent, whatever happened to it."""
        return max(self.usd or 0.0, self.granted_usd or 0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ledger:
    """What a judge is, and what each of its sessions has spent."""

    about: Mapping[str, Any]
    """As in the parts of its scores."""
    sessions: Mapping[int, Spending] = field(default_factory=dict)
    """By the epoch of the lease."""

    def with_session(self, epoch: int, spending: Spending) -> "Ledger":
        return replace(self, sessions={**self.sessions, epoch: spending})

    def usd(self, *, before: int) -> float:
        """What the sessions before an epoch may have spent."""
        return sum(spending.at_most_usd for epoch, spending in self.sessions.items() if epoch < before)


def is_judging_key(key: str) -> bool:
    return _KEY.fullmatch(key) is not None


def ledger_key(judge: str) -> str:
    return f"{JUDGING}/{check_judge(judge)}/ledger.json"


def read_ledger(folder: Folder, judge: str) -> Ledger | None:
    """The judge's ledger, or None where it has none. Raises IntegrityError if it is damaged."""
    key = ledger_key(judge)
    try:
        stored = unseal(folder.get(key), f"{folder.url}/{key}")
    except FileNotFoundError:
        return None
    except IntegrityError as error:
        raise IntegrityError(
            f"{folder.url}/{key}: is damaged, so it is not known what the judge has spent. Delete it to begin anew."
        ) from error
    sessions = {int(epoch): Spending(**spending) for epoch, spending in stored["sessions"].items()}
    return Ledger(about=stored["about"], sessions=sessions)


def write_ledger(fence: Fence, judge: str, ledger: Ledger) -> None:
    """Replace the ledger. Raises LeaseError when fenced out."""
    fence.check()
    fence.folder.replace(ledger_key(judge), seal(asdict(ledger)))


def write_answers(fence: Fence, judge: str, number: int, answers: Sequence[Answer]) -> str:
    """Publish answers as this session's part ``number``; returns its key. Raises LeaseError when fenced out."""
    key = f"{JUDGING}/{check_judge(judge)}/{fence.epoch:06d}-{number:06d}.parquet"
    publish(fence, key, encode_table(pa.Table.from_pylist([asdict(answer) for answer in answers], schema=SCHEMA)))
    return key


def read_answers(folder: Folder, judge: str) -> dict[str, list[Answer]]:
    """Key -> answers of each part that is there, oldest first. A damaged part counts for nothing: it is asked again."""
    found: dict[str, list[Answer]] = {}
    for entry in folder.list(f"{JUDGING}/{check_judge(judge)}"):
        if not is_judging_key(entry.key) or entry.key == ledger_key(judge):
            continue
        try:
            table = decode_table(folder.get(entry.key), SCHEMA)
        except (FileNotFoundError, IntegrityError):
            found[entry.key] = []
        else:
            found[entry.key] = [Answer(**answer) for answer in table.to_pylist()]
    return found


def drop_answers(fence: Fence, keys: Iterable[str]) -> None:
    """Delete parts whose answers are committed. Raises LeaseError when fenced out."""
    for key in keys:
        fence.check()
        fence.folder.delete(key)
