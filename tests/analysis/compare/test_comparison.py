"""Comparing fitted runs whose likeness is known, opened from real run folders."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from personaspace.analysis.compare.comparison import MEASURES, compare, compare_pair
from personaspace.analysis.compare.movers import movers
from personaspace.analysis.compare.pairing import Fitted, common_roles, layer_pairs
from personaspace.analysis.compare.runs import basis, differences, open_runs, samples
from personaspace.analysis.compare.tables import TABLES, document, tables
from personaspace.store.errors import InputError
from personaspace.store.local import LocalFolder
from tests.analysis.compare.twin_runs import ROLES, write_fitted

RELATIONS = [measure.name for measure in MEASURES if not measure.one_basis]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base run and its kin: `instruct` of the same basis, with another ghost; `apart` and `deep` of other bases."""
    root = tmp_path_factory.mktemp("runs")
    write_fitted(LocalFolder(root / "base"))
    write_fitted(
        LocalFolder(root / "instruct"),
        say="Certainly:",
        moved={"ghost": 6.0},
        model={"files": {"model.safetensors": "b" * 64}},
    )
    write_fitted(LocalFolder(root / "apart"), basis=1, model={"files": {}})
    write_fitted(LocalFolder(root / "deep"), basis=2, layers=6, hidden=24)
    return root


def fitted(root: Path, *names: str) -> list[Fitted]:
    return [run.fitted for run in open_runs([LocalFolder(root / name) for name in names])]


def made(layers: list[int], depth: int, roles: list[str] | None = None, **coords: Any) -> Fitted:
    """Just enough of a fit for what is asked of layers and roles."""
    names = roles or ["a", "b", "c"]
    space = xr.Dataset(coords={"layer": layers, "role": names} | coords, attrs={"target_layer": layers[0]})
    return Fitted(name="made", space=space, depth=depth)


def test_kin_share_everything_but_the_role_that_moved(root: Path) -> None:
    pair = compare(fitted(root, "base", "instruct"))[0]
    assert pair.value("axis_cosine") > 0.9 > pair.chance("axis_cosine") > 0.3
    for name in ("role_cosine", "procrustes", "cka"):
        assert pair.value(name) > max(pair.chance(name), pair.chance(name, "kind")), name
    found = movers(pair)
    assert found[0].role == "ghost"
    assert found[0].difference > 0.3
    assert found[0].rank_b < found[0].rank_a
    assert [mover.role for mover in found if mover.stands_out] == ["ghost"]
    place_R = pair.data["position"].isel(place=pair.at, run=0).values
    assert sorted(mover.rank_a for mover in found) == list(range(1, 13))
    assert min(found, key=lambda mover: mover.rank_a).a == pytest.approx(place_R.max())


def test_a_run_is_itself(root: Path) -> None:
    [base] = fitted(root, "base")
    data = compare_pair(base, base, permutations=40)
    for measure in MEASURES:
        assert data[measure.name].values == pytest.approx(1), measure.name
    assert (data["component_match"].values == np.arange(4)).all()
    assert np.diag(data["cka_layers"].values) == pytest.approx(1)
    assert (data["position"][0] == data["position"][1]).all()


def test_models_trained_apart_agree_in_relations_but_not_in_directions(root: Path) -> None:
    pair = compare(fitted(root, "base", "apart"))[0]
    for name in RELATIONS:
        assert pair.value(name) > 0.95, name
        assert pair.value(name) > pair.chance(name), name
    assert pair.value("role_cosine") < pair.chance("role_cosine")
    assert abs(pair.value("axis_cosine")) < 0.6


def test_unequal_models_are_compared_at_like_depths_without_cosines(root: Path) -> None:
    base, deep = fitted(root, "base", "deep")
    pair = compare([deep, base], layer=4)[0]
    assert pair.data["layer_a"].values.tolist() == [0, 1, 2, 3, 4, 5]
    assert pair.data["layer_b"].values.tolist() == [0, 0, 1, 1, 2, 2]
    assert pair.layers == (4, 2)
    assert "axis_cosine" not in pair.data
    assert np.isnan(pair.value("axis_cosine"))
    assert pair.data["cka_layers"].shape == (6, 3)
    assert compare([base, deep])[0].data["layer_b"].values.tolist() == [0, 2, 5]


def test_who_is_who_lost_is_no_likeness(root: Path) -> None:
    base, apart = fitted(root, "base", "apart")
    shuffled = np.random.default_rng(5).permutation(12)
    strangers = Fitted(
        name="strangers",
        depth=3,
        space=apart.space.assign_coords(role=apart.space["role"].values[shuffled], role_kind=apart.space["role_kind"]),
    )
    pair = compare([base, strangers])[0]
    above = [name for name in RELATIONS if pair.value(name) > pair.chance(name)]
    assert above == []


def test_every_pair_is_looked_at_where_the_first_run_is(root: Path) -> None:
    pairs = compare(fitted(root, "base", "deep", "apart"), layer=2, permutations=20)
    assert [(pair.a.name, pair.b.name) for pair in pairs] == [("base", "deep"), ("base", "apart"), ("deep", "apart")]
    assert [pair.layers for pair in pairs] == [(2, 5), (2, 2), (5, 2)]


