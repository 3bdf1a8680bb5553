"""Kills `personaspace judge` at random moments, repeats the command, and checks what the store and the server say.

The table of docs/judge.md comes from:

    python -m tests.extract.judging.kills --rounds 20
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from personaspace.store.judging import read_answers
from personaspace.store.local import LocalFolder
from personaspace.store.parquet import decode_table
from personaspace.store.records import read_object, read_records
from personaspace.store.scores import SCHEMA, SCORES, read_judgements
from personaspace.store.verify import verify
from tests.extract.judging.chat_server import BEHAVIOURS, MODEL, PRICE_IN, PRICE_OUT, ChatServer, expected_score
from tests.extract.judging.runs import KEY, make_run

ROWS, UNIT_ROWS = 360, 60
JUDGED = range(UNIT_ROWS, ROWS)
NONSENSE = range(UNIT_ROWS + 7, ROWS, 97)
"""Rows for which the server never gives a score."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """What one killed and resumed judging came to."""

    moment: float
    """Seconds from the first request to the kill."""
    committed: int
    """Rollouts in committed units when it was killed."""
    journalled: int
    """Others, of which an answer was kept."""
    asked_again: int
    """Rollouts that had an answer in the store and were asked about again: must be 0."""
    lost_on_the_way: int
    """Rollouts that were asked about before the kill, had no answer in the store, and were asked about again."""
    changed: int
    """Committed objects that the resume changed: must be 0."""
    wrong: int
    """Rollouts without their score or reason, or with another's: must be 0."""
    doubled: int
    """Rollouts with more than one score or reason: must be 0."""
    usd: float
    """That the server's work was worth, up to the end of the budget."""
    budget: float
    key_seen: bool
    """The key is in the output or in the store: must not be."""

    @property
    def is_sound(self) -> bool:
        wrong = (self.asked_again, self.changed, self.wrong, self.doubled)
        return not any(wrong) and self.usd <= self.budget and not self.key_seen


