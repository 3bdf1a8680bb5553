"""A chain of stages gives what one plain forward pass per rollout gives: every family, cut, site and reduction."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from personaspace.extract.anatomy import UnsupportedModelError
from personaspace.extract.checkpoint import Checkpoint
from personaspace.extract.config import Site
from personaspace.extract.hooks import LayerHook
from personaspace.extract.packing import MicroBatch
from personaspace.extract.selfcheck import check_stage
from personaspace.extract.slicing import Slice, load_slice
from personaspace.extract.stage import Stage
from tests.extract.families import CUTS, LAYERS, SITES, Family, cosine, relative_error, samples_batch
from tests.extract.others import other_checkpoint
from tests.models import FAMILIES

CUT_IDS = ["1-stage", "2-stages", "3-stages"]
PACKING = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
Record = Callable[[str, object], None]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family.tiny(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module", params=FAMILIES)
def calm_family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family.calm(request.param, tmp_path_factory.mktemp(request.param))


def record(record_property: Record, family: Family, **figures: float | str) -> None:
    """For benchmarks/families.py, which makes docs/models.md of it."""
    decoder = family.load(*CUTS[0]).decoder
    record_property("family", family.name)
    record_property("class", type(decoder).__name__)
    record_property("attention", decoder.config._attn_implementation)
    record_property("note", family.reading.note)
    for name, figure in figures.items():
        record_property(name, figure)


@pytest.mark.parametrize("cut", CUTS, ids=CUT_IDS)
@PACKING
def test_means_equal_a_plain_forward_pass(
    family: Family, cut: tuple[int, ...], packed: bool, record_property: Record
) -> None:
    if packed and family.reading.unpackable:
        with Stage(family.load(*CUTS[0])) as stage, pytest.raises(UnsupportedModelError) as refused:
            check_stage(stage, packed=True)
        record(record_property, family, packed_refused=family.reading.unpackable, packed_message=str(refused.value))
        return
    error = relative_error(family.means(cut, packed=packed), family.truth())
    record(record_property, family, **{"packed_error" if packed else "padded_error": error})
    assert error <= 1e-5


@pytest.mark.parametrize("cut", CUTS[1:], ids=CUT_IDS[1:])
@PACKING
def test_stages_are_bit_identical_to_one(family: Family, cut: tuple[int, ...], packed: bool) -> None:
    for several, one in zip(family.means(cut, packed=packed), family.means(packed=packed), strict=True):
        np.testing.assert_array_equal(several, one)


@PACKING
def test_bfloat16(calm_family: Family, packed: bool, record_property: Record) -> None:
    """Against float32 with the weights that bfloat16 leaves."""
    if packed and calm_family.reading.unpackable:
        return
    one = calm_family.means(packed=packed, dtype="bfloat16")
    found = cosine(one, calm_family.truth(dtype="bfloat16"))
    record(record_property, calm_family, bfloat16_cosine=found)
    assert found >= 0.9999
    for a, b in zip(calm_family.means(CUTS[2], packed=packed, dtype="bfloat16"), one, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("model_type", ["mamba", "llama4_text", "gptj"])
def test_what_can_be_read_of_others(tmp_path: Path, model_type: str, record_property: Record) -> None:
    other = Family(model_type, other_checkpoint(tmp_path, model_type))
    for packed in [False] if other.reading.unpackable else [False, True]:
        error = max(relative_error(other.means(cut, packed=packed), other.truth()) for cut in CUTS)
        assert error <= 1e-5
        record(record_property, other, **{"packed_error" if packed else "padded_error": error})


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A llama of this file's own."""
    return Family.tiny("llama", tmp_path_factory.mktemp("plain"))


@pytest.fixture
def model(plain: Family) -> Iterator[Slice]:
    """The whole llama; no test may leave anything in it."""
    loaded: Slice = plain.load(0, LAYERS)
    before = traces(loaded)
    yield loaded
    assert traces(loaded) == before


def traces(model: Slice) -> tuple[list[nn.Module], int]:
    """What a stage could leave behind: the blocks that are in place, and how many hooks there are."""
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.decoder.modules())
    return list(model.blocks), hooks


def pooled(stage: Stage, batch: MicroBatch) -> list[np.ndarray]:
    return [rows.means_SD for rows in stage.forward(batch).pooled().values()]


