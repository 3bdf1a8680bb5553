"""A folder that is a Hugging Face data set, ready to push: a card and Parquet files, one config per table.

FOLDER/README.md                         card: YAML front matter that `datasets` reads, then how it was made
FOLDER/data/rollouts/000000.parquet ...  config `rollouts`
FOLDER/data/role_vectors/000000.parquet  config `role_vectors`, if directions are given
"""

import os
import re
import shutil
import uuid
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from personaspace.store.errors import InputError
from personaspace.store.formats.directions import Directions
from personaspace.store.formats.files import make_folder, sync
from personaspace.store.formats.role_vectors import write_role_vectors

CONFIGS = ("rollouts", "role_vectors")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")
_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))

_TEXT = """---
{front}---

# {card.pretty_name}

{notes}## How it was made

- Model: `{card.model}`
- Run: identity hash `{card.identity_hash}`, written with {card.made_with}
- Rollouts: {rollouts}. In each, the model was asked to take on a role and answered one question.
- Activations: residual stream after each block, mean over the tokens of the response; precision: {card.precision}
{vectors}
## How to load it

```python
from datasets import load_dataset

{load}
```
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetCard:
    """What the card says beyond what can be counted. Raises InputError for texts that are no single line."""

    pretty_name: str
    """Title of the data set."""
    license: str
    """Identifier as on the Hub, such as `cc-by-4.0`, or `other`; generated text may fall under the model's licence."""
    model: str
    """Name of the model that wrote the rollouts, with revision."""
    identity_hash: str
    """Of the run: all that decides its numbers."""
    precision: str
    """Of the stored activations, such as `16` mantissa bits or `lossless`."""
    made_with: str
    """Program and version, such as `personaspace 0.1.0`."""
    tags: tuple[str, ...] = ("interpretability", "personas")
    """For the search on the Hub."""
    notes: str = ""
    """A paragraph of Markdown of your own; empty: none."""

    def __post_init__(self) -> None:
        for name in ("pretty_name", "model", "identity_hash", "precision", "made_with"):
            text = getattr(self, name)
            if not text.strip() or not text.isprintable():
                raise InputError(f"Dataset card: {name} is {text!r}; it must be one line of text.")
        if not _LICENSE.fullmatch(self.license):
            raise InputError(
                f"Dataset card: license is {self.license!r}; give an identifier as on the Hub, such as `cc-by-4.0`, "
                "or `other`."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetCounts:
    """What was written."""

    rollouts: int
    """Rows of the config `rollouts`."""
    files: int
    """Parquet files of the config `rollouts`."""
    role_vectors: int
    """Rows of the config `role_vectors`: (roles and default) x layers."""


def write_dataset(
    folder: Path,
    *,
    card: DatasetCard,
    rollouts: Iterable[pa.Table],
    directions: Directions | None = None,
    rows_per_file: int = 20_000,
    overwrite: bool = False,
) -> DatasetCounts:
    """Writes the data set; memory holds one table of ``rollouts`` at a time.

    Each table becomes row groups; a new file begins after ``rows_per_file`` rows. All is written beside ``folder`` and
    then moved, the card last. ``overwrite`` replaces the card and both parts, and leaves other files (`.git`) alone.
    Raises InputError if ``folder`` is not empty (unless ``overwrite``), or the tables are empty or differ in columns.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not overwrite):
        raise InputError(f"{folder}: exists and is not empty; choose another folder, or allow it to be overwritten.")
    if directions is not None and directions.default_LD is None and directions.role_RLD is None:
        raise InputError(f"{folder}: the directions hold an axis only; give role vectors with them, or no directions.")
    make_folder(folder.parent)
    temporary = folder.parent / f".{uuid.uuid4().hex}.tmp"
    try:
        rows, files = _write_tables(temporary / "data" / CONFIGS[0], rollouts, rows_per_file, folder)
        vectors = 0
        if directions is not None:
            part = temporary / "data" / CONFIGS[1] / "000000.parquet"
            write_role_vectors(part, directions)
            vectors = pq.read_metadata(part).num_rows
        counts = DatasetCounts(rollouts=rows, files=files, role_vectors=vectors)
        (temporary / "README.md").write_text(_card(card, counts, directions), encoding="utf-8")
        _move(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return counts


def _write_tables(target: Path, tables: Iterable[pa.Table], rows_per_file: int, folder: Path) -> tuple[int, int]:
    """(rows, files) written."""
    target.mkdir(parents=True)
    schema: pa.Schema | None = None
    rows = files = in_file = 0
    with ExitStack() as open_file:
        writer: pq.ParquetWriter | None = None
        for table in tables:
            if not table.num_rows:
                continue
            schema = schema or table.schema
            if not table.schema.equals(schema):
                raise InputError(
                    f"{folder}: a table of rollouts has columns {table.schema.names}, those before have "
                    f"{schema.names}; all must have the same columns and types."
                )
            if writer is None or in_file >= rows_per_file:
                open_file.close()
                writer = pq.ParquetWriter(target / f"{files:06}.parquet", schema, compression="zstd")
                open_file.callback(writer.close)
                files, in_file = files + 1, 0
            writer.write_table(table)
            rows, in_file = rows + table.num_rows, in_file + table.num_rows
    if not rows:
        raise InputError(f"{folder}: there are no rollouts to write; generate or import some first.")
    return rows, files


def _move(temporary: Path, folder: Path) -> None:
    """Puts what was written in its place: at once into a new folder, else part by part, the card last."""
    for path in (*temporary.rglob("*"), temporary):
        sync(path)
    if not folder.exists() or not any(folder.iterdir()):
        os.replace(temporary, folder)
    else:
        make_folder(folder / "data")
        (temporary / "old").mkdir()
        for part in CONFIGS:
            if (folder / "data" / part).exists():
                os.replace(folder / "data" / part, temporary / "old" / part)
            if (temporary / "data" / part).exists():
                os.replace(temporary / "data" / part, folder / "data" / part)
        os.replace(temporary / "README.md", folder / "README.md")
        sync(folder)
    sync(folder.parent)


def _card(card: DatasetCard, counts: DatasetCounts, directions: Directions | None) -> str:
    configs = CONFIGS if directions is not None else CONFIGS[:1]
    front: dict[str, Any] = {
        "pretty_name": card.pretty_name,
        "license": card.license,
        "size_categories": [next((name for limit, name in _SIZES if counts.rollouts < limit), "n>10M")],
        "tags": list(card.tags),
        "configs": [
            {
                "config_name": name,
                "data_files": [{"split": "train", "path": f"data/{name}/*.parquet"}],
                **({"default": True} if name == CONFIGS[0] else {}),
            }
            for name in configs
        ],
    }
    load = "\n".join(f'{name} = load_dataset("OWNER/NAME", "{name}", split="train")' for name in configs)
    return _TEXT.format(
        front=yaml.safe_dump(front, sort_keys=False, allow_unicode=True),
        card=card,
        notes=f"{card.notes}\n\n" if card.notes else "",
        rollouts=f"{counts.rollouts:,}",
        vectors="" if directions is None else _describe_vectors(counts, directions),
        load=load,
    )


def _describe_vectors(counts: DatasetCounts, directions: Directions) -> str:
    default = "" if directions.default_LD is None else " and `default`"
    return (
        f"- Role vectors: {counts.role_vectors:,} rows, from {len(directions.roles)} roles{default}, "
        f"{len(directions.layers)} layers, {directions.hidden} values each. `layer` is the 0-based index of the block, "
        "`count` the number of rollouts behind a mean (empty: unknown). The Assistant Axis is the vector of `default` "
        "minus the mean of the others.\n"
    )
