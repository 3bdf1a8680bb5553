"""Every intervention does what its formula says, in every family, in one stage or several, and in generation."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from transformers import AutoModel, AutoModelForCausalLM

from personaspace.extract.hooks import LayerHook
from personaspace.extract.stage import Stage
from personaspace.steer.config import Method
from personaspace.steer.interventions import Intervention, layer_hooks, steered
from personaspace.store.errors import InputError
from tests.extract.families import CUTS, LAYERS, SAMPLES, Family, relative_error, samples_batch
from tests.models import FAMILIES, tiny_checkpoint

Change = Callable[[torch.Tensor], torch.Tensor]
HIDDEN = 32
METHODS: tuple[Method, ...] = ("add", "ablate", "mean_ablate", "cap")
VALUES = {"add": 1.5, "ablate": 0.0, "mean_ablate": 0.7, "cap": 0.2}
DIRECTION_D = np.random.default_rng(0).normal(0, 3, HIDDEN).astype(np.float32)


def formula(method: Method, h: Any, value: float) -> Any:
    """In the type of ``h``, which NumPy and torch both have; the direction of a unit vector in float64."""
    unit_D = DIRECTION_D.astype(np.float64) / np.linalg.norm(DIRECTION_D.astype(np.float64))
    v = torch.from_numpy(unit_D).to(h.dtype) if isinstance(h, torch.Tensor) else unit_D
    along = (h * v).sum(-1)[..., None]
    match method:
        case "add":
            return h + value * v
        case "ablate":
            return h - along * v
        case "mean_ablate":
            return h - along * v + value * v
        case "cap":
            below = along - value
            return h - v * (below.clamp(max=0) if isinstance(below, torch.Tensor) else np.minimum(below, 0))


def intervention(method: Method, layer: int = 2, **changes: Any) -> Intervention:
    return Intervention(
        **{"method": method, "layer": layer, "vector_D": DIRECTION_D, "value": VALUES[method], **changes}
    )


def exact(method: Method, layer: int) -> LayerHook:
    """The formula, in float64."""
    return LayerHook(layer=layer, change=lambda h: formula(method, h.double(), VALUES[method]).to(h.dtype))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family.tiny(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("method", METHODS)
@given(
    x_ND=arrays(np.float32, (5, HIDDEN), elements=st.floats(-1e3, 1e3, width=32)),
    value=st.floats(-100, 100),
)
def test_what_the_formula_says(method: Method, x_ND: np.ndarray, value: float) -> None:
    found_ND = intervention(method, value=value)(torch.from_numpy(x_ND)).numpy()
    scale = np.abs(x_ND).max() + abs(value) + 1e-6
    np.testing.assert_allclose(found_ND, formula(method, x_ND.astype(np.float64), value), atol=1e-6 * scale, rtol=0)


def test_every_family_changes_by_the_formula(family: Family) -> None:
    """At each layer to 1e-6, and all that follows as in the unmodified model with the formulas put in by hand."""
    model = AutoModel.from_pretrained(family.checkpoint.source, dtype=torch.float32).eval()
    blocks = model.get_submodule(family.reading.blocks)
    seen: dict[str, torch.Tensor] = {}
    for layer, method in enumerate(METHODS, 1):
        for name, hook in (
            ("before", lambda h: h),
            ("after", intervention(method)),
        ):
            blocks[layer].register_forward_hook(_changing(_noted(seen, f"{name} {method}", hook)))
    with torch.inference_mode():
        model(input_ids=torch.tensor([samples_batch().token_ids[0]]))
    for method in METHODS:
        expected = formula(method, seen[f"before {method}"].double(), VALUES[method])
        assert (seen[f"after {method}"] - expected).norm() <= 1e-6 * expected.norm()
    ours = layer_hooks([intervention(method, layer) for layer, method in enumerate(METHODS, 1)])
    truth = family.truth(hooks=tuple(exact(method, layer) for layer, method in enumerate(METHODS, 1)))
    assert relative_error(family.means(hooks=ours), truth) <= 1e-5


def _noted(seen: dict[str, torch.Tensor], name: str, change: Change) -> Change:
    def note(h_BTD: torch.Tensor) -> torch.Tensor:
        seen[name] = change(h_BTD)
        return seen[name]

    return note


def _changing(change: Change) -> Callable[..., Any]:
    return lambda _, __, output: (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


@pytest.mark.parametrize("positions", ["all", "response"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_stages_agree_bit_for_bit(tmp_path: Path, positions: Any, packed: bool) -> None:
    llama = Family.tiny("llama", tmp_path)
    hooks = layer_hooks([intervention(method, layer, positions=positions) for layer, method in enumerate(METHODS, 1)])
    one = llama.means(packed=packed, hooks=hooks)
    for cut in CUTS[1:]:
        for several, single in zip(llama.means(cut, packed=packed, hooks=hooks), one, strict=True):
            np.testing.assert_array_equal(several, single)


def test_in_a_replay_only_the_response_changes(tmp_path: Path) -> None:
    llama = Family.tiny("llama", tmp_path)
    hooks = layer_hooks([intervention("add", positions="response")])
    with Stage(llama.load(0, LAYERS), layers=[2], hooks=hooks) as stage:
        changed = stage.forward(samples_batch()).pooled()
    plain = llama.means()
    place = llama.reading.sites.index("resid_post")
    for row, sample in enumerate(SAMPLES):
        before_SD, after_SD = plain[row][place, 2], changed[row].means_SD[0, 0]
        for segment, (start, stop) in enumerate(sample.segments):
            inside = max(0, stop - max(start, sample.mean[0])) / (stop - start)
            expected_D = before_SD[segment] + inside * VALUES["add"] * DIRECTION_D / np.linalg.norm(DIRECTION_D)
            np.testing.assert_allclose(after_SD[segment], expected_D, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_a_model_generates_steered_and_is_itself_again(tmp_path: Path, name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint(tmp_path, name), dtype=torch.float32).eval()
    ids = torch.arange(3, 15)[None]
    with torch.inference_mode():
        before = model(ids).logits
        with steered(model, [intervention("add", value=40.0)]):
            assert not torch.allclose(model(ids).logits, before, atol=0.1)
        assert torch.equal(model(ids).logits, before)


def test_generated_positions_are_those_behind_the_prompt(tmp_path: Path) -> None:
    """What is sampled under `response` equals a pass over the whole with the same tokens changed."""
    llama = Family.tiny("llama", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    prompt = list(range(3, 15))
    chosen = intervention("add", value=20.0, positions="response")
    with torch.inference_mode(), steered(model, [chosen]):
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=10, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    whole = out.sequences[0, :-1]

    def change(h_BTD: torch.Tensor) -> torch.Tensor:
        return torch.cat([h_BTD[:, : len(prompt)], chosen(h_BTD[:, len(prompt) :])], dim=1)

    blocks = model.get_submodule(f"model.{llama.reading.blocks}")
    handle = blocks[2].register_forward_hook(_changing(change))
    with torch.inference_mode():
        logits = model(whole[None]).logits[0, len(prompt) - 1 :]
    handle.remove()
    torch.testing.assert_close(torch.cat(out.logits), logits, atol=1e-4, rtol=1e-4)


def test_without_a_cache_nobody_knows_where_the_response_begins(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint(tmp_path), dtype=torch.float32).eval()
    with (
        steered(model, [intervention("add", positions="response")]),
        pytest.raises(InputError, match="without a cache"),
    ):
        model(torch.tensor([[3, 4, 5]]), use_cache=False)


def test_what_changes_nothing_leaves_every_bit(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint(tmp_path), dtype=torch.bfloat16).eval()
    ids = torch.arange(3, 40)[None]
    idle = [intervention("add", value=0.0), *(intervention("cap", layer, value=-1e9) for layer in range(LAYERS))]
    assert len(layer_hooks(idle)) == LAYERS
    with torch.inference_mode():
        before = model(ids).logits
        with steered(model, idle):
            assert torch.equal(model(ids).logits, before)


def test_the_precision_of_the_model_is_kept() -> None:
    h_ND = torch.randn(7, HIDDEN, dtype=torch.bfloat16)
    for method in METHODS:
        found_ND = intervention(method)(h_ND)
        assert found_ND.dtype == torch.bfloat16
        expected = formula(method, h_ND.double(), VALUES[method])
        assert (found_ND.double() - expected).norm() <= 2**-8 * expected.norm()


def test_it_travels_between_processes() -> None:
    sent = intervention("cap")
    sent(torch.zeros(1, HIDDEN))
    came = pickle.loads(pickle.dumps(sent))
    h_ND = torch.randn(4, HIDDEN)
    assert torch.equal(came(h_ND), sent(h_ND))
    assert (came.method, came.layer, came.value, came.positions) == ("cap", 2, 0.2, "all")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vector_D": np.zeros(HIDDEN, dtype=np.float32)}, "the direction has length 0"),
        ({"vector_D": np.full(HIDDEN, np.nan, dtype=np.float32)}, "the direction has length nan"),
        ({"value": float("inf")}, "cap by inf"),
    ],
)
def test_what_points_nowhere_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        intervention("cap", **changes)


def test_a_model_of_another_size_is_refused(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint(tmp_path), dtype=torch.float32)
    with (
        pytest.raises(InputError, match="at layer 6; the model has the layers 0 to 5"),
        steered(model, [intervention("cap", 6)]),
    ):
        pass
    narrow = intervention("cap", vector_D=np.ones(8, dtype=np.float32))
    with pytest.raises(InputError, match="have 8 dimensions, and the model 32"), steered(model, [narrow]):
        pass
