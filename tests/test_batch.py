"""Several configs in one command."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from personaspace.cli import main
from tests.cluster.small_jobs import talk, write_responses
from tests.models import tiny_checkpoint

CONFIG = """
model: {{id: {model}, dtype: float32}}
generate: {{responses: {responses}}}
store: {{root: {root}, run: {run}}}
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    tiny_checkpoint(tmp_path / "model")
    write_responses(tmp_path / "responses", {"default": [talk("?", "One.")] * 1, "ghost": [talk("?", "Boo.")]})
    return tmp_path


def config(place: Path, run: str, *, model: str = "model", file: str | None = None) -> str:
    path = place / f"{file or run}.yaml"
    path.write_text(CONFIG.format(model=place / model, responses=place / "responses", root=place / "runs", run=run))
    return str(path)


@pytest.mark.nightly
def test_one_that_fails_stops_no_other_and_the_summary_says_all(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [config(place, "first"), config(place, "second", model="nowhere"), config(place, "third")]
    assert main(["generate", *files, "--jobs", "2"]) == 2
    output = capsys.readouterr().out
    assert f"[second] error: model.id: {place}/nowhere does not exist" in output
    summary = output[output.index("== 2 of 3 done") :]
    assert re.search(rf"^ +done +[\d.]+ min  {files[0]}$", summary, re.MULTILINE)
    assert re.search(rf"^ +failed \(2\) +[\d.]+ min  {files[1]}  model\.id: ", summary, re.MULTILINE)
    assert re.search(rf"^ +done +[\d.]+ min  {files[2]}$", summary, re.MULTILINE)
    for run in ("first", "third"):
        assert (place / "runs" / run / "rollouts").is_dir()


def test_two_configs_of_one_run_are_refused_before_anything_begins(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [config(place, "run"), config(place, "run", file="other")]
    assert main(["run", *files]) == 2
    assert capsys.readouterr().err == (
        f"error: store.run: 'run' in {place}/runs is the place of 2 configs ({files[0]}, {files[1]}); give each its "
        "own. Nothing was started.\n"
    )
    assert not (place / "runs").exists()


def test_a_batch_is_made_of_configs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", config(place, "run"), "runs/demo"]) == 2
    assert capsys.readouterr().err == "error: fit: runs/demo is no YAML file; a batch is made of configs.\n"


def test_an_interrupted_batch_starts_nothing_more(place: Path) -> None:
    files = [config(place, "first"), config(place, "second")]
    command = [sys.executable, "-m", "personaspace", "run", *files]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "RAY_ADDRESS": ""})
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("run "):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert process.wait() == 130
    assert "error: Interrupted. What is committed is safe; the same command resumes." in rest
    summary = rest[rest.index("== 0 of 2 done") :]
    assert re.search(rf"^ +interrupted .* {files[0]}  Interrupted\. ", summary, re.MULTILINE)
    assert re.search(rf"^ +interrupted .* {files[1]}  not started$", summary, re.MULTILINE)
    assert not (place / "runs" / "second").exists()
