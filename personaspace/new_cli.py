"""`personaspace new MODEL`: a ready, commented config for a model that nobody has run yet."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from personaspace.plan_cli import add_machine_flags
from personaspace.store.errors import InputError


def add_new_command(commands: Any) -> None:
    """Add `new` and its flags to the command line."""
    new = commands.add_parser(
        "new",
        help="write a ready config for a model",
        description="Write a ready config for any Hugging Face id or checkpoint folder. Its sharding is planned for "
        "the machines of the flags, else for the Ray cluster (RAY_ADDRESS), else for this machine.",
        allow_abbrev=False,
    )
    new.add_argument("target", metavar="MODEL", help="Hugging Face id, or a checkpoint folder")
    new.add_argument("--output", type=Path, metavar="FILE", help="default: the model's name with .yaml, here")
    new.add_argument("--revision", help="branch, tag or commit of a Hugging Face id")
    new.add_argument("--trust-remote-code", action="store_true", help="run Python code that the checkpoint ships")
    add_machine_flags(new)


def run_new(parsed: argparse.Namespace, flags: Sequence[str]) -> None:
    """Write the config. Raises InputError for a file that exists, and for a model that can't be used."""
    if flags:
        raise InputError(f"new: unknown argument {flags[0]}.")
    file = parsed.output or Path(f"{run_name(parsed.target)}.yaml")
    if file.exists():
        raise InputError(f"--output: {file} exists, and nothing is overwritten. Give another file, or remove it.")
    if not file.absolute().parent.is_dir():
        raise InputError(f"--output: the folder {file.absolute().parent} does not exist; make it, or give another.")
    # Heavy libraries load here, so that --help and bad flags answer at once.
    from personaspace.drafting import draft_config

    text, warnings = draft_config(parsed, run_name(parsed.target), file)
    with file.open("x", encoding="utf-8") as opened:
        opened.write(text)
    print(f"new: {file}. Look at it, then: personaspace plan {file}; personaspace run {file}")
    for warning in warnings:
        print(f"warning: {warning}")


def run_name(model: str) -> str:
    """A name for runs of the model, such as `qwen3-8b`."""
    name = re.sub(r"[^a-z0-9._-]+", "-", Path(model).expanduser().name.lower()).strip("-.")
    return name or "model"
