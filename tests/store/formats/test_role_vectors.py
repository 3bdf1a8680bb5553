"""Role vectors in Parquet: what is written is read, in order, and other tables are refused."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given

from personaspace.store.errors import InputError
from personaspace.store.formats.directions import Directions
from personaspace.store.formats.role_vectors import read_role_vectors, role_vector_schema, write_role_vectors
from tests.store.formats.samples import any_directions, directions, same


@given(any_directions(vectors=True))
def test_round_trip_but_for_the_axis(written: Directions) -> None:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "vectors.parquet"
        write_role_vectors(file, written)
        found = read_role_vectors(file)
    assert found.axis_LD is None
    assert same(found, Directions(**{name: getattr(written, name) for name in KEPT}))


KEPT = ("model", "layers", "default_LD", "roles", "role_RLD", "counts", "provenance")


def test_the_table(tmp_path: Path) -> None:
    write_role_vectors(tmp_path / "v.parquet", directions())
    table = pq.read_table(tmp_path / "v.parquet")
    assert table.schema.equals(role_vector_schema(4))
    rows = table.to_pylist()
    assert [(row["role"], row["count"], row["layer"]) for row in rows] == [
        *[("default", None, layer) for layer in (0, 1, 3)],
        *[("poet", 12, layer) for layer in (0, 1, 3)],
        *[("ghost", 0, layer) for layer in (0, 1, 3)],
    ]
    role_RLD = directions().role_RLD
    assert role_RLD is not None
    assert rows[-1]["vector"] == role_RLD[1, 2].tolist()
    assert table.schema.metadata[b"model"] == b"org/model"
    with pytest.raises(InputError, match=r"v\.parquet: exists already"):
        write_role_vectors(tmp_path / "v.parquet", directions())
    with pytest.raises(InputError, match=r"the directions hold an axis only; there are no role vectors to write\."):
        write_role_vectors(tmp_path / "w.parquet", directions(default_LD=None, roles=(), role_RLD=None, counts=()))


def test_order_of_rows_within_a_role_is_free(tmp_path: Path) -> None:
    write_role_vectors(tmp_path / "v.parquet", directions(axis_LD=None))
    table = pq.read_table(tmp_path / "v.parquet")
    pq.write_table(table.take([2, 3, 0, 5, 8, 1, 4, 7, 6]), tmp_path / "shuffled.parquet")
    assert same(read_role_vectors(tmp_path / "shuffled.parquet"), directions(axis_LD=None))


METADATA = {"format": "personaspace-role-vectors", "version": "1", "model": "m", "provenance": "{}"}
ROW: dict[str, Any] = {"role": "ghost", "count": 1, "layer": 0, "vector": [1.0, 2.0]}


@pytest.mark.parametrize(
    ("rows", "metadata", "message"),
    [
        ([ROW], {}, "its metadata does not say `personaspace-role-vectors`, version 1"),
        ([ROW], METADATA | {"version": "2"}, "its metadata does not say `personaspace-role-vectors`, version 1; it"),
        ([], METADATA, "has 0 rows of role: string, count: int64, layer: int32, vector: "),
        ([ROW, ROW], METADATA, "role 'ghost' has layer 0 twice; each needs one row per layer."),
        ([ROW, ROW | {"layer": 1}, ROW | {"role": "poet"}], METADATA, "role 'poet' has layers 0; the first has 0, 1."),
        (
            [ROW, ROW | {"layer": 1, "count": 2}],
            METADATA,
            "role 'ghost' has counts {1, 2}; all its rows need",
        ),
        ([ROW, ROW | {"role": "poet", "count": None}], METADATA, "count is null for some roles only; give it for all"),
        ([ROW | {"layer": -1}], METADATA, "Directions: layers are (-1,); they must be block indices from 0 up"),
        ([ROW | {"role": "../x"}], METADATA, "Directions: role name '../x' can't be a file name"),
        ([ROW | {"vector": [1.0, float("inf")]}], METADATA, "vector: holds values that are not finite"),
        ([ROW], METADATA | {"model": ""}, "Directions: `model` is empty"),
        ([ROW], METADATA | {"provenance": "{"}, "provenance is not valid JSON: Expecting"),
        ([ROW], METADATA | {"provenance": "[]"}, "provenance is a JSON list; expected an object of texts."),
        ([ROW], METADATA | {"model": b"\xff", "provenance": "[1]"}, "provenance is a JSON list"),
    ],
)
def test_refused_tables(tmp_path: Path, rows: Any, metadata: Any, message: str) -> None:
    file = tmp_path / "v.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=role_vector_schema(2).with_metadata(metadata)), file)
    with pytest.raises(InputError) as error:
        read_role_vectors(file)
    assert str(error.value).startswith(f"{file}: {message}")


@pytest.mark.parametrize(
    "columns",
    [
        {"role": ["ghost"], "layer": [0]},
        {"role": ["ghost"], "count": [1], "layer": [0], "vector": [[1.0, 2.0]]},
    ],
)
def test_refused_columns(tmp_path: Path, columns: Any) -> None:
    table = pa.table(columns).replace_schema_metadata(METADATA)
    pq.write_table(table, tmp_path / "v.parquet")
    with pytest.raises(InputError, match=r"v\.parquet: has 1 rows of role: string, .*; expected rows of role: string"):
        read_role_vectors(tmp_path / "v.parquet")


def test_broken_files(tmp_path: Path) -> None:
    file = tmp_path / "v.parquet"
    write_role_vectors(file, directions())
    whole = bytearray(file.read_bytes())
    for content in (b"", b"PAR1PAR1", bytes(whole[:-9])):
        file.write_bytes(content)
        with pytest.raises(InputError, match=r"v\.parquet: can't be read as Parquet"):
            read_role_vectors(file)
    with pytest.raises(InputError, match="does not exist"):
        read_role_vectors(tmp_path / "none.parquet")
