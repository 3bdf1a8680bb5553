"""From a `steer` section to interventions: every source, direction and unit; what does not go together is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from personaspace.analysis.caps.thresholds import capping_config, compute_caps
from personaspace.steer.config import SteerConfig
from personaspace.steer.sources import intervention_identity, resolve_interventions
from personaspace.store.errors import InputError
from personaspace.store.formats.capping_json import write_capping_json
from personaspace.store.formats.directions import Directions
from personaspace.store.formats.safetensors_files import write_directions
from personaspace.store.formats.torch_files import write_axis, write_capping
from personaspace.store.local import LocalFolder
from personaspace.store.reader import open_run
from personaspace.store.space import open_space
from tests.analysis.caps.small_fit import write_fitted

EXPERIMENT = "layers_4:7-p0.25"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fitted run of eight layers, and its axis and caps as files."""
    place = tmp_path_factory.mktemp("sources")
    write_fitted(LocalFolder(place / "run"))
    space = open_space(place / "run")
    axis_LD = space["axis"].values.astype(np.float32)
    write_axis(place / "axis.pt", axis_LD)
    write_directions(place / "axis.safetensors", Directions(model="tiny", layers=tuple(range(8)), axis_LD=axis_LD))
    caps = capping_config(space, compute_caps(place / "run", ranges=[range(4, 7)]))
    write_capping_json(place / "caps.json", caps)
    write_capping(place / "caps.pt", caps)
    return place


def steer(place: Path, source: str = "run", **settings: Any) -> SteerConfig:
    return SteerConfig(source=str(place / source), **settings)


def test_nothing_by_default() -> None:
    assert resolve_interventions(SteerConfig()) == ()


def test_coefficients_count_in_the_length_of_the_stream(place: Path) -> None:
    [one] = resolve_interventions(steer(place, method="add", coefficient=-0.5, layers="5"))
    used = open_space(place / "run")["rollout_row"].values
    x_ND = open_run(place / "run")["resid_post_mean"].isel(rollout=used, layer=5).values.astype(np.float64)
    assert one.layer == 5
    assert one.value == pytest.approx(-0.5 * np.sqrt((x_ND**2).sum(axis=1).mean()), rel=1e-5)


@pytest.mark.parametrize(("unit", "length"), [("vector", None), ("residual", 1.0)])
def test_other_units(place: Path, unit: Any, length: float | None) -> None:
    [one] = resolve_interventions(steer(place, method="add", coefficient=2.0, unit=unit))
    space = open_space(place / "run")
    assert one.layer == space.attrs["target_layer"]
    assert one.value == pytest.approx(2.0 * (length or float(space["axis_norm"].sel(layer=one.layer))), rel=1e-5)


def test_caps_are_those_of_the_caps_command(place: Path) -> None:
    found = resolve_interventions(steer(place, layers="4-6", percentile=50.0))
    caps = compute_caps(place / "run", percentiles=[50.0], ranges=[])
    assert [one.layer for one in found] == [4, 5, 6]
    np.testing.assert_allclose([one.value for one in found], caps["threshold"].sel(percentile=50.0, layer=[4, 5, 6]))


def test_the_papers_cap_is_the_default(place: Path) -> None:
    assert [one.layer for one in resolve_interventions(steer(place))] == [6]
    assert [(one.method, one.value) for one in resolve_interventions(steer(place))] == [
        (one.method, one.value) for one in resolve_interventions(steer(place, percentile=25.0, layers="6"))
    ]


@pytest.mark.parametrize("file", ["caps.json", "caps.pt"])
def test_files_of_caps_say_the_same_as_the_run(place: Path, file: str) -> None:
    ours = steer(place, layers="4-6")
    theirs = steer(place, file, experiment=EXPERIMENT)
    for one, other in zip(resolve_interventions(ours), resolve_interventions(theirs), strict=True):
        assert (one.method, one.layer) == (other.method, other.layer)
        assert one.value == pytest.approx(other.value, rel=1e-6)
        np.testing.assert_allclose(one.vector_D, other.vector_D, rtol=1e-6)


