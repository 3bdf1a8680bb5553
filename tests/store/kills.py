"""Kills the driver and all writers of small runs with SIGKILL and checks what is left, and what a resume makes of it.

    python -m tests.store.kills --local 200 --s3 50 --aimed 40 [--seed 0] [--json FILE]

Uniform trials kill at a uniformly random moment of the whole write path, from taking the lease to its release;
aimed ones between the publish of an object and its record. Every fourth trial is killed again while it resumes; in
every fifth, gc deletes what the kills left before the run is finished. A reader looks at the run all the while.

What each column counts is said in ``Trial``.
"""

import argparse
import json
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from tests.store.kill_laboratory import Laboratory, Trial
from tests.store.storages import S3Server, s3_environment

COLUMNS = (
    "records", "orphans", "leftovers", "half_written", "collected", "adopted",
    "torn", "unreported", "changed", "different", "problems",
    "looks", "partial",
)  # fmt: skip
FELL = ("creating", "rollouts", "shards", "ended")


@contextmanager
def laboratory(storage: str, chance: random.Random, calibrations: int = 3) -> Iterator[Laboratory]:
    """Everything that trials on one kind of storage need."""
    with tempfile.TemporaryDirectory() as scratch:
        if storage == "local":
            yield Laboratory(storage, Path(scratch), chance, calibrations)
            return
        with S3Server() as server:
            os.environ.update(s3_environment(server.port))
            yield Laboratory(storage, Path(scratch), chance, calibrations)


def run_trials(storage: str, count: int, aimed: int, chance: random.Random) -> list[Trial]:
    """``count`` trials of which ``aimed`` are aimed, in random order; failed ones are shown at once."""
    aims = [True] * min(aimed, count) + [False] * max(0, count - aimed)
    chance.shuffle(aims)
    trials = []
    with laboratory(storage, chance) as here:
        took = ", ".join(f"{seconds:.2f} s with {writers}" for writers, seconds in here.seconds.items())
        print(f"{storage}: undisturbed, {len(here.expected)} objects take {took} writers", flush=True)
        for number, aim in enumerate(aims, start=1):
            trials.append(here.trial(number, aimed=aim))
            if trials[-1].failed:
                print(f"{storage} trial {number} FAILED: {trials[-1]}", flush=True)
    return trials


def table(trials: Sequence[Trial]) -> str:
    """Sums over the trials, by storage, kind and number of writers, as Markdown."""
    headings = [
        "storage",
        "kill",
        "writers",
        "trials",
        "killed twice",
        *(f"in {name}" for name in FELL),
        *COLUMNS,
        "faults",
    ]
    lines = ["| " + " | ".join(headings).replace("_", " ") + " |", "|" + "---|" * len(headings)]
    kinds = sorted({(trial.storage, trial.kind, trial.writers) for trial in trials})
    for storage, kind, writers in kinds:
        some = [trial for trial in trials if (trial.storage, trial.kind, trial.writers) == (storage, kind, writers)]
        fell = Counter(trial.fell for trial in some)
        cells = [storage, kind, writers, len(some), sum(trial.kills == 2 for trial in some)]
        cells += [fell[name] for name in FELL]
        cells += [sum(getattr(trial, name) for trial in some) for name in COLUMNS]
        cells.append(sum(len(trial.faults) for trial in some))
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def summary(trials: Sequence[Trial], seconds: float) -> str:
    """The same in a few lines."""
    aimed = [trial for trial in trials if trial.kind == "aimed"]
    hit = sum(trial.hit for trial in aimed)
    failed = sum(trial.failed for trial in trials)
    total = {name: sum(getattr(trial, name) for trial in trials) for name in (*COLUMNS, "kills")}
    return (
        f"{len(trials)} trials, {total['kills']} kills of 2 to 5 processes each, {seconds:.0f} s.\n"
        f"Aimed between publish and record: {len(aimed)}, of which {hit} left an object without its record.\n"
        f"Left behind by the last kill of each trial: {total['orphans']} orphans and {total['leftovers']} unfinished "
        f"files; {total['adopted']} orphans were adopted, {total['collected']} objects deleted by gc.\n"
        f"A reader looked {total['looks']} times, {total['partial']} times at a run that was partly there.\n"
        f"Trials in which anything was wrong: {failed}."
    )


def main() -> None:
    """Run the trials and print them as a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--local", type=int, default=200, help="trials on local disk")
    parser.add_argument("--s3", type=int, default=50, help="trials on S3")
    parser.add_argument("--aimed", type=int, default=40, help="of both together, kills between publish and record")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="every trial, as JSON")
    arguments = parser.parse_args()
    chance, begin = random.Random(arguments.seed), time.monotonic()
    total = max(1, arguments.local + arguments.s3)
    trials: list[Trial] = []
    for storage, count in (("local", arguments.local), ("s3", arguments.s3)):
        if count:
            trials += run_trials(storage, count, -(-arguments.aimed * count // total), chance)
    print(f"\n{table(trials)}\n\n{summary(trials, time.monotonic() - begin)}")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(trial) for trial in trials], indent=1) + "\n")
    raise SystemExit(any(trial.failed for trial in trials))


if __name__ == "__main__":
    main()