def test_a_null_within_kinds_needs_kinds_with_several_roles(root: Path) -> None:
    base, apart = fitted(root, "base", "apart")
    single = [
        Fitted(name=run.name, depth=3, space=run.space.assign_coords(role_kind=("role", [f"k{i}" for i in range(12)])))
        for run in (base, apart)
    ]
    data = compare_pair(*single, permutations=20)
    assert np.isnan(data["cka_p99"].sel(null="kind")).all()
    assert np.isfinite(data["cka_p99"].sel(null="any")).all()


def test_layers_pair_by_index_where_counts_agree_and_by_depth_elsewhere() -> None:
    assert layer_pairs(made([0, 1, 2], 30), made([1, 2, 3], 30)) == [(1, 1), (2, 2)]
    assert layer_pairs(made([0, 14, 29], 30), made(list(range(59)), 59)) == [(0, 0), (14, 28), (29, 58)]
    assert layer_pairs(made([0], 1), made([0], 1)) == [(0, 0)]
    message = "compare: made has layers 0 to 1 of 30 and made 20 to 21 of 30: none at like depths. Grow one"
    with pytest.raises(InputError, match=re.escape(message)):
        layer_pairs(made([0, 1], 30), made([20, 21], 30))


def test_roles_are_matched_by_id_and_only_where_they_are_fully_played() -> None:
    scored = {"role_level": ("role", ["fully", "somewhat", "fully", "fully"])}
    a = made([0], 1, ["poet", "poet (somewhat)", "ghost", "spy"], **scored)
    b = made([0], 1, ["spy", "ghost", "poet", "poet (somewhat)"])
    assert common_roles(a, b) == ["poet", "ghost", "spy"]
    with pytest.raises(InputError, match=r"have 2 roles in common \(poet, ghost\); at least 3 are needed\. Roles are"):
        common_roles(a, made([0], 1, ["ghost", "poet", "golem"]))


def test_what_cannot_be_compared_is_refused(root: Path) -> None:
    base, apart = fitted(root, "base", "apart")
    with pytest.raises(InputError, match="compare: 1 run; give at least two"):
        compare([base])
    with pytest.raises(InputError, match=r"compare --layer: 9; the fit of base has layers 0 to 2\."):
        compare([base, apart], layer=9)
    with pytest.raises(InputError, match="base is given twice; a run is compared with others"):
        open_runs([LocalFolder(root / "base")] * 2)


def test_runs_of_one_name_are_told_apart(root: Path, tmp_path: Path) -> None:
    write_fitted(LocalFolder(tmp_path / "base"))
    runs = open_runs([LocalFolder(root / "base"), LocalFolder(tmp_path / "base")])
    assert [run.fitted.name for run in runs] == [f"{root.name}/base", f"{tmp_path.name}/base"]


def test_differences_and_weights_are_told(root: Path) -> None:
    base, instruct, apart, deep = open_runs(
        [LocalFolder(root / name) for name in ("base", "instruct", "apart", "deep")]
    )
    assert differences(base, instruct) == [("model.files.model.safetensors", "aaaaaaaaaaaa…", "bbbbbbbbbbbb…")]
    assert ("store.layers", "3", "6") in differences(base, deep)
    assert [basis(base, run) for run in (instruct, apart, deep)] == ["different", "unknown", "same"]


def test_other_catalogues_and_fits_are_told(root: Path, tmp_path: Path) -> None:
    fewer = write_fitted(LocalFolder(tmp_path / "fewer"), roles=ROLES[:9])
    base, other = open_runs([LocalFolder(root / "base"), fewer])
    found = {setting: (ours, theirs) for setting, ours, theirs in differences(base, other)}
    assert found["roles"] == ("13, 9 of them in both, 9 with the same prompts", "9")
    assert found["rollouts in the fit"] == ("78", "54")
    assert "questions" not in found


def test_samples_answer_the_same_question(root: Path) -> None:
    runs = open_runs([LocalFolder(root / name) for name in ("base", "instruct")])
    ours, theirs = samples(runs)
    assert ours.keys() == theirs.keys() == set(ROLES)
    assert (ours["ghost"].question, ours["ghost"].response) == ("Question 0?", "Answer 30")
    assert (theirs["ghost"].question, theirs["ghost"].response) == ("Question 0?", "Certainly: 30")


def test_tables_and_json_hold_the_numbers(root: Path) -> None:
    pairs = compare(fitted(root, "base", "deep"), permutations=20)
    found = tables(pairs)
    assert list(found) == list(TABLES)
    assert {name: table.num_rows for name, table in found.items()} == {
        "layers": 3, "components": 12, "roles": 36, "cka": 18,
    }  # fmt: skip
    row = next(row for row in found["layers"].to_pylist() if row["shown"])
    assert row["cka"] == pairs[0].value("cka")
    assert np.isnan(row["axis_cosine"])
    written = document(pairs, [{"weights": "same", "differences": []}])
    entry = written["pairs"][0]
    assert entry["measures"]["cka"] == row["cka"]
    assert entry["measures"]["axis_cosine"] is None
    assert [component["component_a"] for component in entry["matched_components"]] == [1, 2, 3, 4]
    assert len(entry["roles"]) == entry["roles_in_common"] == 12
