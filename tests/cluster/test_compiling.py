"""A run with compiled blocks: another identity, the same numbers up to rounding."""

from pathlib import Path

import numpy as np
import pytest

from personaspace.store import open_run
from personaspace.store.errors import IdentityError, InputError
from tests.cluster.small_jobs import job_for, make_place, run_job, talk
from tests.extract.test_compiling import needs_compiler

CONVERSATIONS = {
    "default": [talk("Who are you?", "An assistant."), talk("Why?", "It is so, and always was.")],
    "ghost": [talk("Who?", "Boo."), talk("Speak.", "so it goes, " * 9)],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("compiling"), CONVERSATIONS)


@needs_compiler
@pytest.mark.nightly
def test_a_compiled_run_in_two_stages(place: Path, own_ray: None) -> None:
    plain, compiled = job_for(place, "plain"), job_for(place, "compiled", compile=True)
    run_job(plain)
    run_job(compiled, stages=2)
    expected, found = (open_run(job.folder)["resid_post_mean"].values for job in (plain, compiled))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(IdentityError, match=r"extract\.compiled"):
        job_for(place, "compiled")


def test_sites_inside_of_blocks_are_refused_before_anything_is_written(place: Path) -> None:
    with pytest.raises(InputError, match=r"extract\.compile: .* inside, where attn_out is\."):
        job_for(place, "inside", compile=True, sites=("resid_post", "attn_out"))
    assert not (place / "inside").exists()
