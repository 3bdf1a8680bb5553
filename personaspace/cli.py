"""The command line: `personaspace run CONFIG`, each step alone, `preview`, `status`, `quality`, `store`, ..."""

import argparse
import os
import select
import sys
from collections.abc import Sequence
from pathlib import Path

from personaspace.caps_cli import add_caps, run_caps
from personaspace.compare_cli import add_compare, run_compare
from personaspace.config import load_config, print_flags
from personaspace.drift_cli import add_drift, run_drift
from personaspace.harness_cli import add_harness, run_harness
from personaspace.judge_cli import COMMANDS as JUDGING
from personaspace.judge_cli import add_judging, run_judging
from personaspace.live_cli import add_live, run_live
from personaspace.new_cli import add_new_command, run_new
from personaspace.personas_cli import add_personas, run_personas
from personaspace.plan_cli import add_plan_command, run_plan
from personaspace.quality_cli import add_quality, run_quality
from personaspace.status_cli import CONFIG_ENDINGS, add_watching, status, timeline
from personaspace.store.errors import InputError, PersonaspaceError
from personaspace.store_cli import add_commands, run_store
from personaspace.sweep_cli import add_sweep, run_sweep
from personaspace.watch_cli import add_watch, run_watch

STEPS = {
    "run": "all steps: generate, extract, judge (if the config names one), fit, report",
    "generate": "sample (or import) the rollouts",
    "extract": "pool every layer's activations into the store",
    "fit": "compute persona space, Assistant Axis and evidence",
    "report": "write report.html",
}
EPILOG = """\
examples:
  personaspace run configs/demo.yaml
  personaspace run configs/demo.yaml --store.run second --generate.seed 1
  personaspace run configs/llama.yaml configs/qwen.yaml      one after the other; --jobs 2 for both at once
  personaspace extract configs/demo.yaml --cluster.stages 3
  personaspace fit runs/demo --analysis.components 16
  personaspace preview configs/demo.yaml --role ghost --html preview.html
  personaspace plan configs/demo.yaml --nodes 2 --gpus-per-node 8 --gpu H100 --price 2.5
  personaspace new Qwen/Qwen3-8B --output qwen3-8b.yaml
  personaspace status s3://bucket/runs/demo --watch
  personaspace timeline runs/demo --html timeline.html
  personaspace quality runs/demo --examples 2
  personaspace caps runs/demo --output capping.pt
  personaspace compare runs/base runs/instruct
  personaspace drift runs/conversations --space runs/demo
  personaspace watch transcript.json --space runs/demo
  personaspace sweep configs/demo.yaml --steer.source runs/demo
  personaspace chat runs/demo
  personaspace serve runs/demo --percentile 25
  personaspace harness runs/demo --tasks gsm8k --limit 200
  personaspace personas show ghost
  personaspace judge runs/demo --model gpt-4.1-mini --dry-run
  personaspace store ls runs
  ray job submit --address http://HEAD:8265 --working-dir . -- python -m personaspace run configs/demo.yaml

Every setting is a flag: `personaspace run --help` lists them. Flags beat the file, the file beats the defaults.
A command that was interrupted is repeated to resume. Exit codes: 0 done, 1 failed, 2 bad input, 3 run in use,
4 damaged data, 5 a worker failed, 6 storage or a model's endpoint failed, 7 too many rollouts dropped, 8 the judge's
budget has ended, 9 a watched transcript left the range, 130 interrupted."""


READER_LEFT = 128 + 13  # what a shell reports for SIGPIPE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Errors for the user are one message, without a traceback."""
    parsed, flags = _parser().parse_known_args(arguments)
    try:
        exit_code = _dispatch(parsed, flags)
        sys.stdout.flush()
        return exit_code
    except PersonaspaceError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        if not _reader_left():
            raise
        # What is still buffered goes nowhere, or Python complains about it as it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_LEFT


