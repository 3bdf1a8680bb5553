"""A run of a quantised checkpoint: recorded in its identity, and the same in one stage and in two."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from personaspace.extract import quantization
from personaspace.store import open_run
from personaspace.store.errors import InputError
from tests.cluster.small_jobs import job_for, make_place, run_job, talk
from tests.extract.quantised import fp8

CONVERSATIONS = {
    "default": [talk("Who are you?", "An assistant."), talk("Why?", "It is so, and always was.")],
    "ghost": [talk("Who?", "Boo."), talk("Speak.", "so it goes, " * 9)],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = make_place(tmp_path_factory.mktemp("quantised"), CONVERSATIONS)
    fp8(place / "fp8")
    return place


def test_identity_names_the_quantisation_where_there_is_one(place: Path) -> None:
    plain, quantised = (job_for(place, name, model=name).manifest.identity["model"] for name in ("model", "fp8"))
    assert "quantization" not in plain
    assert quantised["quantization"] == {
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", "model.layers.1.mlp.down_proj"],
    }


def test_missing_package_is_named_before_anything_is_written(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(place / "fp8", place / "other")
    config = place / "other" / "config.json"
    config.write_text(config.read_text().replace('"fp8"', '"torchao"'))
    monkeypatch.setattr(quantization, "_is_installed", lambda package: False)
    with pytest.raises(InputError, match=r"is quantised by torchao, and transformers needs torchao to load it: pip in"):
        job_for(place, "other-run", model="other")
    assert not (place / "other-run").exists()


@pytest.mark.slow
def test_stages_agree(place: Path, own_ray: None) -> None:
    runs = [job_for(place, f"stages-{stages}", model="fp8") for stages in (1, 2)]
    for stages, job in enumerate(runs, 1):
        run_job(job, stages=stages)
    one, two = (open_run(job.folder)["resid_post_mean"].values for job in runs)
    np.testing.assert_array_equal(one, two)
