"""Disturbs real runs on a real Ray cluster of several nodes, once each, and checks what they come to.

The table of docs/chaos.md comes from:

    python -m tests.cluster.chaos --trials 60

Every trial runs `personaspace extract` (from the same rollouts) or `personaspace generate` on a cluster of a head and
two more nodes, does one thing to it at a random moment, and repeats the command if it failed. What is stored is then
compared, byte by byte, with an undisturbed run.
"""

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

from personaspace.store import open_run
from personaspace.store.local import LocalFolder
from personaspace.store.records import committed_slots
from personaspace.store.rollouts import read_rollouts
from personaspace.store.schema import RESID_POST_MEAN
from personaspace.store.verify import verify
from tests.cluster.crashes import objects
from tests.cluster.local_cluster import LocalCluster, local_cluster
from tests.models import tiny_checkpoint

CONFIG = """
model: {{id: {model}, dtype: float32}}
personas: {{only: [pirate, ghost, teacher], prompts: 2, max_questions: 24}}
generate: {{max_new_tokens: 12, batch_rows: 32}}
extract: {{micro_batch_tokens: 512, window_rows: 32}}
store: {{root: {root}, run: {run}, unit_rows: 8, layer_group: 2}}
cluster: {{address: {address}, stages: {stages}, replicas: {replicas}, stall_timeout: 12, wait_timeout: 90}}
"""
LAYERS, HIDDEN = 12, 128
WORKER = {"extract": "ray::StageActor", "generate": "ray::Generator"}
PATIENCE = 300.0
"""Seconds that a command may take."""
NOBODY = "nobody"
AWAY = 5.0
"""Seconds for which the store is read-only."""
SHORT_STOP, LONG_STOP = 4.0, 20.0
"""Seconds that a worker is stopped: less, and more, than the watchdog's patience."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """Something that happens to a run."""

    step: str
    name: str
    happen: Callable[["Laboratory", subprocess.Popen[str]], str]
    """Does it, and says to whom."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """What a disturbed run came to."""

    what: str
    commands: int
    """That it took: 1, or 2 where the first one failed."""
    seconds: float
    replicas_lost: int
    repeated: int
    """Rollouts that had come through and ran again."""
    identical: bool
    """What is stored is what an undisturbed run stores, but for the poisoned rollout."""
    complete: bool


@dataclass(slots=True)
class Laboratory:
    """A cluster, a tiny model, and what undisturbed runs give."""

    folder: Path
    cluster: LocalCluster
    stages: int
    replicas: int
    model: Path = field(init=False)
    disk: Path = field(init=False)
    arrays: dict[str, bytes] = field(init=False)
    rollouts: dict[str, tuple[int, ...]] = field(init=False)
    working: dict[str, float] = field(default_factory=dict)
    """Step -> seconds from its workers' readiness to its end, undisturbed."""
    _timers: list[threading.Timer] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = tiny_checkpoint(self.folder / "model", layers=LAYERS, hidden=HIDDEN)
        self.disk = self.folder / "disk"
        self.working["generate"] = self._undisturbed("generate", "base")
        shutil.copytree(self.disk / "base", self.disk / "whole")
        self.working["extract"] = self._undisturbed("extract", "whole")
        self.arrays = objects(self.disk / "whole")
        self.rollouts = stored_rollouts(self.disk / "base")

    def later(self, seconds: float, action: Callable[[], object]) -> None:
        """Do something in a while; `settle` waits for it."""
        timer = threading.Timer(seconds, action)
        timer.start()
        self._timers.append(timer)

    def settle(self) -> None:
        """Wait until everything is as before: the disk writable, three nodes alive."""
        while self._timers:
            self._timers.pop().join()
        self.cluster.wait_for_nodes(3)

    def start(self, step: str, run: str, poison: str | None = None) -> subprocess.Popen[str]:
        """The command, as a process of its own."""
        config = self.folder / f"{run}.yaml"
        config.write_text(
            CONFIG.format(
                model=self.model,
                root=self.disk,
                run=run,
                address=self.cluster.address,
                stages=self.stages,
                replicas=self.replicas,
            )
        )
        command = ["personaspace"] if poison is None else ["tests.cluster.poisoned", poison]
        return subprocess.Popen(
            [sys.executable, "-m", *command, step, str(config)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**self.cluster.environment, "PYTHONPATH": str(Path.cwd())},
        )

    def workers(self, step: str) -> list[psutil.Process]:
        """The step's processes, on all nodes."""
        found = []
        for node in self.cluster.nodes:
            if node.alive:
                for process in psutil.Process(node.process.pid).children(recursive=True):
                    try:
                        if process.cmdline()[:1] and process.cmdline()[0].startswith(WORKER[step]):
                            found.append(process)
                    except psutil.NoSuchProcess:
                        continue  # Ended between the two looks.
        return found

    def _undisturbed(self, step: str, run: str) -> float:
        process = self.start(step, run)
        output = Output(process)
        output.wait_for("is ready")
        begin = time.monotonic()
        assert output.end() == 0, output.text
        return time.monotonic() - begin


