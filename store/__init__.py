"""Run folders: layout, commit protocol, lease, rollouts in Parquet, activations in Zarr, and how to read them."""

from typing import TYPE_CHECKING, Any

from personaspace.store.space import open_space

if TYPE_CHECKING:
    from personaspace.store.reader import open_run, open_spans, select

__all__ = ["open_run", "open_space", "open_spans", "select"]


def __getattr__(name: str) -> Any:
    # The reader needs dask and xarray, whose import takes seconds; most processes that import this folder never read.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from personaspace.store import reader

    return getattr(reader, name)
