"""A Ray cluster of this test module's own, and jobs on tiny models."""

from collections.abc import Iterator

import pytest
import ray

from personaspace.cluster.config import ClusterConfig
from personaspace.cluster.session import ray_cluster


@pytest.fixture(scope="module")
def own_ray() -> Iterator[None]:
    """A local cluster started and shut down by the project's own session code."""
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("RAY_ADDRESS", raising=False)
        with ray_cluster(ClusterConfig()):
            yield
    assert not ray.is_initialized()