def assert_equal(got: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def steer(layer: int) -> LayerHook:
    return LayerHook(layer=layer, change=lambda h_BTD: 0.5 * h_BTD + torch.linspace(-1, 1, h_BTD.shape[-1]))


@pytest.mark.parametrize("cut", CUTS, ids=CUT_IDS)
@PACKING
def test_layer_hooks_change_what_follows(plain: Family, cut: tuple[int, ...], packed: bool) -> None:
    hooks = (steer(1), steer(3))
    got = plain.means(cut, packed=packed, hooks=hooks)
    assert relative_error(got, plain.truth(hooks=hooks)) <= 1e-5
    change = [np.abs(a - b).max(axis=(0, 2, 3)) for a, b in zip(got, plain.means(packed=packed), strict=True)]
    assert all(layers[0] == 0 and (layers[1:] > 0.1).all() for layers in change)


def test_blocks_that_return_tuples(tmp_path: Path) -> None:
    family = Family("gptj", other_checkpoint(tmp_path, "gptj"))
    assert relative_error(family.means(), family.truth()) <= 1e-5
    hooks = (steer(2),)
    assert relative_error(family.means(hooks=hooks), family.truth(hooks=hooks)) <= 1e-5


def test_two_hooks_of_a_layer_run_in_their_order(model: Slice) -> None:
    def saying(what: str) -> LayerHook:
        def change(h_BTD: torch.Tensor) -> torch.Tensor:
            said.append(what)
            return h_BTD

        return LayerHook(layer=2, change=change)

    said: list[str] = []
    with Stage(model, hooks=[saying("first"), saying("second")]) as stage:
        stage.forward(samples_batch())
    assert said == ["first", "second"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyError("no"), RuntimeError("no"), KeyboardInterrupt()])
def test_a_hooks_exception_passes_through_and_the_stage_goes_on(plain: Family, error: BaseException) -> None:
    def change(h_BTD: torch.Tensor) -> torch.Tensor:
        if angry:
            raise error
        return h_BTD

    with Stage(plain.load(0, LAYERS), sites=SITES, hooks=[LayerHook(layer=3, change=change)]) as stage:
        angry = True
        with pytest.raises(type(error)) as raised:
            stage.forward(samples_batch())
        assert raised.value is error
        angry = False
        assert_equal(pooled(stage, samples_batch()), plain.means())


def test_closing_leaves_the_model_as_it_was(plain: Family, model: Slice) -> None:
    before = traces(model)
    with Stage(model, stop=3, sites=SITES, hooks=[steer(1)]) as stage:
        stage.forward(samples_batch())
        assert traces(model) != before
    assert traces(model) == before
    with Stage(model, sites=SITES) as stage:
        assert_equal(pooled(stage, samples_batch()), plain.means())


def test_a_stage_that_cannot_be_made_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    mamba = load_slice(other_checkpoint(tmp_path, "mamba"), first=0, stop=LAYERS, dtype="float32")
    before = traces(mamba)
    with pytest.raises(UnsupportedModelError):
        Stage(mamba, stop=4, sites=["resid_post", "attn_out"])
    assert traces(mamba) == before


def test_later_blocks_are_not_run(plain: Family, model: Slice) -> None:
    calls = dict.fromkeys(range(LAYERS), 0)

    def count(layer: int) -> Callable[..., None]:
        def hook(*_: object) -> None:
            calls[layer] += 1

        return hook

    handles = [block.register_forward_hook(count(layer)) for layer, block in enumerate(model.blocks)]
    with Stage(model, stop=4) as stage:
        got = pooled(stage, samples_batch())
    for handle in handles:
        handle.remove()
    assert calls == {0: 1, 1: 1, 2: 1, 3: 1, 4: 0, 5: 0}
    assert_equal(got, [means[:1, :4] for means in plain.means()])


@pytest.mark.parametrize("layers", [(0,), (1, 4), (2, 3, 5)])
def test_some_layers(plain: Family, model: Slice, layers: tuple[int, ...]) -> None:
    with Stage(model, sites=SITES, layers=layers) as stage:
        assert_equal(pooled(stage, samples_batch()), [means[:, layers] for means in plain.means()])


@pytest.mark.parametrize("site", SITES)
def test_sites_together_equal_each_alone(plain: Family, model: Slice, site: Site) -> None:
    with Stage(model, sites=[site]) as stage:
        assert_equal(pooled(stage, samples_batch()), [means[[SITES.index(site)]] for means in plain.means()])


@pytest.mark.parametrize(("first", "stop"), [(0, 3), (3, 6)])
def test_a_second_batch_is_not_disturbed_by_the_first(llama: Checkpoint, first: int, stop: int) -> None:
    with Stage(load_slice(llama, first=first, stop=stop, dtype="float32"), last=False, sites=SITES) as stage:
        long, received_BTD = stage.probe((30, 7, 19))
        before = stage.forward(long, received_BTD)
        expected = [rows.sums_SD.copy() for rows in before.pooled().values()]
        other = stage.forward(*stage.probe((3,))).pooled()[0].sums_SD
        again = stage.forward(long, received_BTD)
    assert other.shape == (len(SITES), 3, 1, llama.hidden)
    # What a batch gave stays its own, whatever runs after it.
    assert_equal([rows.sums_SD for rows in before.pooled().values()], expected)
    assert_equal([rows.sums_SD for rows in again.pooled().values()], expected)
    assert before.hidden_BTD is not None
    assert again.hidden_BTD is not None
    assert torch.equal(again.hidden_BTD, before.hidden_BTD)