def _dispatch(parsed: argparse.Namespace, flags: Sequence[str]) -> int:
    if parsed.command == "store":
        return run_store(parsed, flags)
    if parsed.command == "personas":
        return run_personas(parsed, flags)
    if parsed.command in JUDGING:
        return run_judging(parsed, flags)
    if parsed.command == "quality":
        return run_quality(parsed, flags)
    if parsed.command == "caps":
        return run_caps(parsed, flags)
    if parsed.command == "compare":
        return run_compare(parsed, flags)
    if parsed.command == "drift":
        return run_drift(parsed, flags)
    if parsed.command == "sweep":
        return run_sweep(parsed, flags)
    if parsed.command in ("chat", "serve"):
        return run_live(parsed, flags)
    if parsed.command == "harness":
        return run_harness(parsed, flags)
    if parsed.command == "watch":
        return run_watch(parsed, flags)
    if parsed.command == "plan":
        run_plan(parsed, flags)
        return 0
    if parsed.command == "new":
        run_new(parsed, flags)
        return 0
    if parsed.command == "preview":
        return _preview(parsed, flags)
    if parsed.command in ("status", "timeline"):
        if flags:
            raise InputError(f"{parsed.command}: unknown argument {flags[0]}.")
        if parsed.command == "status":
            return status(parsed.target, watch=parsed.watch)
        return timeline(parsed.target, session=parsed.session, save=parsed.save, page=parsed.html)
    if parsed.help:
        print_flags(f"personaspace {parsed.command} CONFIG")
    return _carry_out(parsed, flags)


def _reader_left() -> bool:
    """Whether the program that stdout is piped into has ended, as ``| head`` does when it has seen enough."""
    stdout = select.poll()
    stdout.register(sys.stdout, 0)
    return any(event & select.POLLERR for _, event in stdout.poll(0))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="personaspace",
        description="Persona rollouts, pooled activations of every layer, and the Assistant Axis of a chat model.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, description in STEPS.items():
        # The flags' help comes from the config itself, so argparse must not answer --help here.
        command = commands.add_parser(name, help=description, add_help=False, allow_abbrev=False)
        command.add_argument(
            "targets",
            nargs="*",
            metavar="CONFIG",
            help="YAML file; every setting in it is also a flag. Several make a batch. fit and report also take a run",
        )
        command.add_argument("--jobs", type=_positive, default=1, help="runs of a batch at a time (default 1)")
        command.add_argument("-h", "--help", action="store_true")
    preview = commands.add_parser(
        "preview",
        help="show some rollouts, with the tokens marked that are averaged",
        epilog="All settings of the config are flags here, too: --extract.reductions mean parts",
        allow_abbrev=False,
    )
    preview.add_argument("target", metavar="CONFIG", help="YAML file")
    preview.add_argument(
        "--count", type=_positive, default=4, help="rollouts to show, spread over the plan (default 4)"
    )
    preview.add_argument("--role", help="of this role only")
    preview.add_argument("--html", type=Path, metavar="FILE", help="write the same as a page for the browser")
    add_plan_command(commands)
    add_new_command(commands)
    add_personas(commands)
    add_watching(commands)
    add_judging(commands)
    add_quality(commands)
    add_caps(commands)
    add_compare(commands)
    add_drift(commands)
    add_sweep(commands)
    add_watch(commands)
    add_live(commands)
    add_harness(commands)
    add_commands(commands)
    return parser


def _carry_out(parsed: argparse.Namespace, flags: Sequence[str]) -> int:
    """One step, or all of them, of one config, or of a batch."""
    targets: list[str] = parsed.targets
    if not targets:
        raise InputError(f"{parsed.command}: give a config file, such as configs/demo.yaml.")
    if len(targets) > 1:
        for target in targets:
            if not target.endswith(CONFIG_ENDINGS):
                raise InputError(f"{parsed.command}: {target} is no YAML file; a batch is made of configs.")
        from personaspace.batch import Batch

        return Batch(parsed.command, [Path(target) for target in targets], flags, jobs=parsed.jobs).run()
    [target] = targets
    if parsed.command in ("fit", "report") and not target.endswith(CONFIG_ENDINGS):
        return _analyse(target, parsed.command, flags)
    config = load_config(Path(target), flags, prog=f"personaspace {parsed.command} CONFIG")
    # Heavy libraries load here, so that --help and bad config files answer at once.
    from personaspace.run import carry_out

    carry_out(
        config, ["generate", "extract", "judge", "fit", "report"] if parsed.command == "run" else [parsed.command]
    )
    return 0


def _analyse(target: str, step: str, flags: Sequence[str]) -> int:
    """Fit or report a stored run, which needs no model and no config."""
    from personaspace.run import analyse
    from personaspace.store.location import open_folder

    analyse(open_folder(target), [step], flags)
    return 0


def _preview(parsed: argparse.Namespace, flags: Sequence[str]) -> int:
    config = load_config(Path(parsed.target), flags, prog="personaspace preview CONFIG")
    from personaspace.preview import preview

    preview(config, count=parsed.count, role=parsed.role, html=parsed.html)
    return 0


def _positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)
