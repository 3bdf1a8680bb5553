"""Parquet tables as bytes, whole and with page checksums."""

import pyarrow as pa
import pyarrow.parquet as pq

from personaspace.store.errors import IntegrityError


def encode_table(table: pa.Table) -> bytes:
    """The table as one Parquet file."""
    # Arrow's own buffers: its threads must not touch Python objects, or the interpreter may abort at its end.
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return bytes(sink.getvalue().to_pybytes())


def decode_table(data: bytes, schema: pa.Schema | None = None) -> pa.Table:
    """The table in a Parquet file. Raises IntegrityError if it is damaged, or has other columns than ``schema``."""
    try:
        table = pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
        names, matches = table.schema.names, schema is None or table.schema.equals(schema)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise IntegrityError(f"{len(data)} bytes do not decode as a Parquet part: {error}") from error
    if not matches:
        raise IntegrityError(f"Parquet part has columns {names}, expected {schema.names if schema else names}")
    return table
