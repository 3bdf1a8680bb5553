"""What attention and MLP add is found where a reader of the source would find it, or the model is refused."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from personaspace.extract.anatomy import UnsupportedModelError
from personaspace.extract.checkpoint import resolve
from personaspace.extract.config import Dtype, ModelConfig
from personaspace.extract.sites import Addition, find_additions
from personaspace.extract.slicing import load_slice
from personaspace.extract.stage import Stage
from tests.extract.families import READINGS
from tests.extract.others import other_checkpoint
from tests.models import FAMILIES, tiny_checkpoint


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_read_where_a_person_would(tmp_path: Path, family: str, dtype: Dtype) -> None:
    reading = READINGS[family]
    checkpoint = resolve(ModelConfig(id=str(tiny_checkpoint(tmp_path, family, layers=4))))
    for first, stop in [(0, 4), (1, 3)]:
        model = load_slice(checkpoint, first=first, stop=stop, dtype=dtype)
        blocks = {layer: model.blocks[layer] for layer in range(first, stop)}
        with Stage(model, last=False) as stage:
            found = find_additions(blocks, partial(stage.run_decoder, *stage.probe((6,))))
        assert found == {
            (layer, site): Addition(module=block.get_submodule(path), scale=reading.scale)
            for layer, block in blocks.items()
            for site, path in (("attn_out", reading.attention), ("mlp_out", reading.mlp))
        }


class ToyAttention(nn.Linear):
    """As far as a block is concerned, attention is a map of its states."""


class ToyBlock(nn.Module):
    """``add`` says what the block makes of its input, attention and MLP."""

    residual_multiplier: float

    def __init__(self, add: "Add") -> None:
        super().__init__()
        self.attention = ToyAttention(8, 8)
        self.mlp = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.dropout = nn.Dropout(0.5)
        self.extra = nn.Linear(8, 8)
        self.add = add
        self.eval()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.add(self, hidden_states)


Add = Callable[[Any, torch.Tensor], torch.Tensor]


def block_of(add: Add) -> ToyBlock:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ToyBlock(add)


@torch.inference_mode()
def find(block: nn.Module) -> dict[str, tuple[str, float]]:
    """Site -> name of the module found, and its factor. Leaves no hook."""
    h_BTD = torch.randn((1, 5, 8), generator=torch.Generator().manual_seed(0))
    found = find_additions({7: block}, lambda: block(hidden_states=h_BTD))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in block.modules())
    names = {module: name for name, module in block.named_children()}
    return {site: (names[addition.module], addition.scale) for (_, site), addition in found.items()}


def one_after_another(block: Any, h: Any) -> Any:
    h = h + block.attention(h)
    return h + block.mlp(h)


def side_by_side(block: Any, h: Any) -> Any:
    return h + block.attention(h) + block.mlp(h)


def mlp_first(block: Any, h: Any) -> Any:
    h = h + block.mlp(h)
    return h + block.attention(h)


def in_place(block: Any, h: Any) -> Any:
    h = h.clone()
    h += block.attention(h)
    h += block.mlp(h)
    return h


def all_into_attentions_output(block: Any, h: Any) -> Any:
    added, mlp = block.attention(h), block.mlp(block.norm(h))
    added += mlp
    added += h
    return added


def into_the_sublayers_output(block: Any, h: Any) -> Any:
    h = block.attention(h).add_(h)
    return block.mlp(h).add_(h)


def norm_of_the_sum(block: Any, h: Any) -> Any:
    h = h + block.attention(h)
    return h + block.mlp(block.norm(h))


@pytest.mark.parametrize(
    "add", [one_after_another, side_by_side, mlp_first, in_place, all_into_attentions_output, norm_of_the_sum]
)
def test_blocks(add: Add) -> None:
    assert find(block_of(add)) == {"attn_out": ("attention", 1.0), "mlp_out": ("mlp", 1.0)}


def test_what_stands_between_a_sublayer_and_the_addition() -> None:
    block = block_of(lambda b, h: h + b.dropout(b.norm(b.attention(h))) + b.extra(b.mlp(h)))
    assert find(block) == {"attn_out": ("dropout", 1.0), "mlp_out": ("extra", 1.0)}


def test_a_factor_on_both() -> None:
    block = block_of(lambda b, h: h + 0.25 * b.attention(h) + 0.25 * b.mlp(h))
    block.residual_multiplier = 0.25
    assert find(block) == {"attn_out": ("attention", 0.25), "mlp_out": ("mlp", 0.25)}


def nothing_adds_up(attention: str = "attention", block: str = "ToyBlock (layer 7)") -> str:
    return (
        f"{block}: no module's output, added to the block's input together with that of {attention}, gives the block's "
        "output, so attn_out and mlp_out can't be read. Use resid_pre and resid_post."
    )


def not_one(attentions: int, modules: list[str], block: str = "ToyBlock (layer 7)") -> str:
    return (
        f"{block}: {attentions} attention modules, expected one, so attn_out and mlp_out can't be told apart; its "
        f"modules are {modules}. Use resid_pre and resid_post."
    )


@pytest.mark.parametrize(
    ("add", "message"),
    [
        (lambda b, h: h + 0.25 * b.attention(h) + 0.25 * b.mlp(h), nothing_adds_up()),
        (lambda b, h: h + b.attention(h) + b.mlp(h) + b.extra(h), nothing_adds_up()),
        (lambda b, h: h + 1.1 * b.attention(h) + b.mlp(h), nothing_adds_up()),
        (lambda b, h: b.norm(h + b.attention(h) + b.mlp(h)), nothing_adds_up()),
        (lambda b, h: h + b.attention(h), nothing_adds_up()),
        (lambda b, h: h + b.mlp(b.attention(h)), nothing_adds_up("mlp")),
        (into_the_sublayers_output, nothing_adds_up("mlp")),
        (lambda b, h: h + b.mlp(h) + b.norm(h), not_one(0, ["mlp", "norm"])),
        (
            lambda b, h: h + b.attention(h) + b.attention(b.norm(h)) + b.mlp(h),
            not_one(2, ["attention", "norm", "attention", "mlp"]),
        ),
    ],
    ids=[
        "factor",
        "third",
        "uneven",
        "norm of all",
        "no MLP",
        "in a row",
        "in place of attention",
        "no attention",
        "two attentions",
    ],
)
def test_refused(add: Add, message: str) -> None:
    with pytest.raises(UnsupportedModelError) as error:
        find(block_of(add))
    assert str(error.value) == message


def test_no_hook_stays_when_the_probe_fails() -> None:
    def fail(_: ToyBlock, __: torch.Tensor) -> torch.Tensor:
        raise ValueError("no")

    block = block_of(fail)
    with pytest.raises(ValueError, match=r"^no$"):
        find(block)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in block.modules())


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("mamba", not_one(0, ["norm", "mixer"], "MambaBlock (layer 0)")),
        ("llama4_text", nothing_adds_up("self_attn", "Llama4TextDecoderLayer (layer 1)")),
    ],
)
def test_models_whose_sublayers_cannot_be_read(
    tmp_path: Path, model_type: str, message: str, record_property: Callable[[str, object], None]
) -> None:
    model = load_slice(other_checkpoint(tmp_path, model_type), first=0, stop=6, dtype="float32")
    with pytest.raises(UnsupportedModelError) as error:
        Stage(model, sites=["resid_post", "attn_out"])
    record_property("family", model_type)
    record_property("sites_message", str(error.value))
    assert str(error.value) == message


def test_one_dropout_module_for_both_sublayers(tmp_path: Path) -> None:
    model = load_slice(other_checkpoint(tmp_path, "phi"), first=0, stop=6, dtype="float32")
    with Stage(model, sites=("resid_pre", "attn_out", "mlp_out", "resid_post")) as stage:
        pre_LSD, attn_LSD, mlp_LSD, post_LSD = stage.forward(stage.probe((9,))[0]).pooled()[0].sums_SD
    np.testing.assert_allclose(pre_LSD + attn_LSD + mlp_LSD, post_LSD, rtol=1e-4, atol=1e-4)
    assert not np.allclose(attn_LSD, mlp_LSD)
