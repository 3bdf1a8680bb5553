"""Looking through the rollouts of a run, a few units at a time, and what comes of it: shares, roles, masks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from personaspace.analysis.quality.detect import COLUMNS, QUARANTINED, detect, fingerprints, repeats
from personaspace.analysis.quality.flaws import MILD, NAMES
from personaspace.analysis.quality.shares import Share, stand_out, wilson
from personaspace.store.errors import InputError
from personaspace.store.formats.role_names import DEFAULT_ROLE
from personaspace.store.location import open_folder
from personaspace.store.manifest import Manifest, require_manifest
from personaspace.store.objects import Folder
from personaspace.store.records import ROLLOUTS, read_records
from personaspace.store.rollouts import read_rollouts

UNITS_AT_A_TIME = 16
"""Units in memory together: about 2,000 rollouts."""
MACHINE_KINDS = ("assistant", "artificial")
"""Kinds of roles that may say that they are an AI."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """The rollouts of one role, prompt or question."""

    role: str
    """Role id; empty for a question."""
    kind: str
    """Kind of the role, or category of the question."""
    prompt: int | None
    """Number of the role's prompt, where the group is one."""
    question: str
    """Question id; empty for a role or prompt."""
    text: str
    """The question itself; empty for a role or prompt."""
    shares: dict[str, Share]
    """Flaw -> share. `flawed`: any flaw but being cut off."""
    stands_out: tuple[str, ...]
    """Flaws that it has more often than the other groups, beyond chance."""

    @property
    def name(self) -> str:
        """What people call it."""
        return self.question or (self.role if self.prompt is None else f"{self.role} {self.prompt}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """What was found in the rollouts of a run. Arrays have one entry for each rollout that was looked at."""

    manifest: Manifest
    """Of the run."""
    row_N: NDArray[np.int64]
    """Place on the rollout axis, rising."""
    role_N: NDArray[np.int64]
    """Role id."""
    prompt_N: NDArray[np.int64]
    """Number of the role's prompt."""
    question_N: NDArray[np.int64]
    """Number of the question."""
    flawed_N: dict[str, NDArray[np.bool_]]
    """Flaw -> which rollouts have it."""
    unsampled: int
    """Rollouts that have no response since sampling it failed; they count for nothing here."""

    @property
    def bad_N(self) -> NDArray[np.bool_]:
        """Rollouts with any flaw but a mild one."""
        bad_N: NDArray[np.bool_] = np.any([self.flawed_N[name] for name in NAMES if name not in MILD], axis=0)
        return bad_N

    def overall(self) -> dict[str, Share]:
        """Flaw -> share of all rollouts, and `flawed`."""
        columns = self._columns()
        return {name: Share(count=int(x_N.sum()), total=len(x_N)) for name, x_N in columns.items()}

    def _columns(self) -> dict[str, NDArray[np.bool_]]:
        return {**self.flawed_N, "flawed": self.bad_N}

    def groups(self, by: str) -> list[Group]:
        """The groups by `role`, `prompt` (of a role) or `question`, worst first.

        Worst is the highest lower bound of the flawed share, so that few rollouts don't make a role the worst.
        """
        roles, questions = self.manifest.tables["roles"], self.manifest.tables["questions"]
        prompts = int(self.prompt_N.max(initial=0)) + 1
        key_N = {
            "role": self.role_N,
            "prompt": self.role_N * prompts + self.prompt_N,
            "question": self.question_N,
        }[by]
        keys, group_N = np.unique(key_N, return_inverse=True)
        total_G = np.bincount(group_N, minlength=len(keys))
        columns = self._columns()
        count_G = {name: np.bincount(group_N[x_N], minlength=len(keys)) for name, x_N in columns.items()}
        out_G = {name: stand_out(count_G[name], total_G) for name in NAMES}
        low_G, _ = wilson(count_G["flawed"], total_G)
        cut_G, _ = wilson(count_G["truncated"], total_G)
        found = []
        for place in np.lexsort((keys, -cut_G, -low_G)):
            key = int(keys[place])
            role = None if by == "question" else roles[key if by == "role" else key // prompts]
            asked = questions[key] if by == "question" else None
            found.append(
                Group(
                    role="" if role is None else str(role["id"]),
                    kind=str((role or {}).get("kind", "") if asked is None else asked.get("category", "")),
                    prompt=key % prompts if by == "prompt" else None,
                    question="" if asked is None else str(asked["id"]),
                    text="" if asked is None else str(asked["text"]),
                    shares={
                        name: Share(count=int(x_G[place]), total=int(total_G[place])) for name, x_G in count_G.items()
                    },
                    stands_out=tuple(name for name in NAMES if out_G[name][place]),
                )
            )
        return found


def assess(
    folder: Folder, *, at_most: int | None = None, progress: Callable[[int, int], None] | None = None
) -> Quality:
    """Look for every flaw in the committed rollouts of a run, or in ``at_most`` of them from evenly spread units.

    Holds the texts of a few units at a time. ``progress`` hears the units done and all units. Raises InputError for a
    run without rollouts.
    """
    manifest = require_manifest(folder)
    units = sorted(unit for _, unit, _ in read_records(folder, ROLLOUTS))
    if not units:
        raise InputError(f"{folder.url}: no rollouts yet; run `generate` first.")
    if at_most is not None:
        wanted = max(1, at_most // manifest.layout.unit_rows)
        units = [units[round(place)] for place in np.linspace(0, len(units) - 1, min(wanted, len(units)))]
    plays_R = np.array([_plays_role(role) for role in manifest.tables["roles"]], dtype=np.bool_)
    parts: dict[str, list[NDArray[Any]]] = {}
    unsampled = done = 0
    waiting = iter(units)
    while batch := list(islice(waiting, UNITS_AT_A_TIME)):
        table = read_rollouts(folder, batch, COLUMNS)
        sampled = table["finish_reason"].to_numpy() != QUARANTINED
        unsampled += int((~sampled).sum())
        table = table.filter(sampled)
        found: dict[str, NDArray[Any]] = {name: table[name].to_numpy() for name in COLUMNS[:4]}
        found["fingerprint"] = fingerprints(table["response"].to_pylist())
        for name, column in (*found.items(), *detect(table, plays_R).items()):
            parts.setdefault(name, []).append(column)
        done += len(batch)
        if progress is not None:
            progress(done, len(units))
    whole = {name: np.concatenate(columns) for name, columns in parts.items()}
    flawed_N: dict[str, NDArray[np.bool_]] = {
        name: repeats(whole["fingerprint"]) if name == "duplicate" else whole[name] for name in NAMES
    }
    return Quality(
        manifest=manifest,
        row_N=whole["row"].astype(np.int64),
        role_N=whole["role_id"].astype(np.int64),
        prompt_N=whole["prompt"].astype(np.int64),
        question_N=whole["question"].astype(np.int64),
        flawed_N=flawed_N,
        unsampled=unsampled,
    )


def with_flaws(run: xr.Dataset) -> xr.Dataset:
    """A run of ``open_run`` with a boolean coordinate for each flaw, so that ``select(..., without=...)`` can use it.

    >>> run = with_flaws(open_run("runs/demo"))                                    # doctest: +SKIP
    >>> select(run, role="ghost", without=["looping", "refused"])                  # doctest: +SKIP
    """
    quality = assess(open_folder(run.attrs["run"]))
    return run.assign_coords(
        {name: ("rollout", on_axis(quality, x_N, run.sizes["rollout"])) for name, x_N in quality.flawed_N.items()}
    )


def on_axis(quality: Quality, mask_N: NDArray[np.bool_], rows: int) -> NDArray[np.bool_]:
    """A mask over the rollouts that were looked at, as one over ``rows`` of the rollout axis; others are False."""
    mask = np.zeros(rows, dtype=bool)
    inside = quality.row_N < rows  # The run may have grown since it was opened.
    mask[quality.row_N[inside]] = mask_N[inside]
    return mask


def _plays_role(role: Mapping[str, Any]) -> bool:
    """Whether a role that says it is an AI has fallen out of its part. The poles of traits describe an assistant."""
    return role["id"] != DEFAULT_ROLE and role.get("kind") not in MACHINE_KINDS and not role.get("pole")
