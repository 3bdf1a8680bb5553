"""Run folders: layout, commit protocol, lease, rollouts in Parquet, activations in Zarr, and how to read them."""

from personaspace.store.reader import open_run, open_spans, select

__all__ = ["open_run", "open_spans", "select"]
