"""A fit as tables."""

from pathlib import Path

import numpy as np
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet
import pytest

from personaspace.store.exchange.export import export
from personaspace.store.exchange.export_tables import fit_tables
from personaspace.store.local import LocalFolder
from personaspace.store.space import open_space
from tests.analysis.spaces import TRAITS, build_space
from tests.store.exchange.exported_runs import fitted_run, quiet


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> LocalFolder:
    return fitted_run(tmp_path_factory.mktemp("own") / "run")


def test_tables_hold_the_numbers_of_the_fit(own: LocalFolder, tmp_path: Path) -> None:
    space = open_space(own)
    export(own, tmp_path / "tables", "tables", say=quiet)
    names = sorted(file.name for file in (tmp_path / "tables").iterdir())
    assert names == [f"{name}.{ending}" for name in ("layers", "roles", "variance") for ending in ("csv", "parquet")]
    roles = pyarrow.parquet.read_table(tmp_path / "tables" / "roles.parquet")
    assert roles.num_rows == space.sizes["role"] * space.sizes["layer"]
    poet = roles.filter((pyarrow.compute.field("role") == "poet") & (pyarrow.compute.field("layer") == 3)).to_pylist()[
        0
    ]
    at = space.sel(role="poet", layer=3)
    assert poet["role_position"] == pytest.approx(float(at["role_position"]))
    assert poet["role_score_pc1"] == pytest.approx(float(at["role_score"][0]))
    assert poet["role_count"] == int(at["role_count"])
    low = at["role_position_interval"].sel(resampled="questions", bound="low")
    assert poet["role_position_interval_questions_low"] == pytest.approx(float(low), nan_ok=True)
    layers = pyarrow.csv.read_csv(tmp_path / "tables" / "layers.csv")
    assert layers["layer"].to_pylist() == space["layer"].values.tolist()
    np.testing.assert_allclose(layers["cos_axis_pc1"].to_numpy(), space["cos_axis_pc1"], rtol=1e-5)
    variance = pyarrow.parquet.read_table(tmp_path / "tables" / "variance.parquet")
    np.testing.assert_allclose(
        variance["components_needed_90"].to_numpy(), space["components_needed"].sel(variance=0.9)
    )


def test_only_some_roles_and_layers(own: LocalFolder, tmp_path: Path) -> None:
    export(own, tmp_path / "tables", "tables", roles=["poet"], layers=[1, 2], say=quiet)
    roles = pyarrow.csv.read_csv(tmp_path / "tables" / "roles.csv")
    assert roles["role"].to_pylist() == ["poet", "poet"]
    assert roles["layer"].to_pylist() == [1, 2]


def test_traits_have_a_table_where_there_are_some() -> None:
    traits = fit_tables(build_space(layers=3))["traits"]
    assert set(traits["trait"].to_pylist()) == set(TRAITS)
    assert traits.num_rows == 3 * len(TRAITS)
