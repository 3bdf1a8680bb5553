"""What `personaspace quality` prints: the table of groups, examples of flaws, and all of it as one document."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from personaspace.analysis.quality.assess import Group, Quality
from personaspace.analysis.quality.flaws import FLAWS, NAMES
from personaspace.analysis.quality.shares import Share
from personaspace.analysis.quality.words import interval, percent
from personaspace.store.objects import Folder
from personaspace.store.rollouts import read_rollouts

EXAMPLE_CHARACTERS = 300


def print_groups(groups: Sequence[Group], by: str) -> None:
    """A row for each group, with the share of its rollouts that has each flaw."""
    table = Table(box=None, pad_edge=False)
    table.add_column(by, no_wrap=True)
    table.add_column("kind" if by != "question" else "category", no_wrap=True)
    shown = [flaw for flaw in FLAWS if any(group.shares[flaw.name].count for group in groups)]
    for heading in ("rollouts", "flawed", "(95%)", *(flaw.heading for flaw in shown)):
        table.add_column(heading, justify="right", no_wrap=True)
    for group in groups:
        flawed = group.shares["flawed"]
        cells = [f"{flawed.total:,}", percent(flawed.share), interval(flawed)]
        for flaw in shown:
            share = group.shares[flaw.name]
            mark = "*" if flaw.name in group.stands_out else ""
            cells.append(f"{percent(share.share)}{mark}" if share.count else "-")
        table.add_row(escape(group.name), escape(group.kind), *cells)
    console = Console()
    Console(width=None if console.is_terminal else 200).print(table)
    print("flawed: any flaw but being cut off. *: stands out")


def examples_of(folder: Folder, quality: Quality, count: int, flaw: str | None) -> dict[str, list[dict[str, Any]]]:
    """Flaw -> some rollouts that have it, evenly spread over the run."""
    if not count:
        return {}
    chosen: dict[str, list[int]] = {}
    for name in NAMES if flaw is None else (flaw,):
        rows = quality.row_N[quality.flawed_N[name]]
        places = np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)
        chosen[name] = rows[places].tolist()
    wanted = {row for rows in chosen.values() for row in rows}
    columns = ["row", "rollout_id", "role", "prompt", "question", "finish_reason", "response"]
    questions = quality.manifest.tables["questions"]
    read = {}
    units = sorted({row // quality.manifest.layout.unit_rows for row in wanted})
    for entry in read_rollouts(folder, units, columns).to_pylist():
        if entry["row"] in wanted:
            read[entry["row"]] = entry | {"question": str(questions[entry["question"]]["id"])}
    return {name: [read[row] for row in rows] for name, rows in chosen.items() if rows}


def document(
    folder: Folder, quality: Quality, groups: Sequence[Group], by: str, examples: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    """Everything that was found, for JSON."""
    return {
        "run": folder.url,
        "identity_hash": quality.manifest.identity_hash,
        "rollouts": len(quality.row_N),
        "unsampled": quality.unsampled,
        "overall": {name: _numbers(share) for name, share in quality.overall().items()},
        "by": by,
        "groups": [
            {
                "name": group.name,
                "role": group.role or None,
                "prompt": group.prompt,
                "question": group.question or None,
                "kind": group.kind,
                "rollouts": group.shares["flawed"].total,
                "stands_out": list(group.stands_out),
                "flaws": {name: _numbers(share) for name, share in group.shares.items()},
            }
            for group in groups
        ],
        "examples": examples,
    }


def _numbers(share: Share) -> dict[str, float]:
    low, high = share.interval
    return {"count": share.count, "share": share.share, "low": low, "high": high}


def clipped(text: str) -> str:
    """A response on one line, cut off where it is long."""
    flat = " ".join(text.split())
    return flat if len(flat) <= EXAMPLE_CHARACTERS else f"{flat[:EXAMPLE_CHARACTERS]}..."
