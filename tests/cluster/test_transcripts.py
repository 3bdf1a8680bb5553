"""Finished transcripts, from the file to the trajectory: on real Ray, and in a notebook's engine."""

import json
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from personaspace.analysis.drift.trajectories import trajectories
from personaspace.cluster.config import ClusterConfig
from personaspace.cluster.job import prepare
from personaspace.extract.config import ExtractConfig, GenerateConfig, ModelConfig, PersonasConfig
from personaspace.extract.engine import Extractor
from personaspace.store import open_spans
from personaspace.store.config import StoreConfig
from personaspace.store.rollouts import read_rollouts
from tests.analysis.drift.talks import a_space
from tests.cluster.test_extraction import run_job
from tests.models import tiny_checkpoint


def talk(turns: int, about: str) -> list[dict[str, str]]:
    said = ("What do you see there?", "And then?", "Tell me more.")
    return [
        message
        for turn in range(turns)
        for message in (
            {"role": "user", "content": said[turn % 3]},
            {"role": "assistant", "content": f"The {about} is wide. " * (1 + turn)},
        )
    ]


@pytest.mark.usefixtures("own_ray")
def test_a_run_of_transcripts_is_what_the_engine_reads_and_drifts(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model")
    talks = {"sea": talk(3, "sea"), "night": talk(2, "night"), "long": talk(40, "river")}
    (tmp_path / "texts").mkdir()
    for name, messages in talks.items():
        entry = {"model": "some/body", "domain": "walks", "conversation": messages}
        (tmp_path / "texts" / f"{name}.json").write_text(json.dumps(entry))
    job = prepare(
        model=ModelConfig(id=str(model), dtype="float32"),
        personas=PersonasConfig(),
        generate=GenerateConfig(responses=str(tmp_path / "texts")),
        extract=ExtractConfig(reductions=("turns",), micro_batch_tokens=256),
        store=StoreConfig(root=str(tmp_path / "runs"), run="texts", precision="lossless"),
        execution={},
    )
    run_job(job, ClusterConfig(stages=2, replicas=1))
    dropped = {row["row"]: row["dropped"] for row in read_rollouts(job.folder).to_pylist()}
    assert [dropped[1], dropped[2]] == [None, None]
    assert "tokens exceed the model's context of 256" in dropped[0], "in the order of the files: long, night, sea"
    spans = open_spans(job.folder)
    assert spans["turn"].values.tolist() == [0, 1, 0, 1, 2]

    found = Extractor(ModelConfig(id=str(model), dtype="float32")).extract(
        [talks["night"], talks["sea"]], reductions=["turns"]
    )
    alone = found.drop_dims("rollout").rename(span_resid_post_mean="resid_post_mean", span_rollout="rollout")
    np.testing.assert_allclose(alone["resid_post_mean"], spans["resid_post_mean"], atol=1e-5)
    np.testing.assert_array_equal(alone["count"], spans["count"])

    space = a_space(layers=6).pad(hidden=(0, 8), mode="constant", constant_values=0)
    read, in_a_notebook = (trajectories(turns, space) for turns in (spans, alone))
    assert read["turns"].values.tolist() == [2, 3]
    xr.testing.assert_allclose(read.drop_vars("conversation"), in_a_notebook.drop_vars("conversation"), atol=1e-4)
