"""`personaspace drift RUN`: conversations on the Assistant Axis, turn by turn, as a page and as tables."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from personaspace.status_cli import run_of
from personaspace.store.errors import InputError
from personaspace.store.formats.files import refuse_existing, replacing
from personaspace.store.manifest import require_manifest

EPILOG = """\
examples:
  personaspace drift runs/conversations --space runs/demo
  personaspace drift runs/conversations --space runs/demo --layer 20 --tables drift-tables
  personaspace drift s3://bucket/runs/talks --output talks.html
  personaspace drift runs/conversations --space runs/demo --json > drift.json

RUN holds conversations (personas.scenarios, or transcripts by generate.responses), extracted with the reduction
`turns`. The space is that of RUN itself, or of another run of the same model. What the numbers mean: docs/drift.md."""
PAGE = Path("drift.html")
LARGEST = 10
"""Conversations listed on the terminal."""


def add_drift(commands: Any) -> None:
    """Add `drift` to the command line's parser."""
    drift = commands.add_parser(
        "drift",
        help="how conversations move along the Assistant Axis, turn by turn",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    drift.add_argument("target", metavar="RUN", help="folder or URL of a run, such as runs/talks, or its config file")
    drift.add_argument("--space", metavar="RUN", help="fitted run of the same model (default: RUN itself)")
    drift.add_argument("--layer", type=int, metavar="L", help="this layer only (default: all, opening with the target)")
    drift.add_argument("--output", type=Path, metavar="FILE", help=f"the page (default {PAGE})")
    drift.add_argument("--overwrite", action="store_true", help="replace files that are no earlier pages or tables")
    drift.add_argument("--tables", type=Path, metavar="FOLDER", help="also write all numbers, as CSV and Parquet")
    drift.add_argument("--json", action="store_true", help="print all numbers as JSON; no page unless --output")


def run_drift(parsed: argparse.Namespace, flags: Sequence[str]) -> int:
    """Print what moved, write what was asked for, and return the exit code 0."""
    if flags:
        raise InputError(f"drift: unknown argument {flags[0]}. See `personaspace drift --help`.")
    # The libraries of the analysis load here, so that --help and bad input answer at once.
    from personaspace.analysis.drift.report import MARKER, choose, render_drift
    from personaspace.analysis.drift.run import drift_of, read_talks
    from personaspace.analysis.drift.tables import document, write_tables

    page = parsed.output or (None if parsed.json else PAGE)
    if page is not None:
        refuse_existing(page, overwrite=parsed.overwrite, mark=MARKER)
    folder = run_of(parsed.target)
    fitted = None if parsed.space is None else run_of(parsed.space)
    with Console(stderr=True, highlight=False).status("drift"):
        drift = drift_of(folder, fitted, layer=parsed.layer)
    written = []
    if parsed.tables is not None:
        write_tables(drift, parsed.tables, overwrite=parsed.overwrite)
        written.append(f"tables: {parsed.tables}")
    if page is not None:
        shown = drift["conversation"].values[choose(drift)].tolist()
        talks = read_talks(folder, require_manifest(folder), shown)
        title = f"Persona drift of {drift.attrs['model']}"
        with replacing(page, overwrite=True) as file:
            file.write_text(render_drift(drift, talks, title=title), encoding="utf-8")
        written.append(f"page: {page}")
    if parsed.json:
        print(json.dumps(document(drift), indent=1, allow_nan=False))
    else:
        _print(drift)
        print("\n".join(written))
    return 0


def _print(drift: Any) -> None:
    """What moved at the target layer: means, and the conversations with the largest drift."""
    from personaspace.analysis.drift.tables import largest
    from personaspace.analysis.drift.trajectories import movements

    layer, count = drift.attrs["target_layer"], drift.attrs["default_count"]
    held = f"{drift.sizes['conversation']:,} conversations, {int(drift['turns'].sum()):,} turns"
    print(f"{drift.attrs['run']}: {held}, in the space of {drift.attrs['space']}")
    for note in drift.attrs["notes"]:
        print(f"note: {note}")
    low, high = drift["default_position"].sel(layer=layer).values
    print(f"layer {layer}: default range {low:.2f} to {high:.2f} (5% to 95% of {count} default rollouts)")
    _print_table(
        ("", "conversations", "mean drift", "(95%)", "first turns below", "later turns below", "left the range"),
        [
            (
                one.name,
                f"{one.conversations:,}",
                f"{one.drift:+.2f}",
                _interval(*one.drift_interval),
                f"{one.first_below:.0%}",
                f"{one.later_below:.0%}",
                f"{one.left:,}",
            )
            for one in movements(drift, layer)
        ],
    )
    print("largest drift:")
    _print_table(
        ("conversation", "turns", "first", "last", "drift", "per turn", "(95%)", "below", "first below"),
        [
            (
                one.name,
                str(one.turns),
                f"{one.first:.2f}",
                f"{one.last:.2f}",
                f"{one.last - one.first:+.2f}",
                f"{one.slope:+.3f}",
                _interval(*one.slope_interval, digits=3),
                str(one.below),
                "never" if one.first_below < 0 else f"turn {one.first_below + 1}",
            )
            for one in largest(drift, LARGEST)
        ],
    )


def _interval(low: float, high: float, digits: int = 2) -> str:
    return "" if low != low else f"{low:+.{digits}f} to {high:+.{digits}f}"


def _print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(box=None, pad_edge=False)
    for number, head in enumerate(heads):
        table.add_column(head, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, row))
    console = Console(highlight=False)
    Console(width=None if console.is_terminal else 200, highlight=False).print(table)
