"""The vllm engine end to end: actors in vLLM's environment under a driver in ours, and what SIGKILL does to them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import pytest

from personaspace.store import open_run
from personaspace.store.local import LocalFolder
from personaspace.store.manifest import require_manifest
from personaspace.store.records import ROLLOUTS, committed_slots
from personaspace.store.rollouts import read_rollouts
from personaspace.store.schema import RESID_POST_MEAN
from personaspace.store.verify import verify
from tests.cluster.crashes import processes_with
from tests.models import tiny_checkpoint

PYTHON = os.environ.get("PERSONASPACE_VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not Path(PYTHON).is_file() and os.environ.get("PERSONASPACE_REQUIRE_VLLM") != "1",
        reason="vLLM has an environment of its own: make test-vllm (PERSONASPACE_VLLM_PYTHON names its Python)",
    ),
]
CONFIG = """
model: {{id: {model}, dtype: float32}}
personas: {{only: [pirate, ghost, teacher], prompts: 2, max_questions: 8}}
generate: {{engine: vllm, max_new_tokens: {tokens}, batch_rows: 8, capture: {capture}}}
extract: {{window_rows: 16}}
store: {{root: {root}, run: {run}, unit_rows: 4, layer_group: 2}}
cluster: {{device: cpu, vllm: {{python: {python}, cache_gib: 0.2}}}}
"""
ROWS = 64
TOKENS = 60


class Place:
    """A folder with a model whose runs are started as a user would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # vLLM's kernels for CPUs know no heads narrower than 32.
        self.model = tiny_checkpoint(folder / "model", layers=2, hidden=128)

    def start(
        self,
        run: str,
        *,
        python: str = sys.executable,
        mark: str = "",
        step: str = "generate",
        capture: bool = False,
    ) -> subprocess.Popen[str]:
        file = self.folder / f"{run}.yaml"
        inside = python != sys.executable
        vllm = "null" if inside else PYTHON
        settings = {"python": vllm, "tokens": TOKENS, "capture": str(capture).lower()}
        file.write_text(CONFIG.format(model=self.model, root=self.folder, run=run, **settings))
        return subprocess.Popen(
            [python, "-m", "personaspace", step, str(file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "RAY_ADDRESS": "", "PERSONASPACE_TEST_MARK": mark},
        )

    def finish(self, process: "subprocess.Popen[str]") -> str:
        output, _ = process.communicate(timeout=400)
        assert process.returncode == 0, output
        return output

    def sampled(self, run: str) -> list[dict[str, object]]:
        table = read_rollouts(LocalFolder(self.folder / run))
        return table.select(["rollout_id", "response_token_ids", "finish_reason", "dropped"]).to_pylist()

    def wait_for_units(self, run: str, units: int, process: "subprocess.Popen[str]") -> None:
        folder, deadline = LocalFolder(self.folder / run), time.monotonic() + 300
        while len([slot for slot in committed_slots(folder) if slot[0] == ROLLOUTS]) < units:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = Place(tmp_path_factory.mktemp("place"))
    for step in ("generate", "extract"):
        place.finish(place.start("undisturbed", step=step))
    return place


def generators(mark: str) -> list[int]:
    """Processes of vLLM's environment that generate."""
    found = []
    for pid in processes_with("PERSONASPACE_TEST_MARK", mark):
        try:
            command = (Path("/proc") / str(pid) / "cmdline").read_bytes()
        except FileNotFoundError:
            continue
        if b"Generator" in command:
            found.append(pid)
    return found


def test_generated_stored_extracted_verified(place: Place) -> None:
    folder = LocalFolder(place.folder / "undisturbed")
    assert verify(folder).problems == ()
    assert require_manifest(folder).identity["generate"]["engine"] == "vllm"
    sampled = place.sampled("undisturbed")
    assert len(sampled) == ROWS
    assert all(1 <= len(row["response_token_ids"]) <= TOKENS for row in sampled if row["dropped"] is None)
    assert sum(row["dropped"] is None for row in sampled) > ROWS / 2
    assert {row["finish_reason"] for row in sampled} <= {"stop", "length"}
    made = read_rollouts(folder).column("sampling").to_pylist()
    assert all(json.loads(sampling)["maker"].startswith("vllm 0.") for sampling in made)


def test_what_is_captured_is_what_a_second_pass_gives(place: Place) -> None:
    output = place.finish(place.start("captured", capture=True))
    [cosine] = re.findall(r"agree: cosine at least (\d\.\d+)", output)
    assert float(cosine) > 0.99999
    folder = LocalFolder(place.folder / "captured")
    assert {array for array, _, _ in committed_slots(folder)} >= {ROLLOUTS, RESID_POST_MEAN}
    place.finish(place.start("captured", capture=True, step="extract"))
    assert verify(folder).problems == ()
    assert place.sampled("captured") == place.sampled("undisturbed")
    captured, extracted = (open_run(str(place.folder / run))[RESID_POST_MEAN] for run in ("captured", "undisturbed"))
    np.testing.assert_allclose(captured.values, extracted.values, rtol=1e-3, atol=1e-4)


@pytest.mark.nightly
def test_killed_generator_is_replaced_and_says_the_same(place: Place) -> None:
    mark = uuid.uuid4().hex
    process = place.start("generator", mark=mark)
    place.wait_for_units("generator", 2, process)
    [victim] = generators(mark)
    os.kill(victim, signal.SIGKILL)
    output = place.finish(process)
    assert "a worker process died" in output
    assert place.sampled("generator") == place.sampled("undisturbed")


@pytest.mark.nightly
def test_killed_driver_resumes_and_says_the_same(place: Place) -> None:
    mark = uuid.uuid4().hex
    process = place.start("driver", mark=mark)
    place.wait_for_units("driver", 2, process)
    process.kill()
    process.communicate()
    before = committed_slots(LocalFolder(place.folder / "driver"))
    assert 0 < len(before) < ROWS / 4
    # The actors see that their driver is gone.
    deadline = time.monotonic() + 60
    while generators(mark) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert generators(mark) == []
    place.finish(place.start("driver"))
    assert place.sampled("driver") == place.sampled("undisturbed")
    assert committed_slots(LocalFolder(place.folder / "driver")).keys() >= before.keys()


def test_the_whole_command_may_run_in_vllms_environment(place: Place) -> None:
    place.finish(place.start("inside", python=PYTHON))
    assert place.sampled("inside") == place.sampled("undisturbed")
