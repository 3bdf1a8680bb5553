"""zarrita, the Zarr of browsers and Node, reads every array of a run bit for bit, strings included.

It does not look at CRC-32C: what it reads is what is stored, damaged or not.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from personaspace.store.config import Precision
from personaspace.store.layout import Layout
from personaspace.store.local import LocalFolder
from tests.store.interop.runs import FIRST, GROWN, MEAN, everything, grow_run, write_run_of

SOURCES = Path(__file__).parent / "zarrita"
pytestmark = pytest.mark.slow

Read = Callable[[Path, Layout, Precision], dict[str, Any]]


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Read:
    """What zarrita reads of a group, installed as package-lock.json has it."""
    missing = [name for name in ("node", "npm") if shutil.which(name) is None]
    if missing:
        stop = pytest.fail if os.environ.get("PERSONASPACE_REQUIRE_NODE") == "1" else pytest.skip
        stop(f"no {' and no '.join(missing)} on PATH: zarrita was not tested")
    folder = tmp_path_factory.mktemp("zarrita")
    for name in ("package.json", "package-lock.json", "read.mjs"):
        shutil.copy(SOURCES / name, folder)
    install = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    installed = subprocess.run(install, cwd=folder, capture_output=True, text=True)
    assert installed.returncode == 0, installed.stderr

    def run(group: Path, layout: Layout, precision: Precision) -> dict[str, Any]:
        command = ["node", "read.mjs", str(group), *everything(layout, precision)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    return run


def assert_everything(found: dict[str, Any], layout: Layout, precision: Precision) -> None:
    for name, expected in everything(layout, precision).items():
        array = found["arrays"][name]
        assert array["shape"] == list(expected.shape), name
        assert array["values"] == printed(expected).ravel().tolist(), name
        assert array["dtype"] == ("string" if expected.dtype == object else expected.dtype.name)
    assert found["layer4"] == printed(everything(layout, precision)[MEAN.path][:, 4]).ravel().tolist()


def printed(values: NDArray[Any]) -> NDArray[Any]:
    """As read.mjs prints them."""
    return np.ascontiguousarray(values).view(np.uint32) if values.dtype == np.float32 else values


@pytest.mark.parametrize("precision", get_args(Precision))
def test_every_array_bit_for_bit(read: Read, tmp_path: Path, precision: Precision) -> None:
    found = read(write_run_of(LocalFolder(tmp_path), precision), FIRST, precision)
    assert_everything(found, FIRST, precision)


def test_consolidated_metadata(read: Read, tmp_path: Path) -> None:
    found = read(write_run_of(LocalFolder(tmp_path), "16"), FIRST, "16")
    assert found["contents"] == sorted(["/", "/spans", *(f"/{name}" for name in everything(FIRST, "16"))])
    assert list(found["attributes"]) == ["identity_hash"]
    assert found["arrays"][MEAN.path]["dimensions"] == ["rollout", "layer", "hidden"]


def test_after_growth(read: Read, tmp_path: Path) -> None:
    group = write_run_of(LocalFolder(tmp_path), "16")
    grow_run(LocalFolder(tmp_path), "16")
    assert_everything(read(group, GROWN, "16"), GROWN, "16")


def test_checksums_are_not_looked_at(read: Read, tmp_path: Path) -> None:
    group = write_run_of(LocalFolder(tmp_path), "16")
    shard = group / MEAN.path / "c" / "0" / "0" / "0"
    damaged = bytearray(shard.read_bytes())
    damaged[-1] ^= 1  # The last byte of the CRC-32C of the shard's index.
    shard.write_bytes(damaged)
    assert_everything(read(group, FIRST, "16"), FIRST, "16")
