"""Stages from memory."""

import re
from pathlib import Path

import pytest

from personaspace.cluster.job import Job
from personaspace.cluster.stage_count import stages_for
from personaspace.store.errors import InputError
from tests.cluster.small_jobs import job_for, make_place, talk


def test_as_few_stages_as_memory_allows(tmp_path: Path) -> None:
    job = job_for(make_place(tmp_path, {"default": [talk("?", "One.")], "ghost": [talk("?", "Boo.")]}), "run")
    counts = {megabytes: count(job, megabytes * 1_000_000) for megabytes in range(632, 640)}
    assert counts[639] == 1
    assert sorted(counts.values(), reverse=True) == list(counts.values())
    message = (
        "cluster.stages: not even 2 layers of model fit a device with 1 GB, beside a micro-batch of 256 tokens. Set "
        "cluster.sharding to `tensor` or `offload`."
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        stages_for(job, 600_000_000, "cpu")


def count(job: Job, memory: int) -> int:
    """Stages, or 99 where no number will do."""
    try:
        return stages_for(job, memory, "cpu")
    except InputError:
        return 99
