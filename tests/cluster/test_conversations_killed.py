"""Conversations whose driver is killed in their midst, or whose auditor fails: a resume ends in the same texts."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from personaspace.extract.endpoint import EndpointError
from personaspace.store.local import LocalFolder
from personaspace.store.records import ROLLOUTS, committed_slots
from personaspace.store.rollouts import Rollout, read_rollouts, to_rollouts
from tests.auditor_server import Answer, completions_server, reply
from tests.models import tiny_checkpoint

pytestmark = pytest.mark.nightly
KEY = "sk-open-sesame"
TURNS, SAMPLES = 4, 4
SCENARIOS = [
    {
        "id": f"sea.{number}",
        "topic": "The sea.",
        "user": f"You are Ann {number}.",
        "turns": [f"What is it, {number}?"],
    }
    for number in range(4)
]


@dataclass(frozen=True)
class Place:
    """A model and scenarios, and the undisturbed run of 16 conversations in four batches."""

    folder: Path
    expected: dict[str, bytes]

    def start(self, run: str, url: str) -> subprocess.Popen[str]:
        """`personaspace generate` on a cluster of its own."""
        document = {
            "model": {"id": str(self.folder / "model"), "dtype": "float32"},
            "personas": {
                "roles": [],
                "scenarios": str(self.folder / "sea.yaml"),
                "turns": TURNS,
                "samples": SAMPLES,
                "auditor": {
                    "played_by": "endpoint",
                    "endpoint": {
                        "model": "eve",
                        "base_url": url,
                        "api_key_env": "AUDITOR_KEY",
                        "retries": 1,
                        "concurrency": 2,
                    },
                },
            },
            "generate": {"max_new_tokens": 6, "batch_rows": 4},
            "store": {"root": str(self.folder / "runs"), "run": run, "unit_rows": 4},
        }
        config = self.folder / f"{run}.yaml"
        config.write_text(yaml.safe_dump(document))
        return subprocess.Popen(
            [sys.executable, "-m", "personaspace", "generate", str(config)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, "RAY_ADDRESS": "", "AUDITOR_KEY": KEY},
        )

    def parts(self, run: str) -> dict[str, bytes]:
        """The stored rollouts."""
        return {file.name: file.read_bytes() for file in sorted((self.folder / "runs" / run / "rollouts").iterdir())}

    def rollouts(self, run: str) -> list[Rollout]:
        return to_rollouts(read_rollouts(LocalFolder(self.folder / "runs" / run)))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("killed")
    tiny_checkpoint(folder / "model", layers=2)
    (folder / "sea.yaml").write_text(yaml.safe_dump({"version": 1, "domain": "sea", "scenarios": SCENARIOS}))
    place = Place(folder, {})
    with completions_server() as server:
        process = place.start("undisturbed", server.url)
        output, _ = process.communicate()
        assert process.returncode == 0, output
        assert len(server.asked) == len(SCENARIOS) * SAMPLES * (TURNS - 1)
    return Place(folder, place.parts("undisturbed"))


def test_a_played_run_is_whole_and_keeps_its_key_to_itself(place: Place) -> None:
    rollouts = place.rollouts("undisturbed")
    assert [one.dropped for one in rollouts] == [None] * 16
    for one in rollouts:
        said = [turn["content"] for turn in one.messages if turn["role"] == "user"]
        assert said[0] == SCENARIOS[one.question]["turns"][0]
        assert [text[:6] for text in said[1:]] == ["Turn 2", "Turn 3", "Turn 4"]
        sampling = json.loads(one.sampling)
        assert sampling["user"] == {
            "played_by": "endpoint",
            "model": "eve",
            "persona": SCENARIOS[one.question]["user"],
        }
        assert len({turn["seed"] for turn in sampling["turns"]}) == TURNS
    for file in (place.folder / "runs").rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes(), file


@pytest.mark.parametrize("number", [30])
def test_a_driver_killed_amid_conversations_resumes_to_the_same_texts(place: Place, number: int) -> None:
    """SIGKILL while the played user answers its ``number``-th request, of 48."""
    run, process, asked = f"killed-{number}", None, 0

    def respond(body: dict[str, Any]) -> Answer:
        nonlocal asked
        asked += 1
        if asked == number and process is not None:
            os.kill(process.pid, signal.SIGKILL)
        return reply(body)

    with completions_server(respond) as server:
        process = place.start(run, server.url)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        committed = {unit for array, unit, _ in committed_slots(LocalFolder(place.folder / "runs" / run))}
        before = len(server.asked)
        resumed = place.start(run, server.url)
        output, _ = resumed.communicate()
        assert resumed.returncode == 0, output
        again = len(server.asked) - before
    assert place.parts(run) == place.expected
    assert len(committed) < 4
    # Actors outlive their driver by seconds, so requests of the killed session may still come in.
    assert again <= (4 - len(committed)) * 4 * (TURNS - 1) + 4 * (TURNS - 1)


def failing(answer: Answer, after: int) -> Callable[[dict[str, Any]], Answer]:
    """What a server does that gives this answer from some request on."""
    asked = 0

    def respond(body: dict[str, Any]) -> Answer:
        nonlocal asked
        asked += 1
        return answer if asked > after else reply(body)

    return respond


def test_a_failing_auditor_stops_the_run_and_costs_only_the_batch(place: Place) -> None:
    run = "failing"
    answer = Answer(status=500, text=f"no, {KEY}", headers={"Retry-After": "0.1"})
    with completions_server(failing(answer, after=17)) as server:
        process = place.start(run, server.url)
        output, _ = process.communicate()
    assert process.returncode == EndpointError.exit_code, output
    assert f"{server.url} fails after 2 tries: 500: no, " in " ".join(output.split())
    assert KEY not in output
    assert "Traceback" not in output
    stored = [unit for array, unit, _ in committed_slots(LocalFolder(place.folder / "runs" / run)) if array == ROLLOUTS]
    assert len(stored) == 1
    with completions_server() as server:
        resumed = place.start(run, server.url)
        output, _ = resumed.communicate()
        assert resumed.returncode == 0, output
        assert len(server.asked) == 3 * 4 * (TURNS - 1)
    assert place.parts(run) == place.expected
