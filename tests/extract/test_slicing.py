"""A slice holds its own blocks and nothing else, with the checkpoint's weights, or is refused."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel

from personaspace.extract import slicing
from personaspace.extract.anatomy import UnsupportedModelError
from personaspace.extract.checkpoint import Checkpoint, resolve
from personaspace.extract.config import Dtype, ModelConfig
from personaspace.extract.slicing import PassThrough, load_slice
from personaspace.extract.stage import Stage
from personaspace.store.errors import InputError
from tests.models import FAMILIES, tiny_checkpoint

LAYERS = 6
BLOCK = re.compile(r"(?:layers|h)\.(\d+)\.")
NORM = re.compile(r"(?:norm|final_layer_norm|ln_f)\.(?:weight|bias)")


def tiny(folder: Path, family: str) -> Checkpoint:
    return resolve(ModelConfig(id=str(tiny_checkpoint(folder, family, layers=LAYERS))))


def damaged(checkpoint: Checkpoint, folder: Path, *, without: str) -> Checkpoint:
    """A copy without the weights whose names match."""
    shutil.copytree(checkpoint.source, folder)
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not re.fullmatch(without, name)}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return resolve(ModelConfig(id=str(folder)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_slice_holds_its_own_blocks_only(tmp_path: Path, family: str) -> None:
    checkpoint = tiny(tmp_path, family)
    whole = AutoModel.from_pretrained(checkpoint.source, dtype=torch.float32)
    decoder = whole.language_model if family == "gemma3" else whole
    for first, stop in [(0, 2), (2, 5), (5, 6)]:
        expected = {}
        for name, parameter in decoder.named_parameters():
            block = BLOCK.match(name)
            is_embedding = parameter is decoder.get_input_embeddings().weight
            if (
                first <= int(block[1]) < stop
                if block
                else not NORM.fullmatch(name) and (first == 0 or not is_embedding)
            ):
                expected[name] = parameter
        model = load_slice(checkpoint, first=first, stop=stop, dtype="float32")
        held = dict(model.decoder.named_parameters())
        assert held.keys() == expected.keys()
        assert all(torch.equal(parameter, expected[name]) for name, parameter in held.items())
        assert not [name for name, buffer in model.decoder.named_buffers() if buffer.is_meta]
        assert not [name for name in held if re.search("lm_head|embed_out|vision|projector", name)]
        assert [type(block) is PassThrough for block in model.blocks] == [
            not first <= layer < stop for layer in range(LAYERS)
        ]
        assert not model.decoder.training


def test_everything_but_the_blocks_is_of_no_use_to_a_later_stage(tmp_path: Path) -> None:
    """Neither embedding nor norm nor vision tower nor other blocks need even be in the checkpoint."""
    whole = tiny(tmp_path / "gemma3", "gemma3")
    for number, (first, stop, without) in enumerate(
        [
            (0, 6, r"(?!language_model\.model\.(layers|embed_tokens)\.).*"),
            (2, 5, r"(?!language_model\.model\.layers\.[234]\.).*"),
        ]
    ):
        rest = damaged(whole, tmp_path / str(number), without=without)
        with Stage(load_slice(rest, first=first, stop=stop, dtype="float32")) as stage:
            batch, received_BTD = stage.probe((7, 5))
            assert stage.forward(batch, received_BTD).pooled().keys() == {0, 1}


def test_missing_weight_is_refused_by_the_stage_that_needs_it(llama: Checkpoint, tmp_path: Path) -> None:
    broken = damaged(llama, tmp_path / "broken", without=r"model\.layers\.3\.mlp\.down_proj\.weight")
    with pytest.raises(UnsupportedModelError) as error:
        load_slice(broken, first=2, stop=6, dtype="float32")
    assert str(error.value) == (
        f"{broken.source}: 1 weights of layers 2 to 5 are not in the checkpoint (layers.3.mlp.down_proj.weight, ...)."
    )
    load_slice(broken, first=0, stop=3, dtype="float32")


def test_the_message_names_five_missing_weights(llama: Checkpoint, tmp_path: Path) -> None:
    broken = damaged(llama, tmp_path / "broken", without=r"model\.layers\.[12]\.mlp\..*|model\.embed_tokens\.weight")
    with pytest.raises(UnsupportedModelError) as error:
        load_slice(broken, first=0, stop=3, dtype="float32")
    assert str(error.value) == (
        f"{broken.source}: 7 weights of layers 0 to 2 are not in the checkpoint (embed_tokens.weight, "
        "layers.1.mlp.down_proj.weight, layers.1.mlp.gate_proj.weight, layers.1.mlp.up_proj.weight, "
        "layers.2.mlp.down_proj.weight, ...)."
    )


@pytest.mark.parametrize("without", [r"2\.w1", r"2\.w[123]", r"[0-3]\.w2"])
def test_missing_expert_is_refused(tmp_path: Path, without: str) -> None:
    whole = tiny(tmp_path / "mixtral", "mixtral")
    key = rf"model\.layers\.1\.block_sparse_moe\.experts\.{without}\.weight"
    broken = damaged(whole, tmp_path / "broken", without=key)
    with pytest.raises(UnsupportedModelError) as error:
        load_slice(broken, first=0, stop=2, dtype="float32")
    assert re.match(
        re.escape(f"{broken.source}: ")
        + r"(transformers cannot load layers 0 to 1: |1 weights of layers 0 to 1 are not in the checkpoint)",
        str(error.value),
    )
    load_slice(broken, first=2, stop=6, dtype="float32")


def test_weights_of_another_shape_are_refused(llama: Checkpoint, tmp_path: Path) -> None:
    shutil.copytree(llama.source, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    with pytest.raises(UnsupportedModelError) as error:
        load_slice(resolve(ModelConfig(id=str(tmp_path))), first=2, stop=5, dtype="float32")
    assert str(error.value).startswith(f"{tmp_path}: transformers cannot load layers 2 to 4: ")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_have_the_dtype_asked_for(llama: Checkpoint, dtype: Dtype) -> None:
    model = load_slice(llama, first=1, stop=2, dtype=dtype)
    assert model.dtype == getattr(torch, dtype)
    assert {parameter.dtype for parameter in model.decoder.parameters()} == {model.dtype}
    assert (model.first, model.stop, model.hidden, model.device) == (1, 2, llama.hidden, torch.device("cpu"))


def test_attention_kernels(llama: Checkpoint) -> None:
    chosen = load_slice(llama, first=0, stop=1, dtype="float32", attention="eager")
    assert chosen.decoder.config._attn_implementation == "eager"
    default = load_slice(llama, first=0, stop=1, dtype="float32")
    assert default.decoder.config._attn_implementation == "sdpa"


@pytest.mark.skipif(torch.cuda.is_available(), reason="flash attention may be installed here")
def test_attention_kernels_that_are_not_there(llama: Checkpoint) -> None:
    with pytest.raises(UnsupportedModelError) as error:
        load_slice(llama, first=0, stop=6, dtype="float32", attention="flash_attention_2")
    assert str(error.value).startswith(
        f"{llama.source}: transformers cannot load layers 0 to 5: FlashAttention2 has been toggled on"
    )


def test_pass_through() -> None:
    block: Any = nn.Linear(2, 2)
    states = torch.ones(1, 2)
    passed = PassThrough(block)(states, 1, use_cache=False)
    assert torch.equal(passed, states)
    assert passed.data_ptr() == states.data_ptr()
    assert not hasattr(PassThrough(block), "attention_type")
    block.attention_type = "sliding_attention"
    assert PassThrough(block).attention_type == "sliding_attention"
    assert list(PassThrough(block).parameters()) == []


def test_a_transformers_that_is_too_old_reads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slicing.transformers, "__version__", "5.19.0")
    with pytest.raises(InputError) as error:
        load_slice(tiny(tmp_path, "llama"), first=0, stop=2, dtype="float32")
    assert str(error.value) == (
        "transformers: 5.19.0 is for generation only (vLLM asks for it); reading activations takes 5.20 or newer. Run "
        "`personaspace extract` in an environment that has it."
    )
