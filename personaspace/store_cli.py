"""`personaspace store ...`: look at the runs of a store, check and repair them, copy and remove them."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from personaspace.exchange_cli import add_exchange
from personaspace.findings import describe_findings
from personaspace.store.catalog import (
    DamagedRun,
    RunSummary,
    as_row,
    describe,
    human_bytes,
    is_run,
    run_folders,
    runs,
    summarize,
)
from personaspace.store.copying import copy_run, refuse_foreign_copy
from personaspace.store.errors import InputError, IntegrityError, PersonaspaceError
from personaspace.store.freeze import freeze_run
from personaspace.store.index import write_index
from personaspace.store.lease import Fence, acquire
from personaspace.store.location import open_folder
from personaspace.store.manifest import MANIFEST, read_manifest, refuse_frozen, require_manifest
from personaspace.store.mend import drop_replaced_records, mend
from personaspace.store.objects import Folder
from personaspace.store.removal import check_removable, collect_garbage, garbage, remove_lease, remove_run
from personaspace.store.scores import is_scores
from personaspace.store.space import SPACE
from personaspace.store.verify import verify

EPILOG = """\
examples:
  personaspace store ls runs --model SmolLM2 --state complete
  personaspace store verify s3://bucket/runs/demo
  personaspace store cp runs/demo s3://bucket/runs/demo
  personaspace store gc runs
  personaspace store export runs/demo axis.gguf --format gguf
  personaspace store import outputs runs/paper --model Qwen/Qwen3-32B

RUN is the folder or URL of a run, ROOT of a store that holds runs. Credentials come from the environment
(AWS_ACCESS_KEY_ID, ...) or the cloud SDK's own files."""
LEASE_TIMEOUT = 60.0
REPAIR_ROUNDS = 3
"""Rollouts that come out differently make their activations stale, which the next round makes again."""


