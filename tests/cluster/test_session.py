"""Before a driver starts: paths that only one node would see are refused."""

import re

import pytest

from personaspace.cluster.config import ClusterConfig
from personaspace.cluster.session import check_shared_paths
from personaspace.extract.checkpoint import means_folder
from personaspace.store.errors import InputError

CLUSTER = ClusterConfig(address="ray://10.0.0.1:10001")


@pytest.mark.parametrize(
    "root", ["/shared/runs", "~/runs", "s3://bucket/runs", "gs://bucket/runs", "file:///shared/runs"]
)
def test_what_every_node_sees_is_accepted(root: str) -> None:
    check_shared_paths(CLUSTER, {"store.root": root})


@pytest.mark.parametrize("root", ["runs", "./runs", "../runs", "file://runs"])
def test_relative_paths_are_refused_on_a_cluster(monkeypatch: pytest.MonkeyPatch, root: str) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    check_shared_paths(ClusterConfig(), {"store.root": root})
    message = (
        f"store.root: {root} is relative, and this runs on the Ray cluster {CLUSTER.address}, where every node and "
        "every job has a working folder of its own. Give an absolute path that all nodes share, or a URL such as "
        "s3://BUCKET/PATH."
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        check_shared_paths(CLUSTER, {"store.root": root})


def test_a_relative_model_folder_is_refused_and_an_id_of_the_hub_is_not() -> None:
    assert means_folder("./model")
    assert means_folder("models/of/mine")
    assert not means_folder("meta-llama/Llama-3.3-70B-Instruct")
    message = (
        f"model.id: ./model is relative, and this runs on the Ray cluster {CLUSTER.address}, where every node and "
        "every job has a working folder of its own. Give an absolute path that all nodes share, or a Hugging Face id."
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        check_shared_paths(CLUSTER, {"store.root": "/shared", "model.id": "./model"})
