"""The command line with one rollout that ends every worker that runs it.

python -m tests.cluster.poisoned ROLLOUT_ID extract CONFIG
"""

import os
import signal
import sys
from typing import Any

import ray

from personaspace.cli import main
from personaspace.cluster import extraction, generation, generators, stages

POISON = sys.argv[1] if __name__ == "__main__" else ""
# Ray lets nobody inherit from an actor class, but from what it was made of.
StageWorker: Any = stages.StageActor.__ray_metadata__.modified_class.__ray_actor_class__
GeneratorWorker: Any = generators.Generator.__ray_metadata__.modified_class.__ray_actor_class__


@ray.remote(concurrency_groups={"store": 1}, enable_tensor_transport=True)
class StageActor(StageWorker):
    """Dies of the rollout in its last stage."""

    def forward(self, order: stages.Order, received: stages.Passed | None) -> stages.Passed | stages.Ran:
        if self._spec.share.last:
            die_of(order.rollout_ids, order.left_out)
        return super().forward(order, received)


@ray.remote(concurrency_groups={"store": 1})
class Generator(GeneratorWorker):
    """Dies of the rollout."""

    def generate(self, order: generators.Order) -> generators.Sampled:
        die_of([row.rollout_id for unit in order.units for row in unit.rows], order.left_out)
        return super().generate(order)


def die_of(rollout_ids: Any, left_out: Any) -> None:
    if POISON in {name for place, name in enumerate(rollout_ids) if place not in left_out}:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    extraction.StageActor = StageActor
    generation.Generator = Generator
    sys.exit(main(sys.argv[2:]))