class Laboratory:
    """A run to be judged, and the time that it takes undisturbed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_run(folder / "base", rows=ROWS, unit_rows=UNIT_ROWS)
        with self.server() as server:
            run = self._copy("undisturbed")
            process = self.start(run, server, budget=100)
            self._wait_for_requests(server)
            begin = time.monotonic()
            output = process.communicate()[0]
            assert process.returncode == 0, output
            self.seconds = time.monotonic() - begin
            self.usd = server.usd
            assert _answers(run) == _expected()

    @staticmethod
    def server() -> ChatServer:
        """One that fails one request of ten, in all ways but those that take long."""
        bad = [behaviour for behaviour in BEHAVIOURS if behaviour not in ("hang", "429 date")]

        def behave(row: int, before: int) -> str:
            chance = random.Random(f"{row} {before}")
            return "nonsense" if row in NONSENSE else chance.choice(bad) if chance.random() < 0.1 else "good"

        return ChatServer(behaviour=behave, delay=0.1, retry_after=0.1)

    def start(self, run: Path, server: ChatServer, *, budget: float) -> subprocess.Popen[str]:
        """The command, as a user's shell would start it."""
        options = {
            "--model": MODEL,
            "--base-url": server.url,
            "--name": "judge",
            "--budget": budget,
            "--price-in": PRICE_IN,
            "--price-out": PRICE_OUT,
            "--max-tokens": 30,
            "--first-pause": 0.02,
        }
        flags = [str(part) for option in options.items() for part in option]
        return subprocess.Popen(
            [sys.executable, "-m", "personaspace", "judge", str(run), *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # A test run in the background inherits an ignored SIGINT; a terminal's commands don't.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            env={**os.environ, "OPENAI_API_KEY": KEY},
        )

    def kill(self, name: str, moment: float, *, budget_share: float, number: int = signal.SIGKILL) -> Round:
        """Kill the judge ``moment`` seconds after its first request, resume, and go on without a limit at the end.

        ``budget_share`` is of what an undisturbed judging costs.
        """
        run, budget = self._copy(name), budget_share * self.usd
        folder = LocalFolder(run)
        with self.server() as server:
            first = self.start(run, server, budget=budget)
            self._wait_for_requests(server)
            time.sleep(moment)
            first.send_signal(number)
            output = first.communicate()[0]
            asked_before, sent = server.rows_asked, len(server.requests)
            objects = {entry.key: folder.get(entry.key) for entry in folder.list("scores")}
            recorded = {
                row for unit in read_judgements(folder, "judge").values() for row in (*unit.scores, *unit.unjudged)
            }
            kept = {answer.row for answers in read_answers(folder, "judge").values() for answer in answers}
            second = self.start(run, server, budget=budget)
            output += second.communicate()[0]
            assert second.returncode in (0, 8), output
            usd = server.usd
            if second.returncode == 8:
                third = self.start(run, server, budget=100)
                output += third.communicate()[0]
                assert third.returncode == 0, output
            asked_after = Counter(request.row for request in server.requests[sent:])
        answers, expected = _answers(run), _expected()
        found = verify(folder)
        assert found.harmful == [], found.harmful
        result = Round(
            moment=moment,
            committed=len(recorded),
            journalled=len(kept - recorded),
            asked_again=len((recorded | kept) & asked_after.keys()),
            lost_on_the_way=len((asked_before.keys() - recorded - kept) & asked_after.keys()),
            changed=sum(folder.get(key) != data for key, data in objects.items()),
            wrong=sum(answers.get(row) != expected[row] for row in JUDGED) + len(answers.keys() - expected.keys()),
            doubled=_doubled(run) + sum(len(part) for part in read_answers(folder, "judge").values()),
            usd=usd,
            budget=budget,
            key_seen=KEY in output or any(KEY.encode() in folder.get(entry.key) for entry in folder.list()),
        )
        shutil.rmtree(run)
        return result

    def _copy(self, name: str) -> Path:
        return Path(shutil.copytree(self.folder / "base", self.folder / name))

    @staticmethod
    def _wait_for_requests(server: ChatServer) -> None:
        end = time.monotonic() + 60
        while not server.requests:
            assert time.monotonic() < end, "the judge asks nothing"
            time.sleep(0.005)


def _expected() -> dict[int, float | str]:
    """Row -> its score, or `unjudged`."""
    return {row: "unjudged" if row in NONSENSE else float(expected_score(row)) for row in JUDGED}


def _answers(run: Path) -> dict[int, float | str]:
    found: dict[int, float | str] = {}
    for unit in read_judgements(LocalFolder(run), "judge").values():
        found |= {row: score.score for row, score in unit.scores.items()}
        found |= dict.fromkeys(unit.unjudged, "unjudged")
    return found


def _doubled(run: Path) -> int:
    folder = LocalFolder(run)
    counts = Counter(row for unit in read_judgements(folder, "judge").values() for row in unit.unjudged)
    for record in read_records(folder, f"{SCORES}.judge").values():
        counts.update(decode_table(read_object(folder, record.objects[0]), SCHEMA)["row"].to_pylist())
    return sum(count > 1 for count in counts.values())


def main() -> None:
    """Carry out the rounds and print them as a table; every second one within a budget that does not suffice."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as scratch:
        laboratory = Laboratory(Path(scratch))
        print(
            f"undisturbed: {len(JUDGED)} rollouts, {laboratory.seconds:.1f} s, {laboratory.usd:.4f} USD\n", flush=True
        )
        print(
            "| round | killed after | committed | kept beside | asked again | on the way | changed | wrong | doubled |",
            end="",
        )
        print(" USD of budget | sound |\n|" + "---|" * 11, flush=True)
        for number in range(arguments.rounds):
            moment = chance.uniform(0, laboratory.seconds)
            found = laboratory.kill(f"round-{number}", moment, budget_share=(3, 0.6)[number % 2])
            print(
                f"| {number + 1} | {found.moment:.2f} s | {found.committed} | {found.journalled} | "
                f"{found.asked_again} | {found.lost_on_the_way} | {found.changed} | {found.wrong} | {found.doubled} | "
                f"{found.usd:.4f} of {found.budget:.4f} | {'yes' if found.is_sound else 'NO'} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
