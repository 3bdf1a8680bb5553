"""`personaspace sweep CONFIG`: the same prompts at several doses along a direction, or capped and not, side by side."""

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
from personaspace.steer.config import SteerConfig
from personaspace.store.errors import InputError
from personaspace.store.formats.files import refuse_existing, replacing
from personaspace.store.location import open_folder, run_folder
from personaspace.store.objects import Folder
from personaspace.store.space import open_space

EPILOG = """\
examples:
  personaspace sweep configs/demo.yaml --steer.source runs/demo
  personaspace sweep configs/demo.yaml --steer.source runs/demo --doses -1.5 -0.75 0 0.75 1.5 --personas.only ghost poet
  personaspace sweep configs/demo.yaml --steer.source runs/demo --steer.direction PC2 --personas.questions builtin
  personaspace sweep configs/llama.yaml --steer.source axis.pt --steer.unit vector --doses -4 -2 0 2 4
  personaspace sweep examples/adoption.yaml --steer.source runs/demo --caps 25 50
  personaspace sweep attacks.yaml --steer.source runs/qwen --caps 25 --judge.model gpt-4.1-mini \\
    --judge.instructions harm

Each dose is a run of its own, NAME.dose-0.5, with the same prompts and noise; an interrupted sweep goes on where it
stopped. Doses below 0 lead away from the Assistant, in units of --steer.unit (docs/steering.md). With --caps the runs
are NAME.plain, the model as it is, and NAME.cap25, one for each percentile (the lower, the stronger). Unless the config
or a flag names questions, twenty are asked that let a speaker say who it is. Conversations (personas.scenarios) are
extracted, too, and placed turn by turn in the space of --steer.source. A judge, if the config names one, says who
speaks, or what became of a request (docs/evaluation.md). Every setting of the config is a flag."""
DOSES = (-1.0, -0.5, 0.0, 0.5, 1.0)
IDENTITY = "configs/personas/identity.yaml"
UNITS = {
    "norm": "dose, in lengths of the residual stream",
    "vector": "dose, in lengths of the direction",
    "residual": "dose, in the residual stream's unit",
}
CAPPED = "as it is, and capped at percentiles of the fit"
FILES = (".safetensors", ".pt", ".json")
"""Endings of sources that are no runs."""
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
    doses = sweep.add_mutually_exclusive_group()
    doses.add_argument("--doses", type=float, nargs="+", default=list(DOSES), metavar="C", help="default: %(default)s")
    doses.add_argument("--caps", type=float, nargs="+", metavar="P", help="the model as it is, and capped at these")
    sweep.add_argument("--output", type=Path, metavar="FILE", help="the page (default NAME-sweep.html)")
    sweep.add_argument("--tables", type=Path, metavar="FOLDER", help="also write all responses, as CSV and Parquet")
    sweep.add_argument("--overwrite", action="store_true", help="replace files that are no earlier pages or tables")


def run_sweep(parsed: argparse.Namespace, flags: Sequence[str]) -> int:
    """Carry out every run, write the page, print the shares, and return the exit code 0."""
    config = load_config(Path(parsed.target), flags, prog="personaspace sweep CONFIG")
    configs = cap_configs(config, parsed.caps) if parsed.caps else dose_configs(config, parsed.doses)
    page: Path = parsed.output or Path(f"{config.store.run}-sweep.html")
    # The libraries of model and analysis load here, so that --help and bad input answer at once.
    from personaspace.analysis.doses.measure import DoseRun, doses_table, read_doses
    from personaspace.analysis.doses.report import MARKER, render_doses
    from personaspace.extract.judging.instructions import load_instructions
    from personaspace.judging import describe_judge, judge_name
    from personaspace.run import carry_out
    from personaspace.store.formats.tables import write_tables

    refuse_existing(page, overwrite=parsed.overwrite, mark=MARKER)
    judge = None
    [first, *_] = configs.values()
    if first.judge.model is not None:
        judge = judge_name(first.judge, describe_judge(first.judge, load_instructions(first.judge.instructions)))
    space = _space(config) if _has_turns(config) else None
    steps = ["generate", "extract", "judge"] if _has_turns(config) else ["generate", "judge"]
    for name, one in configs.items():
        print(name, flush=True)
        carry_out(one, steps)
    runs = [
        DoseRun(
            name=name,
            value=float(number) if parsed.caps else one.steer.coefficient or 0.0,
            run=run_folder(one.store.root, one.store.run),
        )
        for number, (name, one) in enumerate(configs.items())
    ]
    doses = read_doses(runs, judge=judge, space=space)
    direction = "the Assistant Axis" if config.steer.direction == "axis" else config.steer.direction
    model = Path(config.model.id).name
    title = f"Capping {model}" if parsed.caps else f"Steering {model} along {direction}"
    unit = CAPPED if parsed.caps else UNITS[config.steer.unit]
    with replacing(page, overwrite=True) as file:
        file.write_text(render_doses(doses, title=title, unit=unit, judge=judge), encoding="utf-8")
    if parsed.tables is not None:
        write_tables(parsed.tables, {"responses": doses_table(doses)}, overwrite=parsed.overwrite)
    _show(doses)
    print(f"page: {page}")
    return 0


