"""Kills the driver of real runs with SIGKILL and checks what a resume makes of it.

The table of docs/crashes.md comes from:

    python -m tests.cluster.crashes --uniform 20 --aimed 5

Every trial starts from the same generated rollouts, disturbs `personaspace extract` once, repeats the command, and
compares each stored object with an undisturbed run's.
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

from personaspace.store.layout import ZARR_GROUP, shard_key
from personaspace.store.local import LocalFolder
from personaspace.store.records import committed_slots, read_records, record_key
from personaspace.store.schema import RESID_POST_MEAN
from tests.models import tiny_checkpoint

CONFIG = """
model: {{id: {model}, dtype: float32}}
personas: {{only: [pirate, ghost, teacher], prompts: 5}}
generate: {{max_new_tokens: 8, batch_rows: 480}}
extract: {{micro_batch_tokens: 2048, window_rows: 64}}
store: {{root: {root}, run: {run}, unit_rows: 8, layer_group: 1}}
cluster: {{stages: 2}}
"""

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
        calls += record.array == "resid_post_mean"
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
    """Shards with a record when the driver was gone."""
    orphans: int
    """Shards without a record then."""
    adopted: int
    """Orphans that the resume recorded as they were."""
    rewritten: int
    """Records of the killed session that the resume changed: must be 0."""
    recomputed_outside: int
    """Shards that the resume computed in windows that were complete: must be 0."""
    identical: bool
    """Every object of the Zarr group has the bytes of the undisturbed run's."""


class Laboratory:
    """A folder with a tiny model, a run with rollouts only, and the same run extracted without disturbance."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = tiny_checkpoint(folder / "model")
        (folder / "site").mkdir()
        (folder / "site" / "sitecustomize.py").write_text(SITECUSTOMIZE)
        self._finish("generate", "base")
        shutil.copytree(folder / "runs" / "base", folder / "runs" / "undisturbed")
        process = self.start("extract", "undisturbed")
        self.wait_for_first_record("undisturbed")
        begin = time.monotonic()
        assert process.wait() == 0
        self.extract_seconds = time.monotonic() - begin
        self.expected = objects(folder / "runs" / "undisturbed")

    def start(
        self, step: str, run: str, environment: Mapping[str, str] | None = None, stages: int = 2
    ) -> subprocess.Popen[str]:
        """The command in a session of its own, as a user's shell would start it."""
        config = self.folder / f"{run}.yaml"
        config.write_text(CONFIG.format(model=self.model, root=self.folder / "runs", run=run))
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
        """Return when the first shard is committed: from here on every moment is one of computing and writing."""
        folder = LocalFolder(self.folder / "runs" / run)
        while not any(array == RESID_POST_MEAN for array, _, _ in committed_slots(folder)):
            time.sleep(0.01)

    def copy_base(self, run: str) -> Path:
        """A fresh run with rollouts and nothing extracted."""
        return Path(shutil.copytree(self.folder / "runs" / "base", self.folder / "runs" / run))

    def kill_driver(self, run: str, moment: float) -> Trial:
        """SIGKILL the driver ``moment`` seconds after the first commit, then resume."""
        path = self.copy_base(run)
        process = self.start("extract", run)
        self.wait_for_first_record(run)
        time.sleep(moment)
        process.kill()
        process.wait()
        return self._resume(path, run)

    def kill_before_record(self, run: str, shard: int) -> Trial:
        """SIGKILL driver and writer after the writer published its ``shard``-th shard and before its record."""
        path = self.copy_base(run)
        fault = {"PYTHONPATH": str(self.folder / "site"), "CRASH_AT_RECORD": str(shard)}
        process = self.start("extract", run, fault)
        assert process.wait() == -signal.SIGKILL
        return self._resume(path, run)

    def _resume(self, path: Path, run: str) -> Trial:
        folder = LocalFolder(path)
        slots = committed_slots(folder)
        before = {slot: folder.get(record_key(slot, generation)) for slot, generation in slots.items()}
        shards_before = {entry.key for entry in folder.list(f"{ZARR_GROUP}/{RESID_POST_MEAN}/c")}
        shards = [slot for slot in before if slot[0] == RESID_POST_MEAN]
        recorded = {shard_key(*slot) for slot in shards}
        self._finish("extract", run)
        epochs = {slot: record.epoch for slot, record in read_records(folder, RESID_POST_MEAN).items()}
        last = max(epochs.values())
        adopted = [slot for slot, record in read_records(folder, RESID_POST_MEAN).items() if record.adopted]
        complete = self._complete_units(shards, path)
        return Trial(
            committed_before=len(shards),
            orphans=len(shards_before - recorded),
            adopted=len(adopted),
            rewritten=sum(folder.get(record_key(slot, slots[slot])) != data for slot, data in before.items()),
            recomputed_outside=sum(
                slot[1] in complete and epochs[slot] == last for slot in epochs if slot not in before
            ),
            identical=objects(path) == self.expected,
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


def objects(run: Path) -> dict[str, bytes]:
    """Every file of the run's Zarr group."""
    group = run / "activations.zarr"
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
    parser.add_argument("--uniform", type=int, default=20, help="kills at uniformly random moments of extract")
    parser.add_argument("--aimed", type=int, default=5, help="kills between publish and record")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    moments = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as scratch:
        laboratory = Laboratory(Path(scratch))
        shards = len([name for name in laboratory.expected if name.startswith("resid_post_mean/c/")])
        print(
            f"undisturbed: {shards} shards, {laboratory.extract_seconds:.1f} s from first commit to end\n", flush=True
        )
        print("| trial | driver killed | committed | orphans | adopted | rewritten | recomputed outside | identical |")
        print("|---|---|---|---|---|---|---|---|")
        for number in range(arguments.uniform + arguments.aimed):
            run = f"trial-{uuid.uuid4().hex[:8]}"
            if number < arguments.uniform:
                moment = moments.uniform(0, laboratory.extract_seconds)
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
