"""Zarr and xarray read a run without a word of ours, and without a warning."""

import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import zarr

from personaspace.store.config import Precision
from personaspace.store.layout import Layout
from personaspace.store.local import LocalFolder
from tests.store.interop.runs import FIRST, GROWN, MEAN, everything, grow_run, write_run_of

ZARR_OPEN = """
group = zarr.open(path, mode="r")
assert isinstance(group, zarr.Group)
found = {name: group[name][...] for name in expected}
"""
ZARR_OPEN_GROUP = """
group = zarr.open_group(path, mode="r")
assert group.metadata.consolidated_metadata is not None
found = {name: array[...] for name, array in group.members(max_depth=None) if isinstance(array, zarr.Array)}
assert found.keys() == expected.keys()
"""
XARRAY = """
import xarray
found = {}
for group, prefix in ((None, ""), ("spans", "spans/")):
    dataset = xarray.open_zarr(path, group=group)
    assert len(dataset.data_vars) == 1 and dataset.coords.keys() >= {"layer"}, dataset
    found |= {prefix + name: dataset[name].values for name in dataset.variables}
assert found.keys() == expected.keys()
assert dataset.sizes.keys() == {"span", "layer", "hidden"}
"""


def read_by(script: str, group: Path, layout: Layout, precision: Precision, tmp_path: Path) -> None:
    """Run the script with warnings as errors in a process that knows nothing of us; compare what it found."""
    np.savez(tmp_path / "expected.npz", **everything(layout, precision))  # type: ignore[arg-type]
    program = f"""
import numpy, zarr
path = {str(group)!r}
expected = dict(numpy.load({str(tmp_path / "expected.npz")!r}, allow_pickle=True))
{script}
for name, values in expected.items():
    if values.dtype == object:
        assert found[name].tolist() == values.tolist(), name
    else:
        assert (found[name].dtype, found[name].tobytes()) == (values.dtype, values.tobytes()), name
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


SCRIPTS = pytest.mark.parametrize(
    "script", [ZARR_OPEN, ZARR_OPEN_GROUP, XARRAY], ids=["zarr.open", "zarr.open_group", "xarray.open_zarr"]
)


@SCRIPTS
@pytest.mark.parametrize("precision", get_args(Precision))
def test_a_run(script: str, precision: Precision, tmp_path: Path) -> None:
    read_by(script, write_run_of(LocalFolder(tmp_path / "run"), precision), FIRST, precision, tmp_path)


@SCRIPTS
def test_a_run_that_has_grown(script: str, tmp_path: Path) -> None:
    group = write_run_of(LocalFolder(tmp_path / "run"), "16")
    grow_run(LocalFolder(tmp_path / "run"), "16")
    read_by(script, group, GROWN, "16", tmp_path)


def test_a_flipped_bit_is_an_error(tmp_path: Path) -> None:
    group = write_run_of(LocalFolder(tmp_path), "16")
    shard = group / MEAN.path / "c" / "0" / "0" / "0"
    damaged = bytearray(shard.read_bytes())
    damaged[40] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(ValueError, match="Stored and computed checksum do not match"):
        zarr.open_array(group, path=MEAN.path, mode="r")[0, 0]