@pytest.mark.parametrize("file", ["axis.pt", "axis.safetensors"])
def test_files_of_an_axis(place: Path, file: str) -> None:
    settings: dict[str, Any] = {"method": "add", "coefficient": 1.0, "unit": "vector", "layers": "3"}
    [ours], [theirs] = (resolve_interventions(steer(place, source, **settings)) for source in ("run", file))
    assert ours.value == pytest.approx(theirs.value, rel=1e-6)
    assert intervention_identity(steer(place, **settings), [ours]) == intervention_identity(
        steer(place, file, **settings), [theirs]
    )
    assert len(resolve_interventions(steer(place, file, method="ablate"))) == 8


def test_a_mean_ablation_sets_the_mean(place: Path) -> None:
    for one in resolve_interventions(steer(place, method="mean_ablate", layers="2-3", direction="PC1")):
        space = open_space(place / "run").sel(layer=one.layer)
        assert one.value == pytest.approx(float(space["rollout_mean"] @ space["component_vector"][0]), rel=1e-4)


def test_a_role_is_the_way_from_the_mean_role(place: Path) -> None:
    space = open_space(place / "run")
    role = str(space["role"].values[0])
    [one] = resolve_interventions(steer(place, method="add", coefficient=1.0, direction=role, layers="5"))
    core = space["role_vector"].sel(layer=5).mean("role").values
    np.testing.assert_allclose(one.vector_D, space["role_vector"].sel(layer=5, role=role) - core, atol=1e-4)


def test_another_direction_is_another_identity(place: Path) -> None:
    chosen = [
        steer(place),
        steer(place, percentile=50.0),
        steer(place, layers="5-6"),
        steer(place, positions="response"),
        steer(place, method="ablate"),
        steer(place, method="ablate", direction="PC1"),
        steer(place, method="add", coefficient=0.1),
        steer(place, method="add", coefficient=0.2),
    ]
    found = [str(intervention_identity(config, resolve_interventions(config))) for config in chosen]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        (None, {"coefficient": 1.0}, "steer.coefficient: has no effect without steer.source"),
        ("run", {"method": "add"}, "steer.coefficient: is missing; steer.method add needs how far"),
        ("run", {"method": "ablate", "coefficient": 1.0}, "has no effect with steer.method ablate, only with add"),
        ("run", {"percentile": 25.0, "threshold": 1.0}, "steer.threshold: given together with steer.percentile"),
        ("run", {"direction": "PC1"}, "percentiles are known along the axis only"),
        ("run", {"layers": "7-8"}, "steer.layers: 8; "),
        ("run", {"layers": "x"}, "steer.layers: 'x'; give first and last layer"),
        ("run", {"method": "ablate", "direction": "PC99"}, "steer.direction: PC99; "),
        ("run", {"experiment": EXPERIMENT}, "is a run. Give steer.layers instead"),
        ("axis.pt", {}, "steer.percentile: "),
        ("axis.pt", {"method": "add", "coefficient": 1.0}, "use steer.unit vector or residual"),
        ("axis.pt", {"method": "mean_ablate"}, "not mean projections"),
        ("axis.safetensors", {"direction": "PC1", "method": "ablate"}, "holds an axis alone"),
        ("caps.pt", {}, f"steer.experiment: is missing; .* {EXPERIMENT}"),
        ("caps.json", {"experiment": "x"}, "no experiment 'x'"),
        ("caps.json", {"experiment": EXPERIMENT, "layers": "4"}, "Remove steer.layers"),
        ("caps.json", {"method": "ablate"}, "Remove steer.method"),
        ("nowhere", {}, "no run here"),
        ("nowhere.pt", {}, "nowhere.pt"),
    ],
)
def test_refusals(place: Path, source: str | None, settings: dict[str, Any], message: str) -> None:
    config = SteerConfig(**settings) if source is None else steer(place, source, **settings)
    with pytest.raises(InputError, match=message):
        resolve_interventions(config)
