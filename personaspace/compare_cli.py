"""`personaspace compare RUN RUN ...`: how alike the persona spaces of fitted runs are, as a table and as a page."""

import argparse
import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from personaspace.status_cli import run_of
from personaspace.store.errors import InputError
from personaspace.store.formats.files import refuse_existing, replacing

EPILOG = """\
examples:
  personaspace compare runs/base runs/instruct
  personaspace compare runs/demo runs/plain --layer 20 --output plain.html --overwrite
  personaspace compare runs/llama runs/qwen s3://bucket/runs/gemma --tables comparison --json comparison.json

Each RUN needs a fit (`personaspace fit RUN`). What the numbers mean: docs/compare.md."""


def add_compare(commands: Any) -> None:
    """Add `compare` to the command line's parser."""
    compare = commands.add_parser(
        "compare",
        help="how alike the persona spaces of two or more runs are, as a page",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    compare.add_argument("targets", nargs="+", metavar="RUN", help="folder or URL of a run with a fit, or its config")
    compare.add_argument("--layer", type=int, metavar="N", help="of the first run (default: its target layer)")
    compare.add_argument("--components", type=int, default=5, metavar="N", help="compared one by one (default 5)")
    compare.add_argument("--permutations", type=int, default=500, metavar="N", help="of the nulls (default 500)")
    compare.add_argument("--output", type=Path, default=Path("comparison.html"), metavar="FILE", help="the page")
    compare.add_argument("--tables", type=Path, metavar="FOLDER", help="write all numbers as CSV and Parquet")
    compare.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    compare.add_argument("--overwrite", action="store_true", help="replace whatever files have these names")


def run_compare(parsed: argparse.Namespace, flags: Sequence[str]) -> int:
    """Compare, print a short table, write the page, and return the exit code: 0, however unlike the runs are."""
    if flags:
        raise InputError(f"compare: unknown argument {flags[0]}. See `personaspace compare --help`.")
    for name, least in (("components", 1), ("permutations", 20)):
        if getattr(parsed, name) < least:
            raise InputError(f"compare --{name}: {getattr(parsed, name)}; give at least {least}.")
    if len(parsed.targets) < 2:
        raise InputError("compare: one run; give at least two, such as runs/base runs/instruct.")
    # The libraries of the analysis load here, so that --help and bad input answer at once.
    from personaspace.analysis.compare.comparison import compare
    from personaspace.analysis.compare.report import MARK, Beside, Source, render_comparison
    from personaspace.analysis.compare.runs import basis, differences, open_runs, provenance, samples
    from personaspace.analysis.compare.tables import document, write_tables

    refuse_existing(parsed.output, overwrite=parsed.overwrite, mark=MARK)
    if parsed.json is not None:
        refuse_existing(parsed.json, overwrite=parsed.overwrite)
    runs = open_runs([run_of(target) for target in parsed.targets])
    with Console(stderr=True, highlight=False).status("compare"):
        pairs = compare(
            [run.fitted for run in runs],
            layer=parsed.layer,
            components=parsed.components,
            permutations=parsed.permutations,
        )
    beside = [
        Beside(pair=pair, differences=differences(a, b), basis=basis(a, b))
        for pair, (a, b) in zip(pairs, combinations(runs, 2), strict=True)
    ]
    for item in beside:
        _print(item)
    if parsed.tables is not None:
        write_tables(pairs, parsed.tables, overwrite=parsed.overwrite)
        print(f"tables: {parsed.tables}")
    if parsed.json is not None:
        notes = [
            {"weights": item.basis, "differences": [list(change) for change in item.differences]} for item in beside
        ]
        with replacing(parsed.json, overwrite=True) as file:
            file.write_text(json.dumps(document(pairs, notes), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        print(f"figures: {parsed.json}")
    sources = [
        Source(run=run.fitted, samples=said, provenance=provenance(run))
        for run, said in zip(runs, samples(runs), strict=True)
    ]
    with replacing(parsed.output, overwrite=True) as file:
        file.write_text(render_comparison(sources, beside), encoding="utf-8")
    print(f"comparison: {parsed.output}")
    return 0


def _print(item: Any) -> None:
    """One pair: what is compared, and every measure with what chance gives."""
    from personaspace.analysis.compare.movers import movers
    from personaspace.analysis.compare.report import findings

    pair = item.pair
    moved = movers(pair)
    print(
        f"{pair.a.name}, layer {pair.layers[0]}, and {pair.b.name}, layer {pair.layers[1]}: "
        f"{len(moved)} roles in common, weights: {item.basis}"
    )
    print(
        "\n".join(f"  {setting}: {ours} -> {theirs}" for setting, ours, theirs in item.differences) or "  no difference"
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("measure", no_wrap=True)
    for heading in ("value", "chance", "kinds"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for finding in findings(pair):
        name = finding.measure.name
        bars = [f"{bar:.2f}" if bar == bar else "-" for bar in (pair.chance(name), pair.chance(name, "kind"))]
        table.add_row(escape(finding.measure.label), finding.value, *bars, escape(finding.verdict))
    console = Console()
    Console(width=None if console.is_terminal else 200).print(table)
    print("chance: 99% of relabelled roles stay below; kinds: the same among roles of one kind")
    print("farthest apart: " + ", ".join(f"{mover.role} {mover.difference:+.2f}" for mover in moved[:5]))
