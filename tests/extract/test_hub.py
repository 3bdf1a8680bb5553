"""A Hugging Face id is downloaded once per machine, and of it only what a slice needs: with a real HTTP server."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from personaspace.extract.checkpoint import Checkpoint
from personaspace.extract.slicing import load_slice
from tests.extract.hub_server import REPOSITORY, HubServer
from tests.extract.load_from_hub import digest
from tests.extract.test_weights import by_layer, split

ROOT = Path(__file__).parents[2]


@pytest.fixture
def hub(llama: Checkpoint, tmp_path: Path) -> Iterator[HubServer]:
    split(Path(llama.source), tmp_path / "served", by_layer)
    with HubServer(tmp_path / "served") as server:
        yield server


class Node:
    """Processes that share one cache, as those of one machine do."""

    def __init__(self, hub: HubServer, home: Path) -> None:
        self.home = home
        self.environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            # By default a server that says nothing for 10 s is asked again: on a busy machine one that only waits, too.
            "HF_HUB_DOWNLOAD_TIMEOUT": "300",
            "HF_HUB_ETAG_TIMEOUT": "300",
            "NO_PROXY": "127.0.0.1",
        }

    def start(self, *slices: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "tests.extract.load_from_hub", REPOSITORY, *slices]
        return subprocess.Popen(
            command, env=self.environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def weights(self) -> set[str]:
        """Files with weights in the cache."""
        return {file.name for file in self.home.rglob("*.safetensors")}

    def incomplete(self) -> list[Path]:
        return list(self.home.rglob("*.incomplete"))


def finish(process: "subprocess.Popen[str]") -> list[str]:
    output, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    digests: list[str] = json.loads(output.splitlines()[-1])
    return digests


def expected(checkpoint: Checkpoint, first: int, stop: int) -> str:
    return digest(load_slice(checkpoint, first=first, stop=stop, dtype="float32"))


def test_only_the_files_of_the_slices_are_downloaded(llama: Checkpoint, hub: HubServer, tmp_path: Path) -> None:
    """Two nodes with one stage each; neither fetches the head, the second not the embedding."""
    first, second = Node(hub, tmp_path / "first"), Node(hub, tmp_path / "second")
    processes = [first.start("0-3"), second.start("3-6")]
    assert [finish(process) for process in processes] == [[expected(llama, 0, 3)], [expected(llama, 3, 6)]]
    needed = ["embedding", *(f"layer-{layer}" for layer in range(6))]
    assert hub.weights() == {f"{name}.safetensors": 1 for name in needed}
    assert first.weights() == {"embedding.safetensors", *(f"layer-{layer}.safetensors" for layer in (0, 1, 2))}
    assert second.weights() == {f"layer-{layer}.safetensors" for layer in (3, 4, 5)}
    hub.served.clear()
    # Other slices of the same node fetch only what is new.
    assert finish(second.start("2-4", "4-6")) == [expected(llama, 2, 4), expected(llama, 4, 6)]
    assert hub.weights() == {"layer-2.safetensors": 1}


def test_processes_of_one_node_download_a_file_once(llama: Checkpoint, hub: HubServer, tmp_path: Path) -> None:
    def wait_for_both(name: str, _: int) -> bool:
        # No file is sent before each of the two has asked for it.
        if name.endswith(".safetensors"):
            hub.wait_for(lambda: hub.asked[name] >= 2)
        return False

    hub.disturb = wait_for_both
    node = Node(hub, tmp_path / "home")
    processes = [node.start("1-3"), node.start("1-3")]
    assert [finish(process) for process in processes] == [[expected(llama, 1, 3)]] * 2
    assert hub.weights() == {"layer-1.safetensors": 1, "layer-2.safetensors": 1}
    assert hub.asked["layer-1.safetensors"] == 2


def test_a_connection_that_breaks_is_taken_up_again(llama: Checkpoint, hub: HubServer, tmp_path: Path) -> None:
    """huggingface_hub goes on from the last 10 MB that are whole."""
    name, size = "layer-1.safetensors", 24_000_000
    unused = {"unused.weight": torch.zeros(size // 4)}
    save_file({**load_file(hub.folder / name), **unused}, hub.folder / name, metadata={"format": "pt"})
    cut = 15_000_000
    hub.disturb = lambda file, position: file == name and hub.served[name] == 1 and position >= cut
    assert finish(Node(hub, tmp_path / "home").start("1-2")) == [expected(llama, 1, 2)]
    assert hub.served[name] == 2
    assert size + 4_000_000 < hub.sent[name] < size + 6_000_000


def test_a_process_that_is_killed_while_it_downloads_leaves_nothing_wrong(
    llama: Checkpoint, hub: HubServer, tmp_path: Path
) -> None:
    def stall(name: str, position: int) -> bool:
        if name == "layer-1.safetensors" and hub.served[name] == 1 and position >= 8192:
            hub.wait_for(lambda: hub.served[name] == 2)
            return True
        return False

    hub.disturb = stall
    node = Node(hub, tmp_path / "home")
    killed = node.start("1-2")
    hub.wait_for(lambda: hub.sent["layer-1.safetensors"] >= 8192)
    # A second one waits for the first's lock, and takes over when that is gone.
    waiting = node.start("1-2")
    hub.wait_for(lambda: hub.asked["layer-1.safetensors"] == 2)
    assert hub.served["layer-1.safetensors"] == 1
    killed.kill()
    killed.communicate()
    assert finish(waiting) == [expected(llama, 1, 2)]
    assert hub.served["layer-1.safetensors"] == 2
    assert len(node.incomplete()) == 1


def test_a_file_that_the_hub_does_not_give_is_named(hub: HubServer, tmp_path: Path) -> None:
    (hub.folder / "layer-4.safetensors").unlink()
    process = Node(hub, tmp_path / "home").start("4-6")
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 1
    assert (
        f"InputError: model.id: {REPOSITORY}: the Hugging Face hub does not give layer-4.safetensors at revision "
        in errors
    )
