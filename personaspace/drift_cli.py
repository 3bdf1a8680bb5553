"""`personaspace drift RUN`: conversations on the Assistant Axis, turn by turn, as a page and as tables."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.csv
import pyarrow.parquet
import xarray as xr
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from personaspace.analysis.drift import Movement, movements
from personaspace.analysis.drift_report import MARKER, choose, name_of, render_drift
from personaspace.analysis.drift_run import drift_of, read_talks
from personaspace.analysis.drift_tables import conversations_table, turns_table
from personaspace.store.errors import InputError
from personaspace.store.formats.files import refuse_existing, replacing, replacing_parts
from personaspace.store.manifest import require_manifest
from personaspace.watch_cli import run_of

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
TABLES = ("turns", "conversations")


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
    page = parsed.output or (None if parsed.json else PAGE)
    if page is not None:
        refuse_existing(page, overwrite=parsed.overwrite or _is_page(page))
    folder = run_of(parsed.target)
    fitted = None if parsed.space is None else run_of(parsed.space)
    drift = drift_of(folder, fitted, layer=parsed.layer)
    layer = int(drift.attrs["target_layer"])
    if parsed.json:
        print(json.dumps(_document(drift), indent=1, allow_nan=False))
    else:
        _print(drift, layer)
    if parsed.tables is not None:
        _write_tables(drift, parsed.tables, overwrite=parsed.overwrite)
        _say(parsed, f"tables: {parsed.tables}")
    if page is not None:
        shown = drift["conversation"].values[choose(drift)].tolist()
        talks = read_talks(folder, require_manifest(folder), shown)
        title = f"Persona drift of {drift.attrs['model']}"
        with replacing(page, overwrite=True) as temporary:
            temporary.write_text(render_drift(drift, talks, title=title), encoding="utf-8")
        _say(parsed, f"page: {page}")
    return 0


def _say(parsed: argparse.Namespace, text: str) -> None:
    if not parsed.json:
        print(text)


def _is_page(file: Path) -> bool:
    """Whether the file is a page of ours, which may be replaced."""
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        return MARKER.encode() in opened.read(4096)


def _print(drift: xr.Dataset, layer: int) -> None:
    held = f"{drift.sizes['conversation']:,} conversations, {int(drift['turns'].sum()):,} turns"
    print(f"{drift.attrs['run']}: {held}, in the space of {drift.attrs['space']}")
    for note in drift.attrs["notes"]:
        print(f"note: {note}")
    low, high = drift["default_position"].sel(layer=layer).values
    count = drift.attrs["default_count"]
    print(f"layer {layer}: default range {low:.2f} to {high:.2f} (5% to 95% of {count} default rollouts)")
    _print_table(
        ("", "conversations", "mean drift", "(95%)", "first turns below", "later turns below", "left the range"),
        [
            (
                one.name,
                f"{one.conversations:,}",
                f"{one.drift:+.2f}",
                "" if np.isnan(one.drift_interval[0]) else "{:+.2f} to {:+.2f}".format(*one.drift_interval),
                f"{one.first_below:.0%}",
                f"{one.later_below:.0%}",
                f"{one.left:,}",
            )
            for one in movements(drift, layer)
        ],
    )
    at = drift.sel(layer=layer)
    order = np.argsort(-np.abs(at["drift"].values), kind="stable")[:LARGEST]
    print("largest drift:")
    _print_table(
        ("conversation", "turns", "first", "last", "drift", "per turn", "(95%)", "below", "first below"),
        [_line(at, number) for number in order.tolist()],
    )


def _line(at: xr.Dataset, number: int) -> tuple[str, ...]:
    own = at.isel(conversation=number)
    position_T = own["position"].values[own["tokens"].values > 0]
    low, high = own["slope_interval"].values
    first_below = int(own["first_below"])
    return (
        name_of(at, number),
        str(int(own["turns"])),
        f"{position_T[0]:.2f}",
        f"{position_T[-1]:.2f}",
        f"{float(own['drift']):+.2f}",
        f"{float(own['slope']):+.3f}",
        "" if np.isnan(low) else f"{low:+.3f} to {high:+.3f}",
        str(int(own["below"])),
        "never" if first_below < 0 else f"turn {first_below + 1}",
    )


def _print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(box=None, pad_edge=False)
    for number, head in enumerate(heads):
        table.add_column(head, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, row))
    console = Console(highlight=False)
    Console(width=None if console.is_terminal else 200, highlight=False).print(table)


def _document(drift: xr.Dataset) -> dict[str, Any]:
    layers = [int(layer) for layer in drift["layer"].values]
    return {
        **{name: drift.attrs[name] for name in ("run", "space", "model", "array", "target_layer", "notes")},
        "default_rollouts": drift.attrs["default_count"],
        "quantiles": drift.attrs["quantiles"],
        "layers": [
            {
                "layer": layer,
                "default_range": _plain(drift["default_position"].sel(layer=layer).values),
                "groups": [_movement(one) for one in movements(drift, layer)],
            }
            for layer in layers
        ],
        "conversations": conversations_table(drift).to_pylist(),
        "turns": turns_table(drift).to_pylist(),
    }


def _movement(one: Movement) -> dict[str, Any]:
    named = {name: getattr(one, name) for name in Movement.__dataclass_fields__}
    return named | {"drift_interval": _plain(np.array(one.drift_interval))}


def _plain(values: Any) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]


def _write_tables(drift: xr.Dataset, folder: Path, *, overwrite: bool) -> None:
    files = [f"{name}.{ending}" for name in TABLES for ending in ("csv", "parquet")]
    with replacing_parts(folder, files, overwrite=overwrite or _only(folder, files)) as new:
        for name, table in zip(TABLES, (turns_table(drift), conversations_table(drift)), strict=True):
            pyarrow.csv.write_csv(table, new / f"{name}.csv")
            pyarrow.parquet.write_table(table, new / f"{name}.parquet")


def _only(folder: Path, files: Sequence[str]) -> bool:
    """Whether a folder holds nothing but earlier tables."""
    return folder.is_dir() and {entry.name for entry in folder.iterdir()} <= set(files)
