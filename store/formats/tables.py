"""Tables as files for other programs: each as CSV and as Parquet."""

from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from personaspace.store.formats.files import replacing_parts

ENDINGS = ("csv", "parquet")


def write_tables(folder: Path, tables: Mapping[str, pa.Table], *, overwrite: bool) -> None:
    """Each table as NAME.csv and NAME.parquet in ``folder``.

    Raises InputError if the folder has files already, unless ``overwrite``; other files in it are left alone.
    """
    with replacing_parts(folder, table_files(tables), overwrite=overwrite) as temporary:
        for name, table in tables.items():
            pyarrow.csv.write_csv(table, temporary / f"{name}.csv")
            pyarrow.parquet.write_table(table, temporary / f"{name}.parquet")


def table_files(names: Mapping[str, object]) -> list[str]:
    """The files that hold tables of these names."""
    return [f"{name}.{ending}" for name in names for ending in ENDINGS]
