"""Memory: the peak of a fresh process above what it took after its imports, at runs of two sizes."""


import dask
import dask.array  # noqa: F401  # An import, and no memory of the reader's.

