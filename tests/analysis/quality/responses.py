"""Runs whose responses are given: what the tests of quality share."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from personaspace.store.commit import commit
from personaspace.store.layout import Layout, rollouts_key
from personaspace.store.lease import acquire
from personaspace.store.local import LocalFolder
from personaspace.store.records import ROLLOUTS
from personaspace.store.rollouts import Rollout, Span, encode_rollouts
from tests.store.small_runs import commit_coordinates, commit_shards, create, planned, rollout

KINDS = {"default": "assistant", "poet": "dramatic", "hacker": "dramatic"}
PLAIN = "The tide comes in over the flats without a sound, and the herons step back from it one by one."
LOOP = "The door to " + "the door to " * 20
REFUSAL = "I'm sorry, but I can't help with that."
CONFESSION = "Well, as an AI language model, I see it so. " + PLAIN


def write(folder: LocalFolder, responses: Sequence[str], changes: Mapping[int, dict[str, Any]] | None = None) -> None:
    """A run of units of four rollouts: of `default`, `poet`, then `hacker`. ``changes``: row -> other fields."""
    layout = Layout(segments=(len(responses),), layers=5, hidden=3, unit_rows=4, layer_group=3)
    roles = [{"id": role, "kind": kind, "description": role, "prompts": ["A", "B"]} for role, kind in KINDS.items()]
    questions = [{"id": f"q{number}", "category": "any", "text": f"q{number}?"} for number in range(3)]
    with acquire(folder, timeout=60, say=print) as lease:
        create(lease.fence, layout, tables={"roles": roles, "questions": questions})
        for unit in range(layout.units):
            rows = layout.unit_row_range(unit)
            made = [
                said(replace(rollout(row), response=responses[row.row]), **(changes or {}).get(row.row, {}))
                for row in planned(layout)
                if row.row in rows
            ]
            data = {rollouts_key(unit): encode_rollouts(made)}
            commit(lease.fence, (ROLLOUTS, unit, 0), data, rows=rows, dropped={})
        commit_shards(lease.fence, layout, [(unit, group) for unit in range(layout.units) for group in (0, 1)])
        commit_coordinates(lease.fence, layout, range(layout.units))


def said(made: Rollout, **changes: Any) -> Rollout:
    """A rollout with other fields; ``question``: what the user asked."""
    asked = changes.pop("asked", None)
    messages = made.messages if asked is None else [{"role": "user", "content": asked}]
    return replace(made, messages=messages, **changes)


def part(name: str, turn: int = 0) -> Span:
    return Span(turn=turn, part=name, start=0, stop=1)
