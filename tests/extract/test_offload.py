"""A model whose blocks wait on disk gives what it gives in memory, and takes no more memory than a block."""

import gc
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from personaspace.extract.anatomy import UnsupportedModelError
from personaspace.extract.chat import ChatFormat
from personaspace.extract.checkpoint import Checkpoint, resolve
from personaspace.extract.config import Dtype, GenerateConfig, ModelConfig
from personaspace.extract.generate.transformers_engine import TransformersEngine, load_causal_lm
from personaspace.extract.offload import Offload, load_causal_lm_offloaded, load_offloaded
from personaspace.extract.selfcheck import check_stage
from personaspace.extract.slicing import PassThrough, Slice, load_slice
from personaspace.extract.stage import Stage
from personaspace.store.errors import InputError
from tests.extract.families import LAYERS, SITES, samples_batch
from tests.extract.quantised import fp8
from tests.extract.test_slicing import damaged, tiny
from tests.models import FAMILIES, tiny_checkpoint

REWRITTEN = ("qwen3_moe", "mixtral", "deepseek_v3")
"""Their checkpoints keep each expert by itself, the model all of them in one tensor."""
DISK = Offload(to="disk")


def sums(model: Slice) -> np.ndarray:
    with Stage(model, sites=SITES) as stage:
        check_stage(stage, packed=False)
        pooled = stage.forward(samples_batch()).pooled()
    return np.concatenate([rows.sums_SD for rows in pooled.values()], axis=2)


def on_disk(model: Slice) -> list[bool]:
    return [any(weight.is_meta for weight in block.parameters()) for block in model.blocks]


@pytest.mark.parametrize("family", FAMILIES)
def test_same_bits_as_in_memory(tmp_path: Path, family: str) -> None:
    checkpoint, folder = tiny(tmp_path / "model", family), tmp_path / "offload"
    rewritten = family in REWRITTEN
    model = load_offloaded(checkpoint, Offload(to="disk", folder=folder) if rewritten else DISK, dtype="float32")
    assert on_disk(model) == [True] * LAYERS
    assert folder.exists() == rewritten
    np.testing.assert_array_equal(sums(model), sums(load_slice(checkpoint, first=0, stop=LAYERS, dtype="float32")))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_cast_as_they_are_read(llama: Checkpoint, dtype: Dtype) -> None:
    model = load_offloaded(llama, DISK, dtype=dtype)
    assert model.dtype == getattr(torch, dtype)
    np.testing.assert_array_equal(sums(model), sums(load_slice(llama, first=0, stop=LAYERS, dtype=dtype)))


def test_weights_that_are_written_anew_go_with_the_model(tmp_path: Path) -> None:
    checkpoint, folder = tiny(tmp_path / "model", "mixtral"), tmp_path / "offload"
    with pytest.raises(InputError) as error:
        load_offloaded(checkpoint, DISK, dtype="float32")
    assert str(error.value) == (
        f"{checkpoint.source}: a mixtral checkpoint stores weights otherwise than the model holds them, so they can't "
        "be read from it one by one. Set cluster.offload_folder to a folder with room for another copy of the weights, "
        "or run the model with pipeline stages."
    )
    models = [load_offloaded(checkpoint, Offload(to="disk", folder=folder), dtype="float32") for _ in range(2)]
    (one, other) = sorted(path for path in folder.iterdir())
    experts = {
        f"layers.{layer}.mlp.experts.{name}.safetensors"
        for layer in range(LAYERS)
        for name in ("gate_up_proj", "down_proj")
    }
    assert {file.name for file in one.iterdir()} == {file.name for file in other.iterdir()} == experts
    del models
    gc.collect()
    assert list(folder.iterdir()) == []


