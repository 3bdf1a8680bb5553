"""Kills the driver of real runs with SIGKILL and checks what a resume makes of it.

The table of docs/crashes.md comes from:

    python -m tests.cluster.crashes --uniform 20 --aimed 5
    python -m tests.cluster.crashes --uniform 20 --aimed 5 --step generate

Every trial disturbs `personaspace extract` (from the same generated rollouts) or `generate` once, repeats the command,
and compares each stored object with an undisturbed run's.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from personaspace.store.layout import ZARR_GROUP, rollouts_key, shard_key
from personaspace.store.local import LocalFolder
from personaspace.store.records import ROLLOUTS, committed_slots, read_records, record_key
from personaspace.store.schema import RESID_POST_MEAN
from tests.models import tiny_checkpoint

CONFIG = """
model: {{id: {model}, dtype: float32}}
personas: {{only: [pirate, ghost, teacher], prompts: 5, max_questions: {questions}}}
generate: {{max_new_tokens: {tokens}, batch_rows: {batch_rows}}}
extract: {{micro_batch_tokens: 2048, window_rows: 64}}
store: {{root: {root}, run: {run}, unit_rows: 8, layer_group: 1}}
cluster: {{stages: 2}}
"""
Step = Literal["extract", "generate"]
SIZES: Mapping[Step, Mapping[str, int]] = {
    "extract": {"questions": 48, "tokens": 8, "batch_rows": 480},
    "generate": {"questions": 16, "tokens": 60, "batch_rows": 40},
}
ARRAYS: Mapping[Step, str] = {"extract": RESID_POST_MEAN, "generate": ROLLOUTS}
"""What a step commits, by its name in records."""

# Loaded by every Python process of a trial through PYTHONPATH: kills driver and writer between publish and record.
SITECUSTOMIZE = """
import os
if os.environ.get("CRASH_AT_RECORD"):
    import signal
    import personaspace.store.commit as commit
    from personaspace.store.lease import read_holder
    publish_record, calls = commit._publish_record, 0

    def crash(fence, record):
        global calls
        calls += record.array == os.environ["CRASH_ARRAY"]
        if calls == int(os.environ["CRASH_AT_RECORD"]):
            os.kill(read_holder(fence.folder).pid, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        return publish_record(fence, record)

    commit._publish_record = crash
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """What one disturbed run came to."""

    committed_before: int
    """Shards, or units of rollouts, with a record when the driver was gone."""
    orphans: int
    """Those without a record then."""
    adopted: int
    """Orphans that the resume recorded as they were."""
    rewritten: int
    """Records of the killed session that the resume changed: must be 0."""
    recomputed_outside: int
    """Shards that the resume computed in windows that were complete: must be 0."""
    identical: bool
    """Every object of the Zarr group, or part of rollouts, has the bytes of the undisturbed run's."""


class Laboratory:
    """A folder with a tiny model, what the step begins with, and a run in which nothing disturbed it."""

    def __init__(self, folder: Path, step: Step = "extract") -> None:
        self.folder, self.step, self.array = folder, step, ARRAYS[step]
        self.model = tiny_checkpoint(folder / "model")
        (folder / "site").mkdir()
        (folder / "site" / "sitecustomize.py").write_text(SITECUSTOMIZE)
        if step == "extract":
            self._finish("generate", "base")
        self.copy_base("undisturbed")
        process = self.start(step, "undisturbed")
        self.wait_for_first_record("undisturbed")
        begin = time.monotonic()
        assert process.wait() == 0
        self.seconds = time.monotonic() - begin
        """From its first commit to its end."""
        self.expected = objects(folder / "runs" / "undisturbed", step)

    def start(
        self, step: str, run: str, environment: Mapping[str, str] | None = None, stages: int = 2
    ) -> subprocess.Popen[str]:
        """The command in a session of its own, as a user's shell would start it."""
        config = self.folder / f"{run}.yaml"
        config.write_text(CONFIG.format(model=self.model, root=self.folder / "runs", run=run, **SIZES[self.step]))
        return subprocess.Popen(
            [sys.executable, "-m", "personaspace", step, str(config), "--cluster.stages", str(stages)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # A test run in the background inherits an ignored SIGINT; a terminal's commands don't.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            env={**os.environ, "RAY_ADDRESS": "", **(environment or {})},
        )

    def wait_for_first_record(self, run: str) -> None:
        """Return when something is committed: from here on every moment is one of computing and writing."""
        folder = LocalFolder(self.folder / "runs" / run)
        while not any(array == self.array for array, _, _ in committed_slots(folder)):
            time.sleep(0.01)

    def copy_base(self, run: str) -> Path:
        """A fresh run: of `extract`, with rollouts and nothing extracted; of `generate`, with nothing."""
        path = self.folder / "runs" / run
        if self.step == "extract":
            shutil.copytree(self.folder / "runs" / "base", path)
        return path

    def kill_driver(self, run: str, moment: float) -> Trial:
        """SIGKILL the driver ``moment`` seconds after the first commit, then resume."""
        path = self.copy_base(run)
        process = self.start(self.step, run)
        self.wait_for_first_record(run)
        time.sleep(moment)
        process.kill()
        process.wait()
        return self._resume(path, run)

    def kill_before_record(self, run: str, place: int) -> Trial:
        """SIGKILL driver and writer after the writer published its ``place``-th object and before its record."""
        path = self.copy_base(run)
        fault = {
            "PYTHONPATH": str(self.folder / "site"),
            "CRASH_AT_RECORD": str(place),
            "CRASH_ARRAY": self.array,
        }
        process = self.start(self.step, run, fault)
        assert process.wait() == -signal.SIGKILL
        return self._resume(path, run)

    def _resume(self, path: Path, run: str) -> Trial:
        folder = LocalFolder(path)
        slots = committed_slots(folder)
        before = {slot: folder.get(record_key(slot, generation)) for slot, generation in slots.items()}
        where = ROLLOUTS if self.step == "generate" else f"{ZARR_GROUP}/{self.array}/c"
        there_before = {entry.key for entry in folder.list(where)}
        shards = [slot for slot in before if slot[0] == self.array]
        recorded = {rollouts_key(slot[1]) if self.step == "generate" else shard_key(*slot) for slot in shards}
        self._finish(self.step, run)
        records = read_records(folder, self.array)
        epochs = {slot: record.epoch for slot, record in records.items()}
        last = max(epochs.values())
        adopted = [slot for slot, record in records.items() if record.adopted]
        complete = self._complete_units(shards, path)
        return Trial(
            committed_before=len(shards),
            orphans=len(there_before - recorded),
            adopted=len(adopted),
            rewritten=sum(folder.get(record_key(slot, slots[slot])) != data for slot, data in before.items()),
            recomputed_outside=sum(
                slot[1] in complete and epochs[slot] == last for slot in epochs if slot not in before
            ),
            identical=objects(path, self.step) == self.expected,
        )

    @staticmethod
    def _complete_units(shards: list[tuple[str, int, int]], path: Path) -> set[int]:
        layers = json.loads((path / "run.json").read_text())["layout"]["layers"]
        units = [unit for _, unit, _ in shards]
        return {unit for unit in units if units.count(unit) == layers}

    def _finish(self, step: str, run: str) -> None:
        process = self.start(step, run)
        output, _ = process.communicate()
        assert process.returncode == 0, output


def objects(run: Path, step: Step = "extract") -> dict[str, bytes]:
    """What the step made: every file of the run's Zarr group, or its rollouts."""
    group = run / (ROLLOUTS if step == "generate" else ZARR_GROUP)
    return {str(file.relative_to(group)): file.read_bytes() for file in sorted(group.rglob("*")) if file.is_file()}


def processes_with(variable: str, value: str) -> list[int]:
    """Pids of all processes that inherited an environment variable with this value."""
    wanted, found = f"{variable}={value}".encode(), []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except (FileNotFoundError, PermissionError, ProcessLookupError):
            continue
    return found


def main() -> None:
    """Run the trials and print them as a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--step", choices=ARRAYS, default="extract")
    parser.add_argument("--uniform", type=int, default=20, help="kills at uniformly random moments of the step")
    parser.add_argument("--aimed", type=int, default=5, help="kills between publish and record")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    moments = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as scratch:
        laboratory = Laboratory(Path(scratch), arguments.step)
        prefix = "" if arguments.step == "generate" else f"{RESID_POST_MEAN}/c/"
        shards = len([name for name in laboratory.expected if name.startswith(prefix)])
        print(f"undisturbed: {shards} objects, {laboratory.seconds:.1f} s from first commit to end\n", flush=True)
        print("| trial | driver killed | committed | orphans | adopted | rewritten | recomputed outside | identical |")
        print("|---|---|---|---|---|---|---|---|")
        for number in range(arguments.uniform + arguments.aimed):
            run = f"trial-{uuid.uuid4().hex[:8]}"
            if number < arguments.uniform:
                moment = moments.uniform(0, laboratory.seconds)
                where, trial = f"after {moment:.2f} s", laboratory.kill_driver(run, moment)
            else:
                shard = moments.randrange(1, shards // 2)
                where, trial = f"before record {shard}", laboratory.kill_before_record(run, shard)
            print(
                f"| {number + 1} | {where} | {trial.committed_before} | {trial.orphans} | {trial.adopted} | "
                f"{trial.rewritten} | {trial.recomputed_outside} | {'yes' if trial.identical else 'NO'} |",
                flush=True,
            )
            shutil.rmtree(Path(scratch) / "runs" / run)


if __name__ == "__main__":
    main()
