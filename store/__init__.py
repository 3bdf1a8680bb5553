"""Run folders: layout, commit protocol, lease, rollouts in Parquet, activations in Zarr, ``open_run``."""

from personaspace.store.reader import open_run

__all__ = ["open_run"]
