"""A driver's session: the run's lease, its manifest, the Ray cluster, and an orderly end whatever happens."""

import logging
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from personaspace.cluster.config import ClusterConfig
from personaspace.cluster.job import Job
from personaspace.cluster.room import Node, Workers, room, share
from personaspace.store.creation import refuse_foreign, write_run
from personaspace.store.errors import InputError
from personaspace.store.holding import holding
from personaspace.store.index import write_index
from personaspace.store.lease import Fence
from personaspace.store.location import is_local
from personaspace.store.patience import PatientFolder
from personaspace.store.provenance import session_entry


@contextmanager
def hold_run(job: Job, say: Callable[[str], None]) -> Iterator[Fence]:
    """Hold the run's lease; create the run, or let it grow, as the job plans; note this session in run.json.

    Through the folder of what it yields, storage that fails is waited for, for ``store.patience`` seconds.
    """
    refuse_foreign(job.folder)
    with holding(job.folder, job.existing, timeout=job.store.lease_timeout, say=say) as fence:
        sessions = (*job.manifest.sessions, session_entry(fence.epoch))
        stored = write_run(fence, job.existing, replace(job.manifest, sessions=sessions), job.planned_rows())
        yield replace(fence, folder=PatientFolder(fence.folder, job.store.patience))
        write_index(fence, stored)
        job.folder.clear_scratch()


def ray_address(config: ClusterConfig) -> str | None:
    """Address of the cluster to join, or None to start one."""
    return config.address or os.environ.get("RAY_ADDRESS") or None


def check_shared_paths(config: ClusterConfig, paths: Mapping[str, str]) -> None:
    """Refuse relative paths (config key -> path) on a cluster: its nodes, and Ray jobs, have other working folders."""
    for key, path in paths.items():
        relative = is_local(path) and not Path(path.removeprefix("file://")).expanduser().is_absolute()
        if ray_address(config) is not None and relative:
            url = ", or a URL such as s3://BUCKET/PATH" if key == "store.root" else ", or a Hugging Face id"
            raise InputError(
                f"{key}: {path} is relative, and this runs on the Ray cluster {ray_address(config)}, where every node "
                f"and every job has a working folder of its own. Give an absolute path that all nodes share{url}."
            )


@contextmanager
def ray_cluster(config: ClusterConfig) -> Iterator[None]:
    """Connect to the configured cluster, or start one on this machine; shut down what was started."""
    address = ray_address(config)
    # Ray's own banner and usage note drown the lines that matter.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # What a worker raises is told once, by this process; Ray would tell it again for each result that nobody fetched.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    local: dict[str, Any] = {"include_dashboard": False} if address is None else {}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **local)
    except ConnectionError as error:
        raise InputError(f"cluster.address: no Ray cluster answers at {address}: {error}") from error
    # A cluster's head takes SIGTERM for itself and would end this process without its orderly end.
    signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield
    finally:
        ray.shutdown()


def share_cluster(config: ClusterConfig, nodes: Sequence[Node], actors: int) -> Workers:
    """What each actor gets of the nodes, of a replica of so many.

    Raises InputError if the cluster can't be shared so, or if this process's own cluster has no room for one replica:
    nobody will join that one.
    """
    workers = share(nodes, config.device, actors, config.replicas)
    if ray_address(config) is None and not room(nodes, workers, actors):
        raise InputError(
            f"cluster: a replica needs {actors} GPU(s), and this machine has {sum(node.gpus for node in nodes):g}. "
            "Lower cluster.stages, or set cluster.device to cpu."
        )
    return workers
