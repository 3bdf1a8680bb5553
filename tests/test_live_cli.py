"""`personaspace serve`: what it refuses before a model is loaded, and a server that ends when it is told to."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from personaspace.cli import main
from personaspace.store.local import LocalFolder
from tests.analysis.caps.small_fit import LAYOUT, write_fitted
from tests.models import tiny_checkpoint

HIDDEN = 32


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("live")
    write_fitted(LocalFolder(folder / "run"), hidden=HIDDEN)
    return folder / "run"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "0.0.0.0 can be reached from elsewhere. Set a token"),
        (["--percentile", "100"], "steer.percentile"),
        (["--layers", "7-9"], "steer.layers: 8; "),
        (["--measured-at", "9"], "serve --measured-at: 9; the fit has the layers 0 to 7."),
        ([], "does not say where its model lies. Name it: --model ID"),
        (["--model", "/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_refusals(run: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(run), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_model_of_another_size_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_checkpoint(tmp_path, layers=2)
    assert main(["serve", str(run), "--model", str(tmp_path), "--device", "cpu"]) == 2
    assert "has 2 layers of 32 dimensions; the axis is of layer 4" in capsys.readouterr().err


def test_it_serves_until_it_is_told_to_end(run: Path, tmp_path: Path) -> None:
    """Told in the middle of an answer, it ends that, too."""
    tiny_checkpoint(tmp_path / "tiny", layers=LAYOUT.layers, hidden=HIDDEN)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    command = [sys.executable, "-m", "personaspace", "serve", str(run), "--model", str(tmp_path / "tiny")]
    process = subprocess.Popen(
        [*command, "--port", str(port), "--device", "cpu", "--method", "ablate"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    try:
        assert (
            process.stdout.readline()
            == f"tiny: ablate at layer {', '.join(map(str, range(8)))}; tiny-plain: as it is\n"
        )
        assert process.stdout.readline() == f"listening on http://127.0.0.1:{port}/v1\n"
        wait_for(f"http://127.0.0.1:{port}/health")
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Who?"}], "max_tokens": 5}
        answer = json.loads(urllib.request.urlopen(request(port, body), timeout=60).read())
        assert answer["personaspace"]["layer"] == 4
        stream = urllib.request.urlopen(request(port, {**body, "max_tokens": 200, "stream": True}), timeout=60)
        assert stream.readline().startswith(b"data: ")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.communicate()


def wait_for(url: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError):
            assert time.monotonic() < deadline
            time.sleep(0.1)


def request(port: int, body: dict[str, object]) -> urllib.request.Request:
    return urllib.request.Request(f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode())
