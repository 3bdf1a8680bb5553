"""`personaspace fit RUN` on one machine: no Ray, whatever cluster the run was made on."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import ray

from personaspace.analysis.config import AnalysisConfig
from personaspace.cli import main
from personaspace.cluster.config import ClusterConfig
from personaspace.config import RunConfig
from personaspace.extract.config import ModelConfig
from personaspace.store.lease import acquire
from personaspace.store.local import LocalFolder
from personaspace.store.manifest import require_manifest, write_manifest
from personaspace.store.space import open_space
from tests.analysis.test_fit import write


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalFolder:
    """A run that was made on a cluster which is gone."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    folder = LocalFolder(tmp_path / "run")
    write(folder)
    config = RunConfig(
        model=ModelConfig(id="org/model"),
        analysis=AnalysisConfig(permutations=20, components=3),
        cluster=ClusterConfig(address="10.255.255.1:6379", analysis_workers=8),
    )
    with acquire(folder, timeout=60, say=print) as lease:
        made = require_manifest(folder)
        write_manifest(lease.fence, made, replace(made, execution={"config": asdict(config)}))
    return folder


def test_it_needs_no_cluster(folder: LocalFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", folder.url]) == 0
    assert not ray.is_initialized()
    assert "Dask worker" not in capsys.readouterr().out
    assert open_space(folder).sizes["component"] == 3, "as the run's config says"


@pytest.mark.slow
def test_workers_are_started_on_demand(folder: LocalFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", folder.url]) == 0
    on_threads = open_space(folder).load()
    assert main(["fit", folder.url, "--cluster.analysis-workers", "1"]) == 0
    assert not ray.is_initialized()
    assert "fit: 1 Dask worker(s) on 1 node(s), " in capsys.readouterr().out
    assert open_space(folder).load().drop_attrs().identical(on_threads.drop_attrs())


def test_more_workers_than_cpus_are_refused(folder: LocalFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", folder.url, "--cluster.analysis-workers", "4096"]) == 2
    assert "error: cluster.analysis_workers: 4096 Dask worker(s), and the cluster has " in capsys.readouterr().err
    assert not ray.is_initialized()