class Output:
    """What a command prints, read as it comes."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    @property
    def text(self) -> str:
        return "".join(self.lines)

    def wait_for(self, text: str) -> None:
        """Return once a line with the text was printed, or the command has ended."""
        deadline = time.monotonic() + PATIENCE
        while text not in self.text and self.process.poll() is None:
            assert time.monotonic() < deadline, self.text
            time.sleep(0.02)

    def end(self) -> int:
        """Exit code."""
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"no end after {PATIENCE:.0f} s:\n{self.text}") from None
        self._thread.join()
        return self.process.returncode

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(iter(self.process.stdout.readline, ""))


def kill_worker(step: str) -> Callable[[Laboratory, subprocess.Popen[str]], str]:
    """SIGKILL one of the step's workers."""

    def happen(laboratory: Laboratory, process: subprocess.Popen[str]) -> str:
        return _signal_worker(laboratory, process, step, signal.SIGKILL)

    return happen


def stop_worker(step: str, seconds: float) -> Callable[[Laboratory, subprocess.Popen[str]], str]:
    """SIGSTOP one of the step's workers, and SIGCONT it later."""

    def happen(laboratory: Laboratory, process: subprocess.Popen[str]) -> str:
        done = _signal_worker(laboratory, process, step, signal.SIGSTOP)
        pid = int(done.split()[-1]) if done != NOBODY else 0
        if pid:
            laboratory.later(seconds, lambda: _continue(pid))
        return done

    return happen


def kill_driver(_: Laboratory, process: subprocess.Popen[str]) -> str:
    """SIGKILL the command itself."""
    process.kill()
    return f"driver {process.pid}"


def kill_node(laboratory: Laboratory, _: subprocess.Popen[str]) -> str:
    """SIGKILL the raylet of a node, not the head's; another node joins a few seconds later."""
    nodes = [node for node in laboratory.cluster.nodes[1:] if node.alive]
    node = random.choice(nodes)
    node.kill()
    laboratory.later(5, laboratory.cluster.add_node)
    return f"raylet of node {laboratory.cluster.nodes.index(node)}"


def close_store(laboratory: Laboratory, _: subprocess.Popen[str]) -> str:
    """Make the disk read-only for a while."""
    _remount(laboratory.disk, "ro")
    laboratory.later(AWAY, lambda: _remount(laboratory.disk, "rw"))
    return "store"


def nothing(_: Laboratory, __: subprocess.Popen[str]) -> str:
    """The poison is in the run already."""
    return "rollout"


KINDS = [
    *[Kind(step=step, name="worker killed", happen=kill_worker(step)) for step in WORKER],
    *[Kind(step=step, name="driver killed", happen=kill_driver) for step in WORKER],
    *[Kind(step=step, name="node killed", happen=kill_node) for step in WORKER],
    *[Kind(step=step, name="worker stopped 20 s", happen=stop_worker(step, LONG_STOP)) for step in WORKER],
    Kind(step="extract", name="worker stopped 4 s", happen=stop_worker("extract", SHORT_STOP)),
    *[Kind(step=step, name="store read-only 5 s", happen=close_store) for step in WORKER],
    *[Kind(step=step, name="poisonous rollout", happen=nothing) for step in WORKER],
]


def disturb(laboratory: Laboratory, kind: Kind, moment: float, run: str) -> Trial:
    """Let it happen ``moment`` of the way from the workers' readiness to the end, and see what comes of it.

    Earlier, if nobody is left by then whom it could happen to.
    """
    begin = time.monotonic()
    place = laboratory.disk / run
    if kind.step == "extract":
        shutil.copytree(laboratory.disk / "base", place)
    poison = random.choice(sorted(laboratory.rollouts)) if "poison" in kind.name else None
    process = laboratory.start(kind.step, run, poison)
    output = Output(process)
    output.wait_for("is ready")
    time.sleep(moment * laboratory.working[kind.step])
    what = kind.happen(laboratory, process)
    if what == NOBODY:
        output.end()
        laboratory.settle()
        shutil.rmtree(place)
        return disturb(laboratory, kind, moment * random.random(), run)
    code, text, commands = output.end(), output.text, 1
    repeated = unfinished(place, kind.step) if what.startswith("driver") else 0
    if code:
        commands = 2
        again = Output(laboratory.start(kind.step, run, poison))
        assert again.end() == 0, f"{kind.name}, {what}:\n{text}\nand again:\n{again.text}"
        text += again.text
    repeated += sum(int(found) for found in re.findall(r", (\d+) run again", text))
    if kind.step == "extract":
        identical = _same_arrays(laboratory, place, poison)
    else:
        identical = stored_rollouts(place) == laboratory.rollouts | ({poison: ()} if poison else {})
    complete = verify(LocalFolder(place)).problems == () and (
        kind.step == "generate" or not unfinished(place, "extract")
    )
    laboratory.settle()
    shutil.rmtree(place)
    return Trial(
        what=what,
        commands=commands,
        seconds=time.monotonic() - begin,
        replicas_lost=text.count("lost replica"),
        repeated=repeated,
        identical=identical,
        complete=complete,
    )