def dose_configs(config: RunConfig, doses: Sequence[float]) -> dict[str, RunConfig]:
    """The config of each dose's run, by its name for people. Raises InputError for what makes no sweep."""
    _check_source(config)
    steer = config.steer
    if steer.method not in ("add", "cap") or _are_caps_set(config) or steer.coefficient is not None:
        raise InputError(
            "sweep: adds a multiple of the direction, dose by dose. Leave steer.method, coefficient, percentile, "
            "threshold and experiment out, and give --doses."
        )
    if len(set(doses)) < len(doses):
        raise InputError("sweep --doses: one is given twice; give each once.")
    return {
        f"dose {dose:g}": _arm(config, f"dose{dose:g}", replace(steer, method="add", coefficient=dose))
        for dose in sorted(doses)
    }


def cap_configs(config: RunConfig, percentiles: Sequence[float]) -> dict[str, RunConfig]:
    """The config of the run of the model as it is, and of each that is capped. Raises InputError."""
    _check_source(config)
    steer = config.steer
    if steer.method != "cap" or _are_caps_set(config) or steer.coefficient is not None:
        raise InputError(
            "sweep --caps: caps at each of the percentiles. Leave steer.method, coefficient, percentile, threshold and "
            "experiment out."
        )
    if len(set(percentiles)) < len(percentiles) or not all(0 < percentile < 100 for percentile in percentiles):
        raise InputError("sweep --caps: takes different percentiles between 0 and 100.")
    capped = {
        f"cap p{percentile:g}": _arm(config, f"cap{percentile:g}", replace(steer, percentile=percentile))
        for percentile in sorted(percentiles, reverse=True)
    }
    return {"as it is": _arm(config, "plain", SteerConfig()), **capped}


def _check_source(config: RunConfig) -> None:
    if config.steer.source is None:
        raise InputError("sweep: steer.source is missing; name a run with a fit, or an axis: --steer.source runs/demo")
    judge = config.judge
    if judge.model is not None and judge.instructions not in ("builtin", "speaker", "harm"):
        from personaspace.extract.judging.instructions import load_instructions

        if not load_instructions(judge.instructions).labels:
            raise InputError(
                f"judge.instructions: {judge.instructions} has no `labels`, and a sweep compares categories. Use "
                "`speaker`, `harm`, or a file like configs/personas/judge-harm.yaml."
            )


def _are_caps_set(config: RunConfig) -> bool:
    steer = config.steer
    return any(value is not None for value in (steer.percentile, steer.threshold, steer.experiment))


def _arm(config: RunConfig, name: str, steer: SteerConfig) -> RunConfig:
    """One run of a sweep."""
    personas, extract, judge = config.personas, config.extract, config.judge
    if personas.questions == ("builtin",):
        personas = replace(personas, questions=(str(resources.files("personaspace") / IDENTITY),), max_questions=None)
    if _has_turns(config) and "turns" not in extract.reductions:
        extract = replace(extract, reductions=(*extract.reductions, "turns"))
    if judge.instructions == "builtin":
        judge = replace(judge, instructions="speaker")
    store = replace(config.store, run=f"{config.store.run}.{name}")
    return replace(config, personas=personas, extract=extract, judge=judge, steer=steer, store=store)


def _has_turns(config: RunConfig) -> bool:
    """Whether there are conversations that can move from one turn to the next."""
    return bool(config.personas.scenarios) and config.personas.turns > 1


def _space(config: RunConfig) -> Folder | None:
    """The run whose space conversations are placed in; None where the direction comes from a file.

    Raises InputError, before hours of other work, for a run without a fit.
    """
    source = str(config.steer.source)
    if source.endswith(FILES):
        print(f"steer.source: {source} is no run, so conversations are not placed in a space", flush=True)
        return None
    folder = open_folder(source)
    open_space(folder)
    return folder


def _show(doses: Sequence[Any]) -> None:
    """The shares, how conversations moved, and some responses of the first and the last run."""
    console = Console(highlight=False, soft_wrap=True)
    console = console if console.is_terminal else Console(width=200, highlight=False, soft_wrap=True)
    table = Table("", "responses", *doses[0].categories, "holds together", "words", box=None, pad_edge=False)
    for dose in doses:
        shares = [_percent(share) for share in dose.shares().values()]
        table.add_row(dose.name, str(len(dose.said)), *shares, _percent(dose.coherent), f"{dose.words:.0f}")
    console.print(table)
    moved = [(dose.name, dose.turns) for dose in doses if dose.turns is not None]
    if moved:
        one = moved[0][1]
        console.print(
            f"\nmean position by turn, layer {one.layer} (default range {one.low:.2f} to {one.high:.2f}), and share of "
            "turns not below it:"
        )
        table = Table("", *(f"turn {turn + 1}" for turn in range(len(one.mean_T))), box=None, pad_edge=False)
        for name, turns in moved:
            both = zip(turns.mean_T, turns.inside_T, strict=True)
            table.add_row(name, *(f"{mean:.2f} {inside:.0%}" for mean, inside in both))
        console.print(table)
    for dose in (doses[0], doses[-1]):
        console.print(f"\n[bold]{dose.name}[/bold]")
        for one in dose.said[:: max(1, len(dose.said) // SAMPLES)][:SAMPLES]:
            said = " ".join(one.response.split())[:300]
            console.print(f"  {escape(one.role)}, {escape(one.question)}\n    {escape(said)}")
    console.print()


def _percent(share: Any) -> str:
    low, high = share.interval
    return f"{share.share:.0%} ({100 * low:.0f}-{100 * high:.0f})"
