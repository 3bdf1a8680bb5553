"""Compiled blocks: the same numbers up to rounding, for every family, cut and hook; refused where they can't be."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch

from personaspace.extract.config import ModelConfig
from personaspace.extract.engine import Extractor
from personaspace.extract.hooks import LayerHook
from personaspace.extract.selfcheck import check_stage
from personaspace.extract.stage import Stage
from personaspace.store.errors import InputError
from tests.extract.families import CUTS, LAYERS, Family, cosine, relative_error
from tests.models import FAMILIES, tiny_checkpoint

COMPILER = shutil.which("g++") is not None and Path(sysconfig.get_path("include"), "Python.h").is_file()
needs_compiler = pytest.mark.skipif(
    not COMPILER and os.environ.get("PERSONASPACE_REQUIRE_COMPILER") != "1",
    reason="torch.compile needs g++ and Python's headers (PERSONASPACE_REQUIRE_COMPILER=1 runs the tests all the same)",
)
CHECK_COMPILED = """
import sys
from personaspace.extract.checkpoint import resolve
from personaspace.extract.config import ModelConfig
from personaspace.extract.selfcheck import check_stage
from personaspace.extract.slicing import load_slice
from personaspace.extract.stage import Stage

checkpoint = resolve(ModelConfig(id=sys.argv[1]))
with Stage(load_slice(checkpoint, first=0, stop=checkpoint.layers, dtype="float32", compiled=True)) as stage:
    check_stage(stage, packed=False)
"""
HALVING = LayerHook(layer=2, change=lambda h_BTD: 0.5 * h_BTD)


@pytest.fixture(autouse=True)
def forget() -> None:
    """Families share classes, and torch.compile stops at eight variants of one function."""
    torch.compiler.reset()


@needs_compiler
@pytest.mark.parametrize("hooks", [(), (HALVING,)], ids=["plain", "hooked"])
def test_compiled_stages_give_what_a_plain_forward_pass_gives(tmp_path: Path, hooks: tuple[LayerHook, ...]) -> None:
    llama = Family.tiny("llama", tmp_path)
    one = llama.means(compiled=True, hooks=hooks)
    assert relative_error(one, [means[:2] for means in llama.truth(hooks=hooks)]) <= 1e-5
    for several, single in zip(llama.means(CUTS[2], compiled=True, hooks=hooks), one, strict=True):
        np.testing.assert_array_equal(several, single)


OFTEN = {("gemma2", False), ("gemma3_text", True)}


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "packed"),
    [
        pytest.param(*case, marks=() if case in OFTEN else pytest.mark.nightly)
        for case in [*((name, False) for name in FAMILIES), ("llama", True), ("gemma3_text", True)]
    ],
)
def test_every_family_compiles(name: str, packed: bool, tmp_path: Path) -> None:
    family = Family.tiny(name, tmp_path)
    with Stage(family.load(0, LAYERS, compiled=True)) as stage:
        check_stage(stage, packed=packed)
    found = family.means(packed=packed, compiled=True)
    assert relative_error(found, [means[:2] for means in family.truth()]) <= 1e-5


@needs_compiler
@pytest.mark.slow
def test_bfloat16(tmp_path: Path) -> None:
    llama = Family.calm("llama", tmp_path)
    truth = [means[:2] for means in llama.truth(dtype="bfloat16")]
    assert cosine(llama.means(dtype="bfloat16", compiled=True), truth) >= 0.9999


@needs_compiler
def test_extractor(tmp_path: Path) -> None:
    model = ModelConfig(id=str(tiny_checkpoint(tmp_path, "llama", layers=3)), dtype="float32")
    conversations = [
        [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me, " * times}] for times in (1, 9, 4)
    ]
    plain, compiled = (Extractor(model, device="cpu", compiled=c).extract(conversations) for c in (False, True))
    np.testing.assert_allclose(compiled["resid_post_mean"], plain["resid_post_mean"], rtol=1e-4, atol=1e-5)


def test_sites_inside_of_blocks_are_refused(tmp_path: Path) -> None:
    model = Family.tiny("llama", tmp_path).load(0, LAYERS, compiled=True)
    with pytest.raises(InputError, match=r"extract\.compile: .* inside, where mlp_out is\. Leave compile out"):
        Stage(model, sites=["resid_post", "mlp_out"])


def test_a_machine_without_a_compiler_is_told_what_to_do(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model", "llama", layers=2)
    environment = {"PATH": "/nowhere", "CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    ended = subprocess.run(
        [sys.executable, "-c", CHECK_COMPILED, str(checkpoint)],
        cwd=Path(__file__).parents[2],
        env={"HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path), **environment},
        capture_output=True,
        text=True,
    )
    assert "LlamaModel: torch.compile can't make its blocks run" in ended.stderr
    assert "Leave extract.compile out; it takes a C++ compiler on CPUs, and Triton on GPUs." in ended.stderr
