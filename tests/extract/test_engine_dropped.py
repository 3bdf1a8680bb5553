"""The library face: whatever cannot be averaged is NaN with a reason, and settings out of range are refused."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from personaspace.extract.chat import Message
from personaspace.extract.checkpoint import Checkpoint
from personaspace.extract.config import ModelConfig, Site
from personaspace.extract.engine import Extractor
from personaspace.extract.hooks import LayerHook
from personaspace.extract.spans import Conversation
from personaspace.store.errors import InputError
from personaspace.store.rollouts import Span

LAYERS = 6
SITES: tuple[Site, ...] = ("resid_post", "resid_pre", "attn_out", "mlp_out")
USER = {"role": "user", "content": "Who are you?"}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


SHORT = [USER, assistant("A ghost.")]
TURNS = [USER, assistant("One."), USER, assistant("The sea is wide, the night is long.")]
EMPTY = [USER, assistant("")]
BLANK = [USER, assistant(" \n")]


@pytest.fixture(scope="module")
def extractor(llama: Checkpoint) -> Extractor:
    return Extractor(ModelConfig(id=llama.source, dtype="float32"), device="cpu")


def test_dropped_conversations_are_nan_with_a_reason_and_one_warning(extractor: Extractor) -> None:
    refused = [{"role": "tool", "content": "x"}, assistant("A ghost.")]
    unanswered = [USER]
    long = [USER, assistant("A ghost. " * 200)]
    given: Sequence[Any] = [EMPTY, SHORT, BLANK, refused, long, TURNS, EMPTY, unanswered]
    total = len(extractor.chat.encode_prompt([USER])) + len(extractor.chat.encode_text("A ghost. " * 200))
    reasons = [
        "the response is empty",
        "",
        "the response is only white space",
        "message 0 has the role 'tool'; allowed are system, user, assistant",
        f"{total} tokens exceed the model's context of 256",
        "",
        "the response is empty",
        "the conversation does not end with an assistant turn",
    ]
    with pytest.warns(UserWarning, match=r"^6 of 8 conversations dropped: ") as caught:
        found = extractor.extract(given, reductions=("mean", "turns"))
    (warning,) = caught
    assert str(warning.message) == (
        f"6 of 8 conversations dropped: 2 x {reasons[0]}, 1 x {reasons[2]}, 1 x {reasons[3]}, 1 x {reasons[4]}, "
        f"1 x {reasons[7]}"
    )
    assert warning.filename == __file__
    assert found["dropped"].values.tolist() == reasons
    kept = np.array([not reason for reason in reasons])
    assert np.isnan(found["resid_post_mean"].values).all(axis=(1, 2)).tolist() == (~kept).tolist()
    assert (found["n_tokens"].values > 0).tolist() == kept.tolist()
    assert found["span_rollout"].values.tolist() == [1, 5, 5]
    alone = extractor.extract([SHORT, TURNS], reductions=("mean", "turns"))
    np.testing.assert_allclose(found["resid_post_mean"][kept], alone["resid_post_mean"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["span_resid_post_mean"], alone["span_resid_post_mean"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (
            Conversation(prompt=[], response=[5], spans=[Span(turn=0, part="whole", start=0, stop=1)]),
            "no prompt before the response",
        ),
        (Conversation(prompt=[5], response=[], spans=[]), "the response is empty"),
        (Conversation(prompt=[5], response=[6, 7], spans=[]), "no span holds a whole assistant turn"),
        (
            Conversation(prompt=[5], response=[6, 7], spans=[Span(turn=0, part="answer", start=1, stop=3)]),
            "no span holds a whole assistant turn",
        ),
    ],
)
def test_tokens_that_cannot_be_averaged(extractor: Extractor, given: Conversation, reason: str) -> None:
    with pytest.warns(UserWarning, match=f"^1 of 1 conversations dropped: 1 x {reason}$"):
        found = extractor.extract([given])
    assert found["dropped"].values.tolist() == [reason]


def test_all_dropped_and_none_given(extractor: Extractor) -> None:
    names = ("mean", "last_prompt", "turns", "parts")
    with pytest.warns(UserWarning, match=r"^2 of 2 conversations dropped: 2 x the response is empty$"):
        dropped = extractor.extract([EMPTY, EMPTY], sites=SITES, reductions=names)
    nothing = extractor.extract([], sites=SITES, reductions=names)
    assert (dict(dropped.sizes), dict(nothing.sizes)) == (
        {"rollout": 2, "layer": LAYERS, "hidden": 32, "span": 0},
        {"rollout": 0, "layer": LAYERS, "hidden": 32, "span": 0},
    )
    assert dropped["resid_pre_last_prompt"].isnull().all()
    for name in dropped.variables:
        assert nothing[name].dtype == dropped[name].dtype, name


@pytest.fixture
def poisoned(llama: Checkpoint, tmp_path: Path) -> Extractor:
    """Its third block gives nothing that is finite."""
    folder = tmp_path / "poisoned"
    shutil.copytree(llama.source, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"].fill_(float("nan"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return Extractor(ModelConfig(id=str(folder), dtype="float32"), device="cpu")


def test_activations_that_are_not_finite(poisoned: Extractor, extractor: Extractor) -> None:
    reasons = r"2 x non-finite activations, 1 x the response is empty"
    with pytest.warns(UserWarning, match=f"^3 of 3 conversations dropped: {reasons}$"):
        found = poisoned.extract([SHORT, EMPTY, TURNS], reductions=("mean", "turns"))
    assert found["dropped"].values.tolist() == [
        "non-finite activations",
        "the response is empty",
        "non-finite activations",
    ]
    assert found["resid_post_mean"].isnull().all()
    assert found.sizes["span"] == 0
    # What comes before is sound.
    sound = poisoned.extract([SHORT, TURNS], layers=[0, 1])["resid_post_mean"]
    np.testing.assert_array_equal(sound, extractor.extract([SHORT, TURNS], layers=[0, 1])["resid_post_mean"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": [6]}, "layers: [6]; give some of the layers 0 to 5."),
        ({"layers": [-1, 2]}, "layers: [-1, 2]; give some of the layers 0 to 5."),
        ({"layers": []}, "layers: []; give some of the layers 0 to 5."),
        ({"hooks": [LayerHook(layer=6, change=abs)]}, "hooks: layer 6; the layers 0 to 5 are run."),
        ({"layers": [1], "hooks": [LayerHook(layer=2, change=abs)]}, "hooks: layer 2; the layers 0 to 1 are run."),
        ({"sites": ()}, "extract.sites: []; give at least one, and each once."),
        ({"sites": ("logits",)}, "extract.sites: 'logits'; allowed are resid_post, resid_pre, attn_out, mlp_out."),
        ({"reductions": ("mean", "mean")}, "extract.reductions: ['mean', 'mean']; give at least one, and each once."),
    ],
)
def test_settings_out_of_range(extractor: Extractor, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        extractor.extract([SHORT], **settings)
    assert str(error.value) == message
