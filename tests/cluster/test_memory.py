"""Memory that runs out in one stage: its micro-batches run in parts, the records say so, and a rollout fails alone."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import ray
import torch
from torch import nn

from personaspace.cluster import extraction
from personaspace.cluster.events import Loaded, Note
from personaspace.cluster.stages import StageActor
from personaspace.extract.stage import OUT_OF_MEMORY
from personaspace.store import open_run
from personaspace.store.records import COORDINATES_RECORD, read_records
from personaspace.store.schema import RESID_POST_MEAN
from personaspace.store.verify import verify
from tests.cluster.small_jobs import config_for, job_of, run_job, talk, write_responses
from tests.cluster.test_extraction import plain_means
from tests.models import tiny_checkpoint

MOST_ROWS, MOST_TOKENS = 2, 200


# Ray lets nobody inherit from an actor class, but from what it was made of.
StageWorker: Any = StageActor.__ray_metadata__.modified_class.__ray_actor_class__


@ray.remote(concurrency_groups={"store": 1}, enable_tensor_transport=True)
class ScarceActor(StageWorker):
    """A stage actor whose first stage asks for more memory than there is, if it gets too much at once."""

    def load(self, meeting: str = "") -> Loaded:
        loaded = super().load(meeting)
        if self._spec.share.first == 0:
            self._stage.model.blocks[1].register_forward_pre_hook(self._ask)

        return cast(Loaded, loaded)

    @staticmethod
    def _ask(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        rows, tokens, _ = args[0].shape
        if rows > MOST_ROWS or tokens > MOST_TOKENS:
            torch.empty(2**60, dtype=torch.uint8)


@pytest.mark.nightly
@pytest.mark.usefixtures("own_ray")
def test_a_run_survives_and_says_which_rollouts_ran_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_checkpoint(tmp_path / "model")
    conversations = {
        "default": [talk("?", text) for text in ("One.", "Two.", "Three.", "so it goes, " * 22)],
        "ghost": [talk("?", text) for text in ("Five.", "Six.", "Seven.", "Eight.")],
    }
    job = job_of(config_for(model, write_responses(tmp_path / "responses", conversations), tmp_path, "scarce"))
    monkeypatch.setattr(extraction, "StageActor", ScarceActor)
    [_, note] = [event.text for event in run_job(job, stages=2) if isinstance(event, Note)]
    # Five rollouts of one micro-batch run as two, one and two; the others fit, but for row 3.
    assert note == (
        "extract: out of memory with 5 x 14 tokens; ran them in 3 parts. A smaller extract.micro_batch_tokens avoids "
        "this (in a new run)."
    )
    run = open_run(job.folder).load()
    assert run["status"].values.tolist() == [1, 1, 1, 2, 1, 1, 1, 1]
    assert np.isnan(run[RESID_POST_MEAN].values[3]).all()
    for row, means_LD in plain_means(model, job).items():
        if row != 3:
            errors_L = np.linalg.norm(run[RESID_POST_MEAN].values[row] - means_LD, axis=1)
            assert (errors_L <= 1e-5 * np.linalg.norm(means_LD, axis=1)).all()
    # The later stage ran all at once, but on states that the first one computed in parts, or not at all.
    for group in range(3):
        shards = read_records(job.folder, RESID_POST_MEAN)
        first, second = (shards[(RESID_POST_MEAN, unit, group)] for unit in range(2))
        assert (first.split, first.dropped) == ((0, 1, 2), {3: OUT_OF_MEMORY})
        assert (second.split, second.dropped) == ((5, 7), {})
    [coordinates, _] = read_records(job.folder, COORDINATES_RECORD).values()
    assert coordinates.dropped == {3: OUT_OF_MEMORY}
    assert verify(job.folder).problems == ()