def add_commands(commands: Any) -> None:
    """Add `store` and what it can do to the command line's parser."""
    store = commands.add_parser(
        "store",
        help="ls, show, verify, repair, freeze, cp, rm, gc, export, import, convert",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = store.add_subparsers(dest="action", required=True, metavar="ACTION")

    def add(name: str, help_text: str, handler: Callable[[argparse.Namespace, Sequence[str]], int]) -> Any:
        action = actions.add_parser(name, help=help_text, description=help_text, allow_abbrev=False)
        action.set_defaults(handler=handler)
        return action

    ls = add("ls", "List the runs of a store.", _ls)
    ls.add_argument("root", nargs="?", default="runs", metavar="ROOT", help="default: runs")
    ls.add_argument("--model", help="only models whose name contains this")
    ls.add_argument("--layer", type=int, help="only runs in which this layer is complete")
    ls.add_argument("--state", help="planned, partial, writing, complete, frozen or damaged")
    ls.add_argument("--json", action="store_true", help="one JSON object a line")
    add("show", "What a run holds, where it comes from, who writes it.", _show).add_argument("run", metavar="RUN")
    check = add("verify", "Check every byte of a run against its checksums. Exit code 4 if data is damaged.", _verify)
    check.add_argument("run", metavar="RUN")
    check.add_argument("--json", action="store_true", help="the findings as JSON")
    mender = add("repair", "Restore what can be restored, compute the rest again (flags as of `run`).", _repair)
    mender.add_argument("run", metavar="RUN")
    add("freeze", "Verify a run, make it immutable, print the content hash to cite.", _freeze).add_argument(
        "run", metavar="RUN"
    )
    copy = add("cp", "Copy what a run has committed; repeat the command to go on after an interruption.", _cp)
    copy.add_argument("source", metavar="RUN")
    copy.add_argument("target", metavar="NEW_RUN")
    remove = add("rm", "Delete a run.", _rm)
    remove.add_argument("run", metavar="RUN")
    remove.add_argument("--frozen", action="store_true", help="also if it is frozen")
    collect = add("gc", "Delete what crashes and repeated fits left behind in a run, or in all runs of a store.", _gc)
    collect.add_argument("where", metavar="RUN_OR_ROOT")
    collect.add_argument("--foreign", action="store_true", help="also what is not part of a run at all")
    add_exchange(add)
    for asking in (remove, collect):
        asking.add_argument("--yes", action="store_true", help="don't ask")


def run_store(parsed: argparse.Namespace, flags: Sequence[str]) -> int:
    """Carry out one action and return the exit code. Errors for the user pass through."""
    if flags and parsed.action != "repair":
        raise InputError(f"store {parsed.action}: unknown argument {flags[0]}. See `personaspace store --help`.")
    code: int = parsed.handler(parsed, flags)
    return code


def _ls(parsed: argparse.Namespace, _: Sequence[str]) -> int:
    root = open_folder(parsed.root)
    if root.exists(MANIFEST):
        raise InputError(f"{root.url}: is a run, not a store of runs; `personaspace store show` shows it.")
    chosen = [run for run in runs(root) if _matches(run, parsed)]
    if parsed.json:
        for run in chosen:
            print(json.dumps(as_row(run)))
        return 0
    table = Table(box=None, pad_edge=False)
    for heading in ("run", "model", "shape", "rollouts", "layers", "state", "size", "last session"):
        table.add_column(heading, no_wrap=True)
    for run in chosen:
        row = as_row(run)
        table.add_row(*(str(row.get(name, "")) for name in row))
    if not chosen:
        print(f"{root.url}: no runs, or none that match.")
    else:
        console = Console()
        Console(width=None if console.is_terminal else 200).print(table)
    return 0


def _matches(run: RunSummary | DamagedRun, parsed: argparse.Namespace) -> bool:
    if isinstance(run, DamagedRun):
        return parsed.state in (None, "damaged") and parsed.model is None and parsed.layer is None
    return (
        (parsed.model is None or parsed.model.lower() in run.model.lower())
        and (parsed.layer is None or parsed.layer in run.layers)
        and (parsed.state is None or parsed.state == run.state)
    )


def _show(parsed: argparse.Namespace, _: Sequence[str]) -> int:
    print(describe(summarize(open_folder(parsed.run))))
    return 0


def _verify(parsed: argparse.Namespace, _: Sequence[str]) -> int:
    folder = open_folder(parsed.run)
    with _progress("verify") as progress:
        found = verify(folder, lambda objects, size: progress(f"{objects} objects, {human_bytes(size)}"))
    if parsed.json:
        print(json.dumps({**asdict(replace(found, manifest=None)), "rows": found.rows()}, indent=1))  # type: ignore[arg-type]
    else:
        print(describe_findings(folder, found))
    return IntegrityError.exit_code if found.harmful else 0


def _repair(parsed: argparse.Namespace, flags: Sequence[str]) -> int:
    from personaspace.run import analyse, compute_again

    folder = open_folder(parsed.run)
    lost: list[str] = []
    found = verify(folder)
    if found.harmful:
        print(describe_findings(folder, found), flush=True)
    for _ in range(REPAIR_ROUNDS):
        if not found.harmful:
            break
        with _lease(folder, found.manifest.last_epoch, mending=True) as fence:
            lost = mend(fence, found, print)
        if any(problem.slot is not None and not is_scores(problem.slot) for problem in found.harmful):
            refuse_frozen(folder, read_manifest(folder))
            compute_again(folder, found, flags)
        with _lease(folder, found.manifest.last_epoch) as fence:
            drop_replaced_records(fence, print)
            write_index(fence, require_manifest(folder))
        if any(problem.key.startswith(f"{SPACE}/") for problem in found.harmful):
            analyse(folder, ["fit", "report"], flags)
        found = verify(folder)
    print("\n".join([*lost, describe_findings(folder, found)]))
    return IntegrityError.exit_code if found.harmful else 0


def _freeze(parsed: argparse.Namespace, _: Sequence[str]) -> int:
    folder = open_folder(parsed.run)
    manifest = require_manifest(folder)
    refuse_frozen(folder, manifest)
    summary = summarize(folder)
    if summary.state != "complete":
        raise InputError(
            f"{folder.url}: is {summary.state}, {summary.extracted} of {manifest.layout.rows} rollouts are extracted; "
            "only a complete run can be frozen. Resume it first."
        )
    with _lease(folder, manifest.last_epoch) as fence:
        found = verify(folder)
        if found.harmful:
            raise IntegrityError(f"{folder.url}: {len(found.harmful)} damaged object(s); repair the run first.")
        frozen = freeze_run(fence, manifest)
    print(f"{folder.url}: frozen. Content hash to cite:\n{frozen.frozen['content_hash'] if frozen.frozen else ''}")
    return 0


def _cp(parsed: argparse.Namespace, _: Sequence[str]) -> int:
    source, target = open_folder(parsed.source), open_folder(parsed.target)
    manifest = require_manifest(source)
    if source.url == target.url:
        raise InputError(f"{source.url}: source and target are the same.")
    existing = read_manifest(target)
    refuse_frozen(target, existing)
    refuse_foreign_copy(target)
    with _lease(target, max(manifest.last_epoch, 0 if existing is None else existing.last_epoch)) as fence:
        with _progress("cp") as progress:
            size = copy_run(source, fence, lambda done, total, size: progress(f"{done}/{total}, {human_bytes(size)}"))
        write_index(fence, require_manifest(target))
        target.clear_scratch()
    print(f"{target.url}: {human_bytes(size)} copied and checked")
    return 0


def _rm(parsed: argparse.Namespace, _: Sequence[str]) -> int:
    folder = open_folder(parsed.run)
    manifest = require_manifest(folder)
    check_removable(folder, manifest, frozen=parsed.frozen)
    summary = summarize(folder)
    print(f"{folder.url}: {summary.model}, {summary.extracted} rollouts, {human_bytes(summary.bytes)}")
    if not _confirmed(parsed, "Delete this run for good?"):
        return 1
    with _lease(folder, manifest.last_epoch) as fence:
        count = remove_run(fence)
    remove_lease(folder)
    print(f"{count} objects deleted")
    return 0


def _gc(parsed: argparse.Namespace, _: Sequence[str]) -> int:
    where = open_folder(parsed.where)
    folders = [where] if is_run(where) else list(run_folders(where))
    if not folders:
        raise InputError(f"{where.url}: neither a run nor a store of runs.")
    code = 0
    for folder in folders:
        try:
            _gc_run(parsed, folder)
        except PersonaspaceError as error:  # One run that is being written must not keep the others dirty.
            print(f"{folder.url}: left alone: {error}", file=sys.stderr)
            code = error.exit_code
    return code


def _gc_run(parsed: argparse.Namespace, folder: Folder) -> None:
    manifest = require_manifest(folder)
    with _lease(folder, manifest.last_epoch) as fence:
        objects = garbage(folder, verify(folder, own_epoch=fence.epoch), foreign=parsed.foreign)
        for entry in objects:
            print(f"{human_bytes(entry.bytes):>10s}  {entry.key}")
        size = human_bytes(sum(entry.bytes for entry in objects))
        print(f"{folder.url}: {len(objects)} object(s) to delete, {size}")
        if objects and _confirmed(parsed, "Delete them? (A resumed run would use its orphans.)"):
            collect_garbage(fence, objects)
            print(f"{folder.url}: {len(objects)} object(s) deleted")


def _confirmed(parsed: argparse.Namespace, question: str) -> bool:
    if parsed.yes:
        return True
    if not sys.stdin.isatty():
        raise InputError(f"store {parsed.action}: nobody is there to be asked; add --yes. Nothing was deleted.")
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")


@contextmanager
def _lease(folder: Folder, after_epoch: int, *, mending: bool = False) -> Iterator[Fence]:
    """Hold the run's lease, so that no driver writes meanwhile."""
    with acquire(folder, timeout=LEASE_TIMEOUT, say=print, after_epoch=after_epoch, mend=mending) as lease:
        yield lease.fence


@contextmanager
def _progress(what: str) -> Iterator[Callable[[str], None]]:
    """One line that changes, on a terminal; silence elsewhere."""
    console = Console(stderr=True, highlight=False)
    with console.status(what) as status:
        yield lambda text: status.update(f"{what}: {text}")
