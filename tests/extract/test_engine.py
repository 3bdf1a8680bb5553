"""The library face: conversations in, the means of a plain forward pass out."""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from numpy.typing import NDArray
from transformers import AutoModel

from personaspace.extract import engine
from personaspace.extract.chat import Message
from personaspace.extract.checkpoint import Checkpoint
from personaspace.extract.config import ModelConfig, Site
from personaspace.extract.engine import Extractor
from personaspace.extract.hooks import LayerHook
from personaspace.extract.precision import machine_dtype
from personaspace.extract.spans import Conversation, continue_conversation, locate
from personaspace.store.errors import InputError
from personaspace.store.rollouts import Span

LAYERS = 6
SITES: tuple[Site, ...] = ("resid_post", "resid_pre", "attn_out", "mlp_out")
SYSTEM = {"role": "system", "content": "Be a ghost."}
USER = {"role": "user", "content": "Who are you?"}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


SHORT = [USER, assistant("A ghost.")]
LONG = [SYSTEM, USER, assistant("<think>\nI am old.\n</think>\n\nA ghost who lingers in an old house.")]
TURNS = [USER, assistant("One."), USER, assistant("The sea is wide, the night is long.")]
CONVERSATIONS = [SHORT, LONG, TURNS]


@pytest.fixture(scope="module")
def extractor(llama: Checkpoint) -> Extractor:
    return Extractor(ModelConfig(id=llama.source, dtype="float32"), device="cpu")


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    """Where nothing is dropped, nothing is said."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


class Plain:
    """The truth: the unmodified model, one conversation at a time, read by hooks, averaged in float64."""

    def __init__(self, source: str) -> None:
        self.model = AutoModel.from_pretrained(source, dtype=torch.float32).eval()
        self._seen: dict[tuple[str, int], torch.Tensor] = {}
        for layer, block in enumerate(self.model.layers):
            block.register_forward_pre_hook(lambda _, args, layer=layer: self._keep("resid_pre", layer, args[0]))
            block.register_forward_hook(lambda _, __, out, layer=layer: self._keep("resid_post", layer, out))
            block.self_attn.register_forward_hook(lambda _, __, out, layer=layer: self._keep("attn_out", layer, out[0]))
            block.mlp.register_forward_hook(lambda _, __, out, layer=layer: self._keep("mlp_out", layer, out))

    def _keep(self, site: str, layer: int, states_BTD: torch.Tensor) -> None:
        self._seen[site, layer] = states_BTD[0].double()

    def mean(self, conversation: Conversation, site: str, start: int, stop: int) -> NDArray[np.float64]:
        """``(L, D)`` of tokens ``[start, stop)``."""
        with torch.inference_mode():
            self.model(input_ids=torch.tensor([[*conversation.prompt, *conversation.response]]))
        return np.stack([self._seen[site, layer][start:stop].numpy().mean(0) for layer in range(LAYERS)])


@pytest.fixture(scope="module")
def plain(llama: Checkpoint) -> Plain:
    return Plain(llama.source)


def assert_near(found: Any, expected: Any) -> None:
    error = np.linalg.norm(np.asarray(found) - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert error.max() <= 1e-5


def test_arrays_equal_a_plain_forward_pass(extractor: Extractor, plain: Plain) -> None:
    reductions = ("mean", "last_prompt", "first_3", "turns", "parts")
    found = extractor.extract(CONVERSATIONS, sites=SITES, reductions=reductions)
    located = [locate(extractor.chat, messages) for messages in CONVERSATIONS]
    lengths = [(len(each.prompt), len(each.prompt) + len(each.response)) for each in located]
    for site in SITES:
        for name, segments in {
            "mean": lengths,
            "last_prompt": [(start - 1, start) for start, _ in lengths],
            "first_3": [(start, min(start + 3, stop)) for start, stop in lengths],
        }.items():
            array = found[f"{site}_{name}"]
            assert (array.dims, array.dtype) == (("rollout", "layer", "hidden"), np.float32)
            assert_near(array, np.stack([plain.mean(c, site, *s) for c, s in zip(located, segments, strict=True)]))
        # In each rollout the spans are in the order of the conversation.
        spans = [(row, span) for row, each in enumerate(located) for span in each.spans]
        array = found[f"span_{site}_mean"]
        assert (array.dims, array.dtype) == (("span", "layer", "hidden"), np.float32)
        assert_near(array, np.stack([plain.mean(located[row], site, span.start, span.stop) for row, span in spans]))
    assert set(found.data_vars) == {f"{site}_{name}" for site in SITES for name in reductions[:3]} | {
        f"span_{site}_mean" for site in SITES
    }
    assert found["layer"].values.tolist() == list(range(LAYERS))
    assert found["n_tokens"].values.tolist() == [len(each.response) for each in located]
    assert found["dropped"].values.tolist() == [""] * 3
    assert found["span_rollout"].values.tolist() == [row for row, _ in spans] == [0] * 2 + [1] * 3 + [2] * 4
    assert found["turn"].values.tolist() == [0] * 2 + [0] * 3 + [0, 0, 1, 1]
    assert found["part"].values.tolist() == ["whole", "answer", "whole", "think", "answer"] + ["whole", "answer"] * 2
    assert found["count"].values.tolist() == [span.stop - span.start for _, span in spans]
    assert found.attrs == {"model": extractor.name, "dtype": "float32"}


@pytest.mark.parametrize(
    ("reductions", "parts"),
    [(("turns",), ["whole"] * 4), (("parts",), ["answer", "think", "answer", "answer", "answer"]), (("mean",), None)],
)
def test_spans_are_given_if_they_are_asked_for(
    extractor: Extractor, reductions: tuple[str, ...], parts: list[str] | None
) -> None:
    found = extractor.extract(CONVERSATIONS, reductions=reductions)
    assert ("span" in found.dims) == (parts is not None)
    assert ("resid_post_mean" in found) == (parts is None)
    if parts is not None:
        assert found["part"].values.tolist() == parts


@pytest.mark.parametrize("packing", ["padded", "packed"])
@pytest.mark.parametrize("micro_batch_tokens", [1, 60, 8192])
def test_packing_does_not_matter(extractor: Extractor, packing: Any, micro_batch_tokens: int) -> None:
    expected = extractor.extract(CONVERSATIONS, reductions=("mean", "turns"))
    found = extractor.extract(
        CONVERSATIONS, reductions=("mean", "turns"), packing=packing, micro_batch_tokens=micro_batch_tokens
    )
    for name in expected.data_vars:
        assert_near(found[name], expected[name].values)
    assert found.coords.equals(expected.coords)


def test_many_conversations_are_sorted_by_length_in_windows(
    extractor: Extractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversations = [[USER, assistant("A ghost. " * (1 + number % 5))] for number in range(11)]
    expected = extractor.extract(conversations)
    monkeypatch.setattr(engine, "WINDOW_ROWS", 4)
    assert_near(extractor.extract(conversations)["resid_post_mean"], expected["resid_post_mean"].values)


def test_some_layers(extractor: Extractor) -> None:
    everything = extractor.extract(CONVERSATIONS, sites=SITES)
    found = extractor.extract(CONVERSATIONS, sites=SITES, layers=[3, 1, 1])
    assert found["layer"].values.tolist() == [1, 3]
    xr.testing.assert_identical(found, everything.sel(layer=[1, 3]))


def test_blocks_behind_the_last_layer_are_not_run(extractor: Extractor) -> None:
    ran: list[int] = []
    handles = [
        block.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
        for layer, block in enumerate(extractor._slice.blocks)
    ]
    extractor.extract([SHORT])
    ran.clear()
    extractor.extract([SHORT], layers=[0, 2])
    for handle in handles:
        handle.remove()
    assert ran == [0, 1, 2]


def test_hooks_change_the_stream_for_all_that_follows(extractor: Extractor, plain: Plain) -> None:
    before = extractor.extract(CONVERSATIONS, sites=SITES)
    hook = LayerHook(layer=2, change=lambda h_BTD: 2 * h_BTD + 1)
    steered = extractor.extract(CONVERSATIONS, sites=SITES, hooks=[hook])
    xr.testing.assert_identical(steered.sel(layer=[0, 1]), before.sel(layer=[0, 1]))
    assert_near(steered["resid_post_mean"].sel(layer=2), 2 * before["resid_post_mean"].sel(layer=2).values + 1)
    handle = plain.model.layers[2].register_forward_hook(lambda _, __, output: 2 * output + 1, prepend=True)
    located = [locate(extractor.chat, messages) for messages in CONVERSATIONS]
    expected = [plain.mean(c, "resid_post", len(c.prompt), len(c.prompt) + len(c.response)) for c in located]
    handle.remove()
    assert_near(steered["resid_post_mean"], np.stack(expected))
    # A hook is for one call.
    xr.testing.assert_identical(extractor.extract(CONVERSATIONS, sites=SITES), before)


def test_what_a_hook_raises_passes_through(extractor: Extractor) -> None:
    before = extractor.extract([SHORT])

    def refuse(_: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError("no steering")

    with pytest.raises(ZeroDivisionError, match=r"^no steering$"):
        extractor.extract([SHORT], layers=[0, 1], hooks=[LayerHook(layer=1, change=refuse)])
    xr.testing.assert_identical(extractor.extract([SHORT]), before)


def test_tokens_in_place_of_messages(extractor: Extractor) -> None:
    prompt, response = extractor.chat.encode_prompt([USER]), extractor.chat.encode_text("A ghost.")
    given: Sequence[Any] = [continue_conversation(extractor.chat, [USER], prompt, response), SHORT]
    found = extractor.extract(given, reductions=("mean", "turns"))
    assert_near(found["resid_post_mean"][0], found["resid_post_mean"][1].values)
    assert found["n_tokens"].values.tolist() == [len(response)] * 2
    own = Conversation(prompt=prompt, response=response, spans=[Span(turn=0, part="whole", start=1, stop=4)])
    assert extractor.extract([own], reductions=("turns",))["count"].values.tolist() == [3]


def test_model_by_name_of_its_folder(llama: Checkpoint) -> None:
    named = Extractor(llama.source, device="cpu")
    found = named.extract([SHORT])
    assert found.attrs["dtype"] == machine_dtype("cpu")
    assert found["resid_post_mean"].dtype == np.float32
    with pytest.raises(InputError, match=r"^model\.id: /no/such does not exist; "):
        Extractor("/no/such")