def unfinished(run: Path, step: str) -> int:
    """Rollouts of units of which some shards are committed, and others not: what a resume computes again."""
    if step == "generate":
        return 0
    slots = committed_slots(LocalFolder(run))
    counts = Counter(unit for array, unit, _ in slots if array == RESID_POST_MEAN)
    return 8 * sum(count < LAYERS // 2 for count in counts.values())


def stored_rollouts(run: Path) -> Mapping[str, tuple[int, ...]]:
    """Rollout id -> response. Raises AssertionError if one is there twice."""
    entries = read_rollouts(LocalFolder(run)).to_pylist()
    rollouts = {entry["rollout_id"]: tuple(entry["response_token_ids"]) for entry in entries}
    assert len(rollouts) == len(entries)
    return rollouts


def _same_arrays(laboratory: Laboratory, place: Path, poison: str | None) -> bool:
    if poison is None:
        return objects(place) == laboratory.arrays
    whole, kept = (open_run(run).load() for run in (laboratory.disk / "whole", place))
    entries = read_rollouts(LocalFolder(place), columns=["row", "rollout_id"]).to_pylist()
    others = [entry["row"] for entry in entries if entry["rollout_id"] != poison]
    [row] = [entry["row"] for entry in entries if entry["rollout_id"] == poison]
    same = np.array_equal(kept[RESID_POST_MEAN].values[others], whole[RESID_POST_MEAN].values[others])
    return same and bool(np.isnan(kept[RESID_POST_MEAN].values[row]).all())


def _signal_worker(laboratory: Laboratory, process: subprocess.Popen[str], step: str, number: int) -> str:
    """Send a signal to a random worker, as soon as there is one."""
    while process.poll() is None:
        if workers := laboratory.workers(step):
            worker = random.choice(workers)
            worker.send_signal(number)
            return f"worker {worker.pid}"
        time.sleep(0.05)
    return NOBODY


def _continue(pid: int) -> None:
    if psutil.pid_exists(pid):
        os.kill(pid, signal.SIGCONT)


def _remount(disk: Path, mode: str) -> None:
    """Busy as long as a file is open for writing."""
    while subprocess.run(["mount", "-o", f"remount,{mode}", str(disk)], capture_output=True, check=False).returncode:
        time.sleep(0.01)


@contextmanager
def laboratory(stages: int, replicas: int) -> Iterator[Laboratory]:
    """A laboratory on a cluster of three nodes and a small disk."""
    with tempfile.TemporaryDirectory() as scratch, local_cluster(nodes=3, cpus=1) as cluster:
        disk = Path(scratch) / "disk"
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512m", "tmpfs", str(disk)], check=True)
        try:
            yield Laboratory(Path(scratch), cluster, stages, replicas)
        finally:
            _remount(disk, "rw")
            subprocess.run(["umount", "-l", str(disk)], check=True)


def main() -> None:
    """Run the trials and print them as a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--only", help="kinds whose name holds this")
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    kinds = [kind for kind in KINDS if not arguments.only or arguments.only in f"{kind.step} {kind.name}"]
    with laboratory(arguments.stages, arguments.replicas) as place:
        print(
            f"{arguments.replicas} replica(s) of {arguments.stages} stage(s); undisturbed, from ready to end: generate "
            f"{place.working['generate']:.1f} s, extract {place.working['extract']:.1f} s; "
            f"{len(place.rollouts)} rollouts in {len(place.rollouts) // 8} units\n",
            flush=True,
        )
        print("| trial | step | disturbance | at | whom | commands | lost | repeated | identical | complete | s |")
        print("|---|---|---|---|---|---|---|---|---|---|---|")
        for number in range(arguments.trials):
            kind = kinds[number % len(kinds)]
            moment = random.random()
            trial = disturb(place, kind, moment, f"trial-{number}")
            answers = ["yes" if answer else "NO" for answer in (trial.identical, trial.complete)]
            print(
                f"| {number + 1} | {kind.step} | {kind.name} | {moment:.0%} | {trial.what} | {trial.commands} | "
                f"{trial.replicas_lost} | {trial.repeated} | {answers[0]} | {answers[1]} | {trial.seconds:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
