"""The index: says what the chunks say, and is left aside where it is not of this moment."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from personaspace.store import index, open_run
from personaspace.store.errors import LeaseError
from personaspace.store.index import INDEX, TABLE, is_current, is_whole, read_index, write_index
from personaspace.store.lease import Fence, acquire
from personaspace.store.local import LocalFolder
from personaspace.store.manifest import Manifest, require_manifest
from personaspace.store.records import committed_slots
from tests.store.small_runs import DROPPED, LAYOUT, OK, PAD, commit_coordinates, complete, create, grow


@pytest.fixture
def fence(tmp_path: Path) -> Iterator[Fence]:
    with acquire(LocalFolder(tmp_path / "run"), timeout=60, say=pytest.fail) as lease:
        yield lease.fence


@pytest.fixture
def run(fence: Fence) -> Manifest:
    """Units 0 and 2 have coordinates; row 1 is dropped."""
    manifest = create(fence)
    commit_coordinates(fence, LAYOUT, [0, 2], dropped=[1])
    return manifest


def read(fence: Fence, manifest: Manifest) -> dict[str, NDArray[np.integer]]:
    return read_index(fence.folder, manifest, committed_slots(fence.folder))


def expect(fence: Fence, manifest: Manifest, status: list[int], tokens: list[int]) -> None:
    columns = read(fence, manifest)
    assert columns.keys() == {"status", "n_tokens"}
    assert columns["status"].tolist() == status
    assert columns["n_tokens"].tolist() == tokens
    assert open_run(fence.folder)["status"].values.tolist() == status
    assert open_run(fence.folder)["n_tokens"].values.tolist() == tokens


STATUS = [OK, DROPPED, OK, OK, 0, 0, 0, 0, OK, OK, PAD, PAD]
TOKENS = [10, 11, 12, 13, 0, 0, 0, 0, 18, 19, 0, 0]


def test_with_and_without_index_the_same_is_read(fence: Fence, run: Manifest) -> None:
    expect(fence, run, STATUS, TOKENS)
    write_index(fence, run)
    expect(fence, run, STATUS, TOKENS)


def test_an_index_stands_in_for_the_chunks(fence: Fence, run: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    write_index(fence, run)
    assert is_current(fence.folder, require_manifest(fence.folder), committed_slots(fence.folder))
    monkeypatch.setattr(index, "_from_chunks", lambda *_: pytest.fail("read the chunks"))
    assert read(fence, run)["status"].tolist() == STATUS


def test_an_index_of_an_earlier_state_is_left_aside(fence: Fence, run: Manifest) -> None:
    write_index(fence, run)
    commit_coordinates(fence, LAYOUT, [1])
    assert not is_current(fence.folder, require_manifest(fence.folder), committed_slots(fence.folder))
    assert is_whole(fence.folder)
    full = [OK, DROPPED, *[OK] * 8, PAD, PAD]
    expect(fence, run, full, [*range(10, 20), 0, 0])
    write_index(fence, run)
    assert is_current(fence.folder, require_manifest(fence.folder), committed_slots(fence.folder))
    expect(fence, run, full, [*range(10, 20), 0, 0])


def test_a_repaired_unit_makes_another_state(fence: Fence, run: Manifest) -> None:
    write_index(fence, run)
    commit_coordinates(fence, LAYOUT, [0], dropped=[2], generation=1)
    expect(fence, run, [OK, OK, DROPPED, *STATUS[3:]], TOKENS)


@pytest.mark.parametrize("committed_after", [[], [3]])
def test_an_index_from_before_growth_is_left_aside(fence: Fence, run: Manifest, committed_after: list[int]) -> None:
    """The axis is longer then, whether or not anything new has coordinates yet."""
    write_index(fence, run)
    grown = grow(fence, run, 3)
    commit_coordinates(fence, grown.layout, committed_after)
    new = [OK, OK, OK, PAD] if committed_after else [0] * 4
    tokens = [22, 23, 24, 0] if committed_after else [0] * 4
    expect(fence, grown, STATUS + new, TOKENS + tokens)
    write_index(fence, grown)
    expect(fence, grown, STATUS + new, TOKENS + tokens)


@pytest.mark.parametrize("key", [INDEX, TABLE])
@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_a_damaged_index_is_left_aside_and_written_again(fence: Fence, run: Manifest, key: str, damage: str) -> None:
    write_index(fence, run)
    whole = fence.folder.get(key)
    if damage == "delete":
        fence.folder.delete(key)
    else:
        fence.folder.replace(key, whole[:-1] if damage == "cut" else bytes([*whole[:40], whole[40] ^ 1, *whole[41:]]))
    assert not is_current(fence.folder, require_manifest(fence.folder), committed_slots(fence.folder))
    assert not is_whole(fence.folder)
    expect(fence, run, STATUS, TOKENS)
    write_index(fence, run)
    assert is_current(fence.folder, require_manifest(fence.folder), committed_slots(fence.folder))
    assert fence.folder.get(key) == whole


def test_an_index_that_is_current_is_not_written_again(
    fence: Fence, run: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_index(fence, run)
    monkeypatch.setattr(LocalFolder, "replace", lambda *_: pytest.fail("wrote something"))
    write_index(fence, run)


def test_a_crash_between_table_and_head_costs_nothing(
    fence: Fence, run: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_index(fence, run)
    commit_coordinates(fence, LAYOUT, [1])
    replace = LocalFolder.replace

    def crash(self: LocalFolder, key: str, data: bytes) -> None:
        if key == INDEX:
            raise KeyboardInterrupt
        replace(self, key, data)

    monkeypatch.setattr(LocalFolder, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        write_index(fence, run)
    monkeypatch.undo()
    assert not is_whole(fence.folder)
    expect(fence, run, [OK, DROPPED, *[OK] * 8, PAD, PAD], [*range(10, 20), 0, 0])
    write_index(fence, run)
    assert is_current(fence.folder, require_manifest(fence.folder), committed_slots(fence.folder))


def test_shards_and_rollouts_do_not_change_the_state(fence: Fence, run: Manifest) -> None:
    """The index holds coordinates only; what else is committed must not cost a new one."""
    commit_coordinates(fence, LAYOUT, [1])
    write_index(fence, run)
    complete(fence)
    assert is_current(fence.folder, require_manifest(fence.folder), committed_slots(fence.folder))


def test_a_fenced_out_driver_writes_no_index(fence: Fence, run: Manifest) -> None:
    with pytest.raises(LeaseError, match="lease epoch 0 has ended"):
        write_index(Fence(fence.folder, 0), run)
    assert not fence.folder.exists(INDEX)
    assert not fence.folder.exists(TABLE)
