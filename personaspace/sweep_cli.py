"""`personaspace sweep CONFIG`: the same prompts at several doses along a direction, and what becomes of who speaks."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from personaspace.config import RunConfig, load_config
from personaspace.store.errors import InputError
from personaspace.store.formats.files import refuse_existing, replacing
from personaspace.store.location import run_folder

EPILOG = """\
examples:
  personaspace sweep configs/demo.yaml --steer.source runs/demo
  personaspace sweep configs/demo.yaml --steer.source runs/demo --doses -1.5 -0.75 0 0.75 1.5 --personas.only ghost poet
  personaspace sweep configs/demo.yaml --steer.source runs/demo --steer.direction PC2 --personas.questions builtin
  personaspace sweep configs/llama.yaml --steer.source axis.pt --steer.unit vector --doses -4 -2 0 2 4

Each dose is a run of its own, NAME.dose-0.5, with the same prompts and noise; an interrupted sweep goes on where it
stopped. Doses below 0 lead away from the Assistant, in units of --steer.unit (docs/steering.md). Unless the config or a
flag names questions, twenty are asked that let a speaker say who it is. Every setting of the config is a flag."""
DOSES = (-1.0, -0.5, 0.0, 0.5, 1.0)
IDENTITY = "configs/personas/identity.yaml"
UNITS = {
    "norm": "lengths of the residual stream",
    "vector": "lengths of the direction",
    "residual": "the residual stream's unit",
}
HEAD_BYTES = 4096
"""Of a page, within which it says what it is."""
SAMPLES = 3
"""Responses that are printed of each end."""


def add_sweep(commands: Any) -> None:
    """Add `sweep` to the command line's parser."""
    sweep = commands.add_parser(
        "sweep",
        help="steer the model by several doses, and see who it says it is",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    sweep.add_argument("target", metavar="CONFIG", help="YAML file")
    sweep.add_argument("--doses", type=float, nargs="+", default=list(DOSES), metavar="C", help="default: %(default)s")
    sweep.add_argument("--output", type=Path, metavar="FILE", help="the page (default NAME-sweep.html)")
    sweep.add_argument("--tables", type=Path, metavar="FOLDER", help="also write all responses, as CSV and Parquet")
    sweep.add_argument("--overwrite", action="store_true", help="replace files that are no earlier pages or tables")


def run_sweep(parsed: argparse.Namespace, flags: Sequence[str]) -> int:
    """Carry out every dose, write the page, print the shares, and return the exit code 0."""
    config = load_config(Path(parsed.target), flags, prog="personaspace sweep CONFIG")
    configs = dose_configs(config, parsed.doses)
    page: Path = parsed.output or Path(f"{config.store.run}-sweep.html")
    # The libraries of model and analysis load here, so that --help and bad input answer at once.
    from personaspace.analysis.doses.measure import doses_table, read_doses
    from personaspace.analysis.doses.report import MARKER, render_doses
    from personaspace.run import carry_out
    from personaspace.store.formats.tables import write_tables

    ours = page.is_file() and MARKER.encode() in page.read_bytes()[:HEAD_BYTES]
    refuse_existing(page, overwrite=parsed.overwrite or ours)
    for dose, one in configs.items():
        print(f"dose {dose:g}", flush=True)
        carry_out(one, ["generate"])
    doses = read_doses({dose: run_folder(one.store.root, one.store.run) for dose, one in configs.items()})
    direction = "the Assistant Axis" if config.steer.direction == "axis" else config.steer.direction
    title = f"Steering {Path(config.model.id).name} along {direction}"
    with replacing(page, overwrite=True) as file:
        file.write_text(render_doses(doses, title=title, unit=UNITS[config.steer.unit]), encoding="utf-8")
    if parsed.tables is not None:
        write_tables(parsed.tables, {"responses": doses_table(doses)}, overwrite=parsed.overwrite)
    _show(doses)
    print(f"page: {page}")
    return 0


def dose_configs(config: RunConfig, doses: Sequence[float]) -> dict[float, RunConfig]:
    """The config of each dose's run. Raises InputError for what makes no sweep."""
    steer = config.steer
    if steer.source is None:
        raise InputError("sweep: steer.source is missing; name a run with a fit, or an axis: --steer.source runs/demo")
    caps = (steer.percentile, steer.threshold, steer.experiment)
    if steer.method not in ("add", "cap") or any(value is not None for value in caps) or steer.coefficient is not None:
        raise InputError(
            "sweep: adds a multiple of the direction, dose by dose. Leave steer.method, coefficient, percentile, "
            "threshold and experiment out, and give --doses."
        )
    if len(set(doses)) < len(doses):
        raise InputError("sweep --doses: one is given twice; give each once.")
    personas = config.personas
    if personas.questions == ("builtin",):
        personas = replace(personas, questions=(str(resources.files("personaspace") / IDENTITY),), max_questions=None)
    return {
        dose: replace(
            config,
            personas=personas,
            steer=replace(steer, method="add", coefficient=dose),
            store=replace(config.store, run=f"{config.store.run}.dose{dose:g}"),
        )
        for dose in sorted(doses)
    }


def _show(doses: Sequence[Any]) -> None:
    """The shares, and some responses at both ends."""
    console = Console(highlight=False, soft_wrap=True)
    names = list(doses[0].speakers())
    table = Table("dose", "responses", *names, "holds together", "words", box=None, pad_edge=False)
    for dose in doses:
        shares = [f"{share.share:.0%}" for share in dose.speakers().values()]
        table.add_row(
            f"{dose.value:g}", str(len(dose.said)), *shares, f"{dose.coherent.share:.0%}", f"{dose.words:.0f}"
        )
    console.print(table)
    for dose in (doses[0], doses[-1]):
        console.print(f"\n[bold]dose {dose.value:g}[/bold]")
        for one in dose.said[:: max(1, len(dose.said) // SAMPLES)][:SAMPLES]:
            said = " ".join(one.response.split())[:300]
            console.print(f"  {escape(one.role)}, {escape(one.question)}\n    {escape(said)}")
    console.print()
