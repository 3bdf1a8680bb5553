"""`personaspace quality RUN`: refusals, loops, empties and cut-off responses, by role, prompt or question."""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from personaspace.analysis.quality.flaws import NAMES
from personaspace.status_cli import run_of
from personaspace.store.errors import InputError

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
    from personaspace.analysis.quality.assess import assess
    from personaspace.analysis.quality.words import outstanding, summary
    from personaspace.quality_output import clipped, document, examples_of, print_groups

    if flags:
        raise InputError(f"quality: unknown argument {flags[0]}. See `personaspace quality --help`.")
    if parsed.examples < 0:
        raise InputError(f"quality --examples: {parsed.examples}; give a number of 0 or more.")
    folder = run_of(parsed.target)
    with Console(stderr=True, highlight=False).status("quality") as status:
        quality = assess(folder, progress=lambda done, units: status.update(f"quality: {done}/{units} units"))
    groups = quality.groups(parsed.by)
    examples = examples_of(folder, quality, parsed.examples, parsed.flaw)
    if parsed.json:
        print(json.dumps(document(folder, quality, groups, parsed.by, examples), indent=1))
        return 0
    print(f"{folder.url}: {len(quality.row_N):,} rollouts")
    if quality.unsampled:
        print(f"{quality.unsampled:,} more have no response, since sampling them failed; they are not counted.")
    print("\n".join(f"  {line}" for line in summary(quality)))
    print_groups(groups if parsed.all else groups[:SHOWN], parsed.by)
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
            print(f"- {where} ({entry['rollout_id']})\n    {clipped(entry['response'])}")
    return 0
