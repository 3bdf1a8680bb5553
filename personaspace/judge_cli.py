"""`personaspace judge`, `judge-agreement`, `judge-sheet`: score rollouts, and see how far scores can be trusted."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tyro

from personaspace.cluster.config import ClusterConfig
from personaspace.config import load_config, stored_config, with_judge_flags
from personaspace.extract.judging.config import JudgeConfig
from personaspace.status_cli import CONFIG_ENDINGS
from personaspace.store.config import StoreConfig
from personaspace.store.errors import InputError
from personaspace.store.interruption import orderly_end
from personaspace.store.location import open_folder, run_folder
from personaspace.store.manifest import require_manifest
from personaspace.store.objects import Folder

COMMANDS = ("judge", "judge-agreement", "judge-sheet")
EPILOG = """\
examples:
  personaspace judge runs/demo --model gpt-4.1-mini --dry-run --price-in 0.4 --price-out 1.6
  OPENAI_API_KEY=... personaspace judge runs/demo --model gpt-4.1-mini --budget 20 --price-in 0.4 --price-out 1.6
  personaspace judge runs/demo --model Qwen/Qwen3-8B --base-url http://localhost:8000/v1 --concurrency 64
  personaspace judge runs/demo --model Qwen/Qwen3-8B --engine local
  personaspace judge runs/demo --model gpt-4.1-mini --roles ghost poet --sample 200
  personaspace judge configs/demo.yaml                         with the section `judge:` of a config
  personaspace judge-sheet runs/demo sheet.html --judge gpt-4.1-mini-1a2b3c4d --count 60
  personaspace judge-sheet runs/demo filled.csv --read --judge human
  personaspace judge-agreement runs/demo gpt-4.1-mini-1a2b3c4d human

Interrupted, or killed: the same command goes on, and asks about no rollout that it has an answer for. The key is read
from the environment (--api-key-env names the variable) and stored nowhere. Exit codes as of `personaspace`; 6: the
endpoint can't be used, 8: the budget has ended."""


def add_judging(commands: Any) -> None:
    """Add the three commands to the command line's parser."""
    judge = commands.add_parser(
        "judge",
        help="score how far each response plays its role, by a model that reads them",
        add_help=False,
        allow_abbrev=False,
    )
    judge.add_argument("target", nargs="?", metavar="RUN", help="folder or URL of a run, or a config file")
    judge.add_argument("--dry-run", action="store_true", help="say what it would take and show one prompt; ask nothing")
    judge.add_argument("--again", action="store_true", help="ask again about rollouts that could not be scored")
    judge.add_argument("-h", "--help", action="store_true")
    agreement = commands.add_parser(
        "judge-agreement", help="how far two judges agree: Cohen's kappa, and where they differ", allow_abbrev=False
    )
    agreement.add_argument("run", metavar="RUN")
    agreement.add_argument("judges", nargs=2, metavar="JUDGE")
    agreement.add_argument("--json", action="store_true", help="all numbers as JSON")
    sheet = commands.add_parser(
        "judge-sheet", help="write scored rollouts for a human to check, or read a filled sheet", allow_abbrev=False
    )
    sheet.add_argument("run", metavar="RUN")
    sheet.add_argument("file", type=Path, metavar="FILE", help=".csv, or .html with a form that saves a .csv")
    sheet.add_argument("--judge", required=True, help="whose scores; with --read: the name that the human's scores get")
    sheet.add_argument("--count", type=int, default=60, help="rollouts, spread over roles and scores (default 60)")
    sheet.add_argument("--seed", type=int, default=0, help="of the choice (default 0)")
    sheet.add_argument("--blind", action="store_true", help="without the judge's score and reason")
    sheet.add_argument("--read", action="store_true", help="take the scores in FILE (.csv) as those of --judge")


def run_judging(parsed: argparse.Namespace, flags: Sequence[str]) -> int:
    """Carry out one of the commands and return the exit code."""
    if parsed.command == "judge":
        return _judge(parsed, flags)
    if flags:
        raise InputError(f"{parsed.command}: unknown argument {flags[0]}.")
    return _agreement(parsed) if parsed.command == "judge-agreement" else _sheet(parsed)


def _judge(parsed: argparse.Namespace, flags: Sequence[str]) -> int:
    prog = "personaspace judge RUN [--dry-run] [--again]"
    if parsed.help:
        print(f"{__doc__}\n\n{EPILOG}\n")
        tyro.cli(JudgeConfig, prog=prog, args=["--help"])
    if parsed.target is None:
        raise InputError("judge: give the folder of a run, such as runs/demo, or a config file.")
    folder, config, store, cluster = _target(parsed.target)
    config = with_judge_flags(config, flags, prog=prog)
    # Heavy libraries load here, so that --help and bad flags answer at once.
    from personaspace.judging import JudgeOptions, judge_run

    options = JudgeOptions(
        again=parsed.again, dry_run=parsed.dry_run, lease_timeout=store.lease_timeout, patience=store.patience
    )
    with orderly_end():
        judge_run(folder, config, options, cluster=cluster)
    return 0


def _target(target: str) -> tuple[Folder, JudgeConfig, StoreConfig, ClusterConfig]:
    """The run, and the settings of its config where it has one."""
    if target.endswith(CONFIG_ENDINGS):
        config = load_config(Path(target))
        return run_folder(config.store.root, config.store.run), config.judge, config.store, config.cluster
    folder = open_folder(target)
    execution = require_manifest(folder).execution
    if "config" not in execution:
        return folder, JudgeConfig(), StoreConfig(), ClusterConfig()
    config = stored_config(execution, folder.url, [], prog="personaspace judge RUN")
    return folder, config.judge, config.store, config.cluster


def _agreement(parsed: argparse.Namespace) -> int:
    from personaspace.analysis.agreement import agreement_of_run, describe_agreement

    found = agreement_of_run(open_folder(parsed.run), *parsed.judges)
    print(json.dumps(asdict(found), indent=1) if parsed.json else describe_agreement(found))
    return 0


def _sheet(parsed: argparse.Namespace) -> int:
    from personaspace.extract.judging.sheet import read_sheet, write_sheet

    folder = open_folder(parsed.run)
    if parsed.read:
        read_sheet(folder, parsed.file, judge=parsed.judge)
    else:
        write_sheet(
            folder, parsed.file, judge=parsed.judge, count=parsed.count, seed=parsed.seed, is_blind=parsed.blind
        )
    return 0
