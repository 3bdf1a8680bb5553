"""TensorStore reads every array of a run but the strings, bit for bit."""

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import tensorstore
from numpy.typing import NDArray

from personaspace.store.config import Precision
from personaspace.store.local import LocalFolder
from tests.store.interop.runs import FIRST, GROWN, MEAN, everything, grow_run, write_run_of


def open_array(group: Path, name: str) -> Any:
    kvstore = {"driver": "file", "path": str(group / name)}
    return tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, open=True, read=True).result()


def assert_bits(array: Any, expected: NDArray[Any]) -> None:
    read = np.asarray(array.read().result())
    assert (read.dtype, read.shape) == (expected.dtype, expected.shape)
    assert read.tobytes() == expected.tobytes()


@pytest.mark.parametrize("precision", get_args(Precision))
def test_every_array_bit_for_bit(tmp_path: Path, precision: Precision) -> None:
    group = write_run_of(LocalFolder(tmp_path), precision)
    for name, expected in everything(FIRST, precision).items():
        if name != "role":
            assert_bits(open_array(group, name), expected)


def test_dimensions_and_chunks(tmp_path: Path) -> None:
    array = open_array(write_run_of(LocalFolder(tmp_path), "16"), MEAN.path)
    assert array.domain.labels == ("rollout", "layer", "hidden")
    assert array.chunk_layout.read_chunk.shape == (4, 1, 6)
    assert array.chunk_layout.write_chunk.shape == (4, 3, 6)


def test_a_part_of_the_array(tmp_path: Path) -> None:
    group = write_run_of(LocalFolder(tmp_path), "16")
    expected = everything(FIRST, "16")[MEAN.path]
    assert_bits(open_array(group, MEAN.path)[5:7, 4], expected[5:7, 4].copy())
    assert_bits(open_array(group, MEAN.path)[[9, 0, 4], :, 2:3], expected[[9, 0, 4], :, 2:3].copy())


def test_after_growth(tmp_path: Path) -> None:
    group = write_run_of(LocalFolder(tmp_path), "16")
    grow_run(LocalFolder(tmp_path), "16")
    for name, expected in everything(GROWN, "16").items():
        if name != "role":
            assert_bits(open_array(group, name), expected)


def test_strings_are_refused_and_role_id_says_the_same(tmp_path: Path) -> None:
    group = write_run_of(LocalFolder(tmp_path), "16")
    with pytest.raises(ValueError, match="string data type is not one of the supported data types"):
        open_array(group, "role")


def test_a_flipped_bit_is_an_error(tmp_path: Path) -> None:
    group = write_run_of(LocalFolder(tmp_path), "16")
    shard = group / MEAN.path / "c" / "0" / "0" / "0"
    damaged = bytearray(shard.read_bytes())
    damaged[40] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(ValueError, match="Digest mismatch"):
        open_array(group, MEAN.path)[0, 0].read().result()
