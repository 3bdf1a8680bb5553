"""Role vectors as Parquet: one row per role and layer, for notebooks, databases and data sets.

The default role is the role `default`. The axis is not stored: it follows from the vectors as
mean(default) - mean(roles), if it was made of these roles.

Shapes: N rows, R roles, L layers, D hidden size.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from personaspace.store.errors import InputError
from personaspace.store.formats.directions import Directions, check_array, some
from personaspace.store.formats.files import naming, replacing, require_file
from personaspace.store.formats.json_text import parse_json
from personaspace.store.formats.role_names import DEFAULT_ROLE

FORMAT = "personaspace-role-vectors"
VERSION = "1"


def role_vector_schema(hidden: int) -> pa.Schema:
    """Columns of a file of vectors of that size."""
    return pa.schema(
        [
            pa.field("role", pa.string(), nullable=False),
            pa.field("count", pa.int64()),
            pa.field("layer", pa.int32(), nullable=False),
            pa.field("vector", pa.list_(pa.field("item", pa.float32(), nullable=False), hidden), nullable=False),
        ]
    )


def write_role_vectors(file: Path, directions: Directions, *, overwrite: bool = False) -> None:
    """Writes the vectors of the default and every role, one row group per role; `count` is null where unknown.

    Raises InputError if the directions hold an axis only.
    """
    if directions.default_LD is None and directions.role_RLD is None:
        raise InputError(f"{file}: the directions hold an axis only; there are no role vectors to write.")
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "model": directions.model,
        "provenance": json.dumps(dict(directions.provenance)),
    }
    schema = role_vector_schema(directions.hidden).with_metadata(metadata)
    with (
        replacing(file, overwrite=overwrite) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd", write_page_checksum=True) as writer,
    ):
        for role, count, vector_LD in _rows(directions):
            length, flat = len(directions.layers), np.ascontiguousarray(vector_LD).reshape(-1)
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(flat), type=schema.field("vector").type)
            columns = [
                pa.array([role] * length, type=pa.string()),
                pa.array([count] * length, type=pa.int64()),
                pa.array(directions.layers, type=pa.int32()),
                vectors,
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def read_role_vectors(file: Path) -> Directions:
    """Directions without axis, roles in the order of the file.

    Raises InputError for other columns, missing or doubled layers, and counts that differ within a role.
    """
    try:
        table = pq.read_table(require_file(file), page_checksum_verification=True, partitioning=None)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{file}: can't be read as Parquet ({error}).") from error
    metadata = {
        key.decode(errors="replace"): value.decode(errors="replace")
        for key, value in (table.schema.metadata or {}).items()
    }
    if (metadata.get("format"), metadata.get("version")) != (FORMAT, VERSION):
        raise InputError(
            f"{file}: its metadata does not say `{FORMAT}`, version {VERSION}; it says {metadata.get('format')!r}, "
            f"version {metadata.get('version')!r}. Write it with this version of personaspace."
        )
    vector = table.schema.field("vector").type if "vector" in table.schema.names else None
    hidden = vector.list_size if isinstance(vector, pa.FixedSizeListType) else 1
    if not table.schema.equals(role_vector_schema(hidden)) or not table.num_rows:
        raise InputError(
            f"{file}: has {table.num_rows} rows of {_describe(table.schema)}; expected rows of "
            f"{_describe(role_vector_schema(hidden))}."
        )
    if any(table[name].null_count for name in ("role", "layer", "vector")):
        raise InputError(f"{file}: holds nulls in role, layer or vector; every row needs all three.")
    return _assemble(file, table, hidden, metadata)


def _rows(directions: Directions) -> Iterator[tuple[str, int | None, NDArray[np.float32]]]:
    if directions.default_LD is not None:
        yield DEFAULT_ROLE, None, directions.default_LD
    for number, role in enumerate(directions.roles):
        yield role, directions.counts[number] if directions.counts else None, directions.role_LD(role)


def _assemble(file: Path, table: pa.Table, hidden: int, metadata: dict[str, str]) -> Directions:
    """Directions from checked columns: each role's layers may come in any order, but must be the same."""
    value_ND: NDArray[np.float32] = (
        table["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(-1, hidden)
    )
    check_array(value_ND, f"{file}: vector", 2)
    rows: dict[str, dict[int, int]] = {}
    counts: dict[str, set[int | None]] = {}
    names, layers_N, counts_N = (table[name].to_pylist() for name in ("role", "layer", "count"))
    for row, (role, layer, count) in enumerate(zip(names, layers_N, counts_N, strict=True)):
        if rows.setdefault(role, {}).setdefault(layer, row) != row:
            raise InputError(f"{file}: role {role!r} has layer {layer} twice; each needs one row per layer.")
        counts.setdefault(role, set()).add(count)
    layers = tuple(sorted(next(iter(rows.values()))))
    for role, found in rows.items():
        if tuple(sorted(found)) != layers:
            raise InputError(f"{file}: role {role!r} has layers {some(sorted(found))}; the first has {some(layers)}.")
        if len(counts[role]) > 1:
            raise InputError(f"{file}: role {role!r} has counts {counts[role]}; all its rows need the same.")
    roles = tuple(role for role in rows if role != DEFAULT_ROLE)
    known = [count for role in roles for count in counts[role] if count is not None]
    if known and len(known) < len(roles):
        raise InputError(f"{file}: count is null for some roles only; give it for all, or for none.")
    by_role = {role: value_ND[[found[layer] for layer in layers]] for role, found in rows.items()}
    provenance = parse_json(metadata.get("provenance", "{}").encode(), f"{file}: provenance is not valid JSON")
    if not isinstance(provenance, dict):
        raise InputError(f"{file}: provenance is a JSON {type(provenance).__name__}; expected an object of texts.")
    with naming(file):
        return Directions(
            model=metadata.get("model", ""),
            layers=layers,
            default_LD=by_role.get(DEFAULT_ROLE),
            roles=roles,
            role_RLD=np.stack([by_role[role] for role in roles]) if roles else None,
            counts=tuple(known),
            provenance=provenance,
        )


def _describe(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema)
