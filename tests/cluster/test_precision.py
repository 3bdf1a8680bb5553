"""`model.dtype: auto` in a run: by the machines of a new one, and what it was begun with for one that exists."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from personaspace.cli import main
from personaspace.cluster.config import ClusterConfig
from personaspace.cluster.precision import settle_dtype
from personaspace.extract.config import ModelConfig
from personaspace.extract.precision import machine_dtype
from personaspace.store.local import LocalFolder
from personaspace.store.manifest import require_manifest
from tests.cluster.small_jobs import make_place, talk

HERE = machine_dtype("cpu")
WORDS = {
    ("bfloat16", False): "bfloat16 here, since this CPU computes in it",
    ("float32", False): "float32 here, since this CPU does not compute in bfloat16",
    ("bfloat16", True): "bfloat16 here, since all CPUs of the cluster compute in it",
    ("float32", True): "float32 here, since CPUs of the cluster do not compute in bfloat16",
}


def settle(cluster: ClusterConfig, folder: Path) -> tuple[str, str]:
    """The dtype of `auto`, and what is said about it."""
    said: list[str] = []
    model = settle_dtype(ModelConfig(id="m"), cluster, LocalFolder(folder), said.append)
    assert not ray.is_initialized()
    [line] = said
    assert line.startswith("model.dtype: auto is ")
    return model.settled_dtype, line.removeprefix("model.dtype: auto is ")


def write_config(folder: Path) -> Path:
    """A config of a tiny model and two finished responses, without a dtype."""
    make_place(folder, {"default": [talk("Who?", "I am an AI.")], "ghost": [talk("Who?", "A ghost.")]})
    file = folder / "config.yaml"
    file.write_text(
        f"model: {{id: {folder}/model}}\ngenerate: {{responses: {folder}/responses}}\n"
        f"store: {{root: {folder}, run: run}}\n"
    )
    return file


@pytest.fixture
def with_gpu() -> Iterator[str]:
    """Address of a cluster that has, by its own account, a GPU on one of two nodes."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1, num_gpus=1)
    yield cluster.address
    cluster.shutdown()


def test_a_dtype_of_its_own_stays(tmp_path: Path) -> None:
    said: list[str] = []
    model = ModelConfig(id="m", dtype="float16")
    assert settle_dtype(model, ClusterConfig(), LocalFolder(tmp_path), said.append) == model
    assert not said


def test_on_one_s_own_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert settle(ClusterConfig(device="cpu"), tmp_path) == (HERE, WORDS[HERE, False])


def test_on_a_cluster_its_nodes_are_asked(ray_head: str, tmp_path: Path) -> None:
    assert settle(ClusterConfig(address=ray_head), tmp_path) == (HERE, WORDS[HERE, True])


def test_on_a_cluster_with_gpus(with_gpu: str, tmp_path: Path) -> None:
    assert settle(ClusterConfig(address=with_gpu), tmp_path) == ("bfloat16", "bfloat16 here, since GPUs do the work")
    # Its GPUs are left alone, so its CPUs count.
    assert settle(ClusterConfig(address=with_gpu, device="cpu"), tmp_path) == (HERE, WORDS[HERE, True])


@pytest.mark.usefixtures("commands_join")
def test_a_run_keeps_what_it_was_begun_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path)
    # Never what `auto` would choose.
    assert main(["generate", str(config), "--model.dtype", "float16"]) == 0
    assert "model.dtype" not in capsys.readouterr().out
    assert main(["extract", str(config)]) == 0
    assert "model.dtype: auto is float16 here, as the run was begun\n" in capsys.readouterr().out
    manifest = require_manifest(LocalFolder(tmp_path / "run"))
    assert manifest.identity["model"]["dtype"] == "float16"
    assert manifest.execution["config"]["model"]["dtype"] == "float16"
    assert main(["extract", str(config), "--model.dtype", "float32"]) == 2
    assert 'model.dtype: "float16" -> "float32"' in capsys.readouterr().err
    assert main(["store", "repair", str(tmp_path / "run")]) == 0


@pytest.mark.usefixtures("commands_join")
def test_a_new_run_says_what_it_chose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path)
    assert main(["generate", str(config)]) == 0
    assert f"model.dtype: auto is {WORDS[HERE, True]}\n" in capsys.readouterr().out
    manifest = require_manifest(LocalFolder(tmp_path / "run"))
    assert manifest.identity["model"]["dtype"] == manifest.execution["config"]["model"]["dtype"] == HERE
