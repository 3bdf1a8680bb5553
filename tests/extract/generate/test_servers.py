"""The openai engine against servers that people run, in vLLM's environment: `vllm serve`, `transformers serve`."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from personaspace.extract.config import EndpointConfig, GenerateConfig
from personaspace.extract.endpoint import Endpoint
from personaspace.extract.generate.ending import checkpoint_stop_ids
from personaspace.extract.generate.engine import Response
from personaspace.extract.generate.openai_engine import KEY, Manner, OpenAIEngine
from tests.extract.generate.test_vllm_engine import CONFIG, HIDDEN, SEEDS, Tiny, needs_vllm
from tests.models import MAX_POSITIONS, reciting_checkpoint, tiny_checkpoint

START_SECONDS = 180


@contextmanager
def serving(log: Path, *command: str) -> Iterator[str]:
    """Run a server of this environment on a free port; yields its address once it answers."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
    quiet = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *command, "--host", "127.0.0.1", "--port", port],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **quiet},
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def without_bos(folder: Path) -> Path:
    """The checkpoint with a tokenizer that puts no BOS before a text; this server does so where one does."""
    file = folder / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "post_processor": None}))
    return folder


def ask(tiny: Tiny, url: str, model: str | None = None) -> OpenAIEngine:
    stops = checkpoint_stop_ids(tiny.checkpoint, tiny.chat)
    config = EndpointConfig(base_url=url, model=model, concurrency=8)
    return OpenAIEngine(Endpoint(config, KEY), tiny.chat, stops, source=tiny.checkpoint.source)


@needs_vllm
def test_vllm_serve_says_what_the_vllm_engine_says(tmp_path: Path) -> None:
    tiny = Tiny(tiny_checkpoint(tmp_path / "model", layers=2, hidden=HIDDEN))
    options = ("--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", str(2**27))
    # The command `vllm` of vllm-cpu 0.32.0 looks for a package called vllm, and ends.
    server = ("-m", "vllm.entrypoints.openai.api_server", "--model", tiny.checkpoint.source)
    with serving(tmp_path / "log", *server, *options) as url:
        engine = ask(tiny, url)
        assert engine.manner == Manner(prompts_as_ids=True, tells_ids=True)
        served = engine.generate(tiny.prompts, SEEDS, CONFIG)
        [long] = engine.generate([[1] * (MAX_POSITIONS + 1)], [0], CONFIG)
    assert long.unusable is not None
    assert long.unusable.startswith("the server refuses it: 400: ")
    with tiny.vllm() as own:
        assert served == own.generate(tiny.prompts, SEEDS, CONFIG)


@needs_vllm
def test_transformers_serve(tmp_path: Path) -> None:
    """It takes no token ids and tells none, and has one generator for all requests."""
    said = "I see the old house."
    tiny = Tiny(without_bos(reciting_checkpoint(tmp_path / "model", "\n", f"{said}<|im_end|>")))
    source = tiny.checkpoint.source
    command = str(Path(sys.executable).parent / "transformers")
    with serving(tmp_path / "log", command, "serve", source, "--device", "cpu", "--dtype", "float32") as url:
        engine = ask(tiny, url, source)
        assert engine.manner == Manner(prompts_as_ids=False, tells_ids=False)
        responses = engine.generate(tiny.prompts[:4], SEEDS[:4], CONFIG)
        [short] = engine.generate(tiny.prompts[:1], SEEDS[:1], GenerateConfig(max_new_tokens=3))
    whole = Response(token_ids=tiny.chat.encode_text(said), text=said, finish_reason="stop")
    assert responses == [whole] * 4
    assert (short.token_ids, short.finish_reason) == (whole.token_ids[:3], "length")