def test_blocks_that_fit_stay_on_the_device(llama: Checkpoint) -> None:
    block = sum(p.numel() for p in load_slice(llama, first=0, stop=1, dtype="float32").blocks[0].parameters()) * 4
    for keep, kept in [(0, 0), (block - 1, 0), (2 * block, 2), (2 * block + 1, 2), (100 * block, LAYERS)]:
        model = load_offloaded(llama, Offload(to="disk", keep=keep), dtype="float32")
        assert on_disk(model) == [layer >= kept for layer in range(LAYERS)]


def test_blocks_behind_the_last_layer_are_not_loaded(llama: Checkpoint, tmp_path: Path) -> None:
    broken = damaged(llama, tmp_path / "broken", without=r"model\.layers\.[45]\..*|model\.norm\.weight|lm_head\.weight")
    model = load_offloaded(broken, DISK, dtype="float32", stop=4)
    assert [isinstance(block, PassThrough) for block in model.blocks] == [False] * 4 + [True] * 2
    np.testing.assert_array_equal(sums(model), sums(load_slice(llama, first=0, stop=4, dtype="float32")))


def test_missing_weight_is_refused(llama: Checkpoint, tmp_path: Path) -> None:
    broken = damaged(llama, tmp_path / "broken", without=r"model\.layers\.3\.mlp\.down_proj\.weight")
    with pytest.raises(UnsupportedModelError) as error:
        load_offloaded(broken, DISK, dtype="float32")
    assert str(error.value) == (
        f"{broken.source}: 1 weights of layers 0 to 5 are not in the checkpoint (layers.3.mlp.down_proj.weight, ...)."
    )


def test_nothing_to_offload_from(llama: Checkpoint) -> None:
    with pytest.raises(InputError) as error:
        load_offloaded(llama, Offload(to="cpu"), dtype="float32")
    assert str(error.value) == (
        "cluster.offload_to: cpu, but the model runs on the CPU already, so nothing would be offloaded. Set it to "
        "`disk`, or cluster.sharding to `pipeline`."
    )


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    checkpoint = fp8(tmp_path)
    with pytest.raises(InputError) as error:
        load_offloaded(checkpoint, DISK, dtype="float32")
    assert str(error.value) == (
        f"model.id: {checkpoint.source} is quantised by fp8; such weights can't be used with cluster.sharding: "
        "offload. Set it to `pipeline`."
    )


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_same_text_as_in_memory(tmp_path: Path, family: str) -> None:
    config = ModelConfig(id=str(tiny_checkpoint(tmp_path / "model", family)))
    checkpoint = resolve(config)
    chat = ChatFormat(checkpoint, config)
    prompts = [
        chat.encode_prompt([{"role": "user", "content": text}]) for text in ("Who are you?", "Tell me of the sea.")
    ]
    offload = Offload(to="disk", folder=tmp_path / "offload")
    texts = [
        TransformersEngine(model, chat).generate(prompts, [1, 2], GenerateConfig(max_new_tokens=24))
        for model in (
            load_causal_lm_offloaded(checkpoint, offload, dtype="float32"),
            load_causal_lm(checkpoint, dtype="float32"),
        )
    ]
    assert texts[0] == texts[1]
    assert len(texts[0][0].token_ids) > 1


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_memory_is_that_of_a_block(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, layers=12, hidden=1024)
    command = [sys.executable, "-m", "tests.extract.offload_memory", str(folder)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    grown = {name: int(number) for name, number in json.loads(ran.stdout.splitlines()[-1]).items()}
    # The same measurement sees the whole model where it is in memory.
    assert grown["weights"] > 400 * 2**20
    assert grown["in memory"] > 0.8 * grown["weights"]
    assert grown["on disk"] < 0.25 * grown["weights"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "offload", [Offload(to="cpu", keep=0), Offload(to="cpu", keep=40_000), Offload(to="disk", keep=0)]
)
def test_same_bits_as_on_the_gpu(llama: Checkpoint, offload: Offload) -> None:
    model = load_offloaded(llama, offload, dtype="float32", device="cuda")
    whole = load_slice(llama, first=0, stop=LAYERS, dtype="float32", device="cuda")
    np.testing.assert_array_equal(sums(model), sums(whole))
