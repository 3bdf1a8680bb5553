"""One person's conversation with both sides of a model, as it is and capped: what was said, and where it lay."""

import copy
import json
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from personaspace.steer.live.dials import CapTable, Dials
from personaspace.steer.live.gauge import Gauge
from personaspace.steer.live.talker import Answer, Ask, Event, Talker, Ticket
from personaspace.store.errors import InputError
from personaspace.store.formats.json_text import parse_json

Side = Literal["plain", "capped"]
SIDES: tuple[Side, ...] = get_args(Side)
FORMAT = "personaspace-chat"
"""What a saved conversation says it is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """A finished answer."""

    text: str
    finish_reason: str
    position: float | None
    """On the axis: mean role 0, default 1. None for an answer without tokens."""
    cap: str = ""
    """How the model was capped, in words; empty where it was not."""


@dataclass(kw_only=True, slots=True)
class Record:
    """What is kept of a conversation, and saved: the user's turns, and each side's answers to them."""

    system: str = ""
    said: list[str] = field(default_factory=list)
    answers: dict[Side, list[Turn]] = field(default_factory=lambda: {side: [] for side in SIDES})

    def messages(self, side: Side, turns: int | None = None) -> tuple[dict[str, str], ...]:
        """The conversation with one side, up to the user's turn number ``turns`` (default: all)."""
        count = len(self.said) if turns is None else turns
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for number, said in enumerate(self.said[:count]):
            messages.append({"role": "user", "content": said})
            if number < min(count - 1, len(self.answers[side])):
                messages.append({"role": "assistant", "content": self.answers[side][number].text})
        return tuple(messages)

    def to_json(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"format": FORMAT, "version": 1, **asdict(self)}

    @classmethod
    def from_json(cls, raw: bytes) -> "Record":
        """A saved conversation. Raises InputError for anything else."""
        entry = parse_json(raw, "not valid JSON")
        try:
            if (entry["format"], entry["version"]) != (FORMAT, 1):
                raise KeyError("format")
            answers = {side: [Turn(**turn) for turn in entry["answers"][side]] for side in SIDES}
            record = cls(system=str(entry["system"]), said=[str(said) for said in entry["said"]], answers=answers)
        except (KeyError, TypeError) as error:
            raise InputError(f"no conversation that was saved here: {error}.") from error
        if any(len(turns) > len(record.said) for turns in answers.values()):
            raise InputError("no conversation that was saved here: more answers than turns.")
        return record

    def transcript(self, side: Side, model: str) -> dict[str, Any]:
        """One side as a transcript of the reference project, which `personaspace watch` and `drift` read."""
        answered = len(self.answers[side])
        conversation = list(self.messages(side, answered))
        if answered:
            conversation.append({"role": "assistant", "content": self.answers[side][-1].text})
        return {
            "model": model,
            "turns": sum(message["role"] != "system" for message in conversation),
            "conversation": conversation,
            "steering_config": {"cap": self.answers[side][-1].cap if answered else ""},
        }


class Dialogue:
    """A `Record` that goes on: what is said is answered by both sides at once.

    ``version`` rises with every change, so that whoever shows it knows when to look; several may.
    """

    def __init__(self, talker: Talker, gauge: Gauge, caps: CapTable, *, max_tokens: int = 512) -> None:
        self._talker, self._gauge, self._caps = talker, gauge, caps
        self._max_tokens = max_tokens
        self.record = Record()
        self.dials = caps.suggested
        self.partial: dict[Side, str] = {}
        """Answers that are on their way."""
        self.problem = ""
        self.version = 0
        self._lock = threading.Lock()
        self._tickets: dict[Side, Ticket] = {}

    @property
    def busy(self) -> bool:
        """Whether an answer is on its way."""
        return bool(self.partial)

    def say(self, text: str) -> None:
        """The user's next turn. Raises InputError or BusyError as the talker does, with nothing changed."""
        if self.busy or not text.strip():
            return
        before = copy.deepcopy(self.record)
        self.record.said.append(text.strip())
        try:
            for side in SIDES:
                self._ask(side)
        except Exception:
            self.restart(before)  # One side may have been taken.
            raise

    def again(self) -> None:
        """The capped side answers the last turn anew, as the dials now stand."""
        if self.busy or not self.record.said:
            return
        kept = self.record.answers["capped"]
        self.record.answers["capped"] = kept[: len(self.record.said) - 1]
        try:
            self._ask("capped")
        except Exception:
            self.record.answers["capped"] = kept
            raise

    def stop(self) -> None:
        """End what is on its way; what was said of it is kept."""
        for ticket in list(self._tickets.values()):
            ticket.cancel()

    def restart(self, record: Record | None = None) -> None:
        """Begin anew, or go on with a saved conversation."""
        self.stop()
        with self._lock:
            self.record, self.partial, self.problem = record or Record(), {}, ""
            self._tickets = {}
            self.version += 1

    def _ask(self, side: Side) -> None:
        record, dials = self.record, self.dials
        ask = Ask(
            messages=record.messages(side),
            interventions=self._caps.interventions(dials) if side == "capped" else (),
            max_tokens=self._max_tokens,
            fit=True,
            # The same noise for both, so that they differ by the cap alone.
            seed=len(record.said),
        )

        def listen(event: Event) -> None:
            with self._lock:
                if record is not self.record:
                    return  # Begun anew meanwhile.
                if isinstance(event, str):
                    self.partial[side] = self.partial.get(side, "") + event
                else:
                    self._end(side, event, dials)
                self.version += 1

        with self._lock:
            self.partial[side], self.problem = "", ""
            self.version += 1
        try:
            self._tickets[side] = self._talker.ask(ask, listen)
        except Exception:
            with self._lock:
                self.partial.pop(side, None)
            raise

    def _end(self, side: Side, event: Answer | Exception, dials: Dials) -> None:
        self.partial.pop(side, None)
        if isinstance(event, Exception):
            self.problem = f"{side}: {event}"
            event = Answer(text="", finish_reason="cancelled", prompt_tokens=0, response_tokens=0, projections={})
        projection = event.projections.get(self._gauge.layer)
        self.record.answers[side].append(
            Turn(
                text=event.text,
                finish_reason=event.finish_reason,
                position=None if projection is None else self._gauge.position(projection),
                cap=dials.words() if side == "capped" else "",
            )
        )


def saved(record: Record) -> str:
    """A conversation as a file."""
    return json.dumps(record.to_json(), indent=1, ensure_ascii=False) + "\n"


def transcript_file(transcript: Mapping[str, Any]) -> str:
    """A transcript as a file."""
    return json.dumps(transcript, indent=2, ensure_ascii=False) + "\n"
