"""`personaspace quality RUN`: refusals, loops, empties and cut-off responses, by role, prompt or question."""

import argparse
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from personaspace.analysis.quality.assess import Group, Quality, assess
from personaspace.analysis.quality.flaws import FLAWS, NAMES
from personaspace.analysis.quality.shares import Share
from personaspace.analysis.quality.words import interval, outstanding, percent, summary
from personaspace.store.errors import InputError
from personaspace.store.objects import Folder
from personaspace.store.rollouts import read_rollouts
from personaspace.watch_cli import run_of

EPILOG = """\
examples:
  personaspace quality runs/demo
  personaspace quality runs/demo --by question
  personaspace quality runs/demo --flaw refused --examples 5
  personaspace quality runs/demo --json > quality.json

Nothing is dropped: `analysis.leave_out: [refused, looping]` makes a fit leave them out. What each flaw means and how it
is detected: docs/quality.md."""
SHOWN = 25
"""Rows of the table, unless --all."""
EXAMPLE_CHARACTERS = 300


def add_quality(commands: Any) -> None:
    """Add `quality` to the command line's parser."""
    quality = commands.add_parser(
        "quality",
        help="refusals, loops, empties, truncation: by role, prompt or question, worst first",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    quality.add_argument("target", metavar="RUN", help="folder or URL of a run, such as runs/demo, or its config file")
    quality.add_argument(
        "--by", choices=("role", "prompt", "question"), default="role", help="what a row is (default role)"
    )
    quality.add_argument("--all", action="store_true", help=f"all rows, not only the worst {SHOWN}")
    quality.add_argument("--examples", type=int, default=0, metavar="N", help="print N examples of each flaw")
    quality.add_argument("--flaw", choices=NAMES, help="examples of this flaw only")
    quality.add_argument("--json", action="store_true", help="everything as one JSON object")


def run_quality(parsed: argparse.Namespace, flags: Sequence[str]) -> int:
    """Print what was found and return the exit code: 0, whatever it is."""
    if flags:
        raise InputError(f"quality: unknown argument {flags[0]}. See `personaspace quality --help`.")
    if parsed.examples < 0:
        raise InputError(f"quality --examples: {parsed.examples}; give a number of 0 or more.")
    folder = run_of(parsed.target)
    with Console(stderr=True, highlight=False).status("quality") as status:
        quality = assess(folder, progress=lambda done, units: status.update(f"quality: {done}/{units} units"))
    groups = quality.groups(parsed.by)
    examples = _examples(folder, quality, parsed.examples, parsed.flaw)
    if parsed.json:
        print(json.dumps(_document(folder, quality, groups, parsed.by, examples), indent=1))
        return 0
    print(f"{folder.url}: {len(quality.row_N):,} rollouts")
    if quality.unsampled:
        print(f"{quality.unsampled:,} more have no response, since sampling them failed; they are not counted.")
    print("\n".join(f"  {line}" for line in summary(quality)))
    _print_table(groups if parsed.all else groups[:SHOWN], parsed.by)
    if len(groups) > SHOWN and not parsed.all:
        print(f"... and {len(groups) - SHOWN} more {parsed.by}s: --all")
    found = outstanding(groups)
    if found:
        print(f"{parsed.by}s that stand out, beyond chance:")
        print("\n".join(f"  {line}" for line in found))
    for name, entries in examples.items():
        print(f"\n{name}:")
        for entry in entries:
            where = f"{entry['role']}, prompt {entry['prompt']}, {entry['question']}, row {entry['row']}"
            print(f"- {where} ({entry['rollout_id']})\n    {_clipped(entry['response'])}")
    return 0


def _print_table(groups: Sequence[Group], by: str) -> None:
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


def _examples(folder: Folder, quality: Quality, count: int, flaw: str | None) -> dict[str, list[dict[str, Any]]]:
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


def _document(
    folder: Folder, quality: Quality, groups: Sequence[Group], by: str, examples: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
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


def _clipped(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= EXAMPLE_CHARACTERS else f"{flat[:EXAMPLE_CHARACTERS]}..."
