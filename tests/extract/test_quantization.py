"""Quantised checkpoints: a slice computes what transformers' own whole model computes, or is refused by name."""

import importlib.util
import json
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from personaspace.extract import quantization
from personaspace.extract.anatomy import UnsupportedModelError
from personaspace.extract.checkpoint import Checkpoint, resolve
from personaspace.extract.config import ModelConfig
from personaspace.extract.quantization import check_packages
from personaspace.extract.selfcheck import check_stage
from personaspace.extract.slicing import load_slice
from personaspace.extract.stage import Stage
from personaspace.store.errors import InputError
from tests.extract import quantised
from tests.extract.families import samples_batch
from tests.extract.test_weights import one_file_each, split
from tests.models import tiny_checkpoint

LAYERS = 6


def needs(package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"NOT TESTED: {package} is not installed (pip install {package})")


METHODS = [
    pytest.param(quantised.fp8, id="fp8"),
    pytest.param(quantised.mxfp4, id="mxfp4"),
    pytest.param(quantised.int8_compressed, id="compressed-tensors", marks=needs("compressed_tensors")),
    pytest.param(partial(quantised.bitsandbytes, bits=4), id="bitsandbytes-4", marks=needs("bitsandbytes")),
    pytest.param(partial(quantised.bitsandbytes, bits=8), id="bitsandbytes-8", marks=needs("bitsandbytes")),
    pytest.param(quantised.torchao, id="torchao", marks=needs("torchao")),
]


def staged(checkpoint: Checkpoint, cuts: Sequence[int]) -> NDArray[np.float32]:
    """Sums of `resid_post` of the samples' first segments, (layers, rollouts, hidden), through a chain of stages."""
    batch, received, found = samples_batch(), None, []
    for first, stop in pairwise(cuts):
        model = load_slice(checkpoint, first=first, stop=stop, dtype="float32")
        with Stage(model, last=stop == LAYERS) as stage:
            output = stage.forward(batch, received)
            received = output.hidden_BTD
            pooled = output.pooled()
            found.append(np.stack([pooled[row].sums_SD[0, :, 0] for row in batch.rows], axis=1))
    return np.concatenate(found)


def whole(checkpoint: Checkpoint) -> NDArray[np.float32]:
    """The same from transformers' own whole model, over the same micro-batch: quantised activations depend on it."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint.source, dtype=torch.float32, device_map="cpu").eval()
    seen: list[torch.Tensor] = []
    for block in model.model.layers:
        block.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
    batch = samples_batch()
    ids_BT = torch.zeros(batch.shape, dtype=torch.long)
    for row, ids in zip(batch.rows, batch.token_ids, strict=True):
        ids_BT[row, : len(ids)] = torch.tensor(ids)
    with torch.inference_mode():
        model(input_ids=ids_BT, use_cache=False)
    spans = [batch.segments[row][0] for row in batch.rows]
    return np.stack([[states_BTD[row, a:b].sum(0).numpy() for row, (a, b) in enumerate(spans)] for states_BTD in seen])


@pytest.mark.parametrize("make", METHODS)
def test_stages_give_what_the_whole_model_gives(make: Callable[[Path], Checkpoint], tmp_path: Path) -> None:
    checkpoint = make(tmp_path / "model")
    assert checkpoint.quantization is not None
    expected = whole(checkpoint)
    family = json.loads((Path(checkpoint.source) / "config.json").read_text())["model_type"]
    plain = staged(
        resolve(ModelConfig(id=str(tiny_checkpoint(tmp_path / "plain", family, hidden=checkpoint.hidden)))), (0, LAYERS)
    )
    for cuts in [(0, LAYERS), (0, 2, LAYERS)]:
        got = staged(checkpoint, cuts)
        assert np.linalg.norm(got - expected) <= 1e-5 * np.linalg.norm(expected)
        # The weights are those of the quantised file, not what they were made from.
        assert np.linalg.norm(got - plain) > 1e-3 * np.linalg.norm(plain)


@pytest.mark.parametrize("make", [METHODS[0], METHODS[1]])
def test_quantised_tensors_in_many_files(make: Callable[[Path], Checkpoint], tmp_path: Path) -> None:
    """Names with scales and blocks find their module: a stage runs without the files of the other stage."""
    one = make(tmp_path / "one")
    many = split(Path(one.source), tmp_path / "many", one_file_each)
    assert many.quantization == one.quantization
    for file in (tmp_path / "many").glob("*layers.[01].*.safetensors"):
        file.unlink()
    with Stage(load_slice(one, first=2, stop=6, dtype="float32")) as stage:
        batch, received = stage.probe((9, 5))
        expected = stage.forward(batch, received).pooled()
    with Stage(load_slice(many, first=2, stop=6, dtype="float32")) as stage:
        got = stage.forward(batch, received).pooled()
    assert all(np.array_equal(got[row].sums_SD, expected[row].sums_SD) for row in batch.rows)


@needs("bitsandbytes")
def test_columns_chosen_from_the_whole_micro_batch_are_refused(tmp_path: Path) -> None:
    """LLM.int8 as it is by default lets neighbours change a rollout; the stage's self-check sees it."""
    checkpoint = quantised.bitsandbytes(tmp_path, bits=8, threshold=6.0)
    with (
        Stage(load_slice(checkpoint, first=2, stop=6, dtype="float32")) as stage,
        pytest.raises(UnsupportedModelError, match=r"a rollout's states differ by \d+\.\d%"),
    ):
        check_stage(stage, packed=False)
    safe = quantised.bitsandbytes(tmp_path / "safe", bits=8)
    with Stage(load_slice(safe, first=2, stop=6, dtype="float32")) as stage:
        check_stage(stage, packed=False)


def configured(folder: Path, content: object) -> ModelConfig:
    tiny_checkpoint(folder, layers=1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": content}))
    return ModelConfig(id=str(folder))


def test_plain_weights(llama: Checkpoint) -> None:
    assert llama.quantization is None
    check_packages(llama.source, None)


def test_method_that_transformers_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        resolve(configured(tmp_path, {"quant_method": "squeeze", "bits": 3}))
    assert str(error.value) == (
        f"model.id: {tmp_path} is quantised by squeeze, which this version of transformers does not know. "
        "Use a checkpoint that is not quantised, or another version."
    )


def test_config_without_a_method(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="its quantization_config can't be used: The model's quantization config"):
        resolve(configured(tmp_path, {"bits": 3}))


@pytest.mark.parametrize(
    ("content", "method", "packages"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq", ["optimum", "gptqmodel"]),
        ({"quant_method": "awq", "bits": 4}, "awq", ["gptqmodel"]),
        ({"load_in_8bit": True}, "bitsandbytes", ["bitsandbytes"]),
    ],
)
def test_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: object, method: str, packages: list[str]
) -> None:
    monkeypatch.setattr(quantization, "_is_installed", lambda package: False)
    checkpoint = resolve(configured(tmp_path, content))
    with pytest.raises(InputError) as error:
        load_slice(checkpoint, first=0, stop=1, dtype="float32")
    assert str(error.value) == (
        f"model.id: {tmp_path} is quantised by {method}, and transformers needs {' and '.join(packages)} to load it: "
        f"pip install {' '.join(packages)}"
    )


def test_packages_are_known_by_the_names_that_pip_knows() -> None:
    assert quantization._is_installed("transformers")
    assert not quantization._is_installed("no-such-package")
