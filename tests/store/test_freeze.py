"""Frozen runs: one hash for every copy, another for any change, and nothing more is added."""

import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from personaspace.store import open_run
from personaspace.store.commit import commit
from personaspace.store.creation import write_run
from personaspace.store.errors import InputError, IntegrityError, LeaseError
from personaspace.store.freeze import content_hash, freeze_run
from personaspace.store.index import write_index
from personaspace.store.lease import Fence, acquire
from personaspace.store.local import LocalFolder
from personaspace.store.manifest import (
    MANIFEST,
    MANIFEST_COPY,
    Manifest,
    read_manifest,
    refuse_frozen,
    require_manifest,
)
from personaspace.store.records import COORDINATES_RECORD, committed_slots, read_record
from personaspace.store.schema import ArraySpec
from personaspace.store.scores import Score, commit_scores
from tests.store.small_runs import (
    LAYOUT,
    commit_coordinates,
    commit_rollouts,
    complete,
    create,
    grow,
    planned,
    small_manifest,
)


@pytest.fixture
def fence(tmp_path: Path) -> Iterator[Fence]:
    with acquire(LocalFolder(tmp_path / "run"), timeout=60, say=pytest.fail) as lease:
        yield lease.fence


@pytest.fixture
def run(fence: Fence) -> Manifest:
    manifest = create(fence)
    complete(fence, units=[0, 1])
    return manifest


def test_a_copy_has_the_same_hash(fence: Fence, run: Manifest, tmp_path: Path) -> None:
    copied = LocalFolder(Path(shutil.copytree(fence.folder.url, tmp_path / "elsewhere")))
    assert content_hash(copied, require_manifest(copied)) == content_hash(fence.folder, run)


def test_the_same_content_written_by_another_driver_has_the_same_hash(fence: Fence, tmp_path: Path) -> None:
    """Who wrote it when, and in which order, is no content."""
    with acquire(LocalFolder(tmp_path / "other"), timeout=60, say=pytest.fail, after_epoch=6) as lease:
        other = create(lease.fence, execution={"cluster": {"stages": 9}}, sessions=({"epoch": 7},))
        complete(lease.fence, units=[1, 0])
        manifest = create(fence)
        complete(fence)
        complete(lease.fence, units=[2])
        write_index(lease.fence, other)
        assert content_hash(lease.fence.folder, other) == content_hash(fence.folder, manifest)


def test_any_committed_change_is_another_hash(fence: Fence, run: Manifest) -> None:
    seen = [content_hash(fence.folder, run)]

    def assert_new(manifest: Manifest = run) -> None:
        now = content_hash(fence.folder, manifest)
        assert re.fullmatch("[0-9a-f]{64}", now)
        assert now not in seen
        seen.append(now)

    commit_rollouts(fence, LAYOUT, [2])
    assert_new()
    commit_coordinates(fence, LAYOUT, [2])
    assert_new()
    commit_coordinates(fence, LAYOUT, [2], dropped=[9], generation=1)
    assert_new()
    commit_scores(fence, LAYOUT, "judge", 0, [Score(row=0, score=1.0)])
    assert_new()
    commit(fence, ("resid_post_mean", 2, 1), {"objects/x": b"x"}, rows=range(8, 10), dropped={})
    assert_new()
    another = ArraySpec(name="resid_post_last", description="Last token")
    after = write_run(fence, run, replace(run, arrays=(*run.arrays, another)), planned())
    assert_new(after)
    assert_new(grow(fence, after, 2))
    assert_new(small_manifest(identity={"model": {"name": "other"}}, plan=run.plan, metadata=run.metadata))


def test_what_does_not_count_does_not_change_the_hash(fence: Fence, run: Manifest) -> None:
    before = content_hash(fence.folder, run)
    write_index(fence, run)
    for key in ("report.html", "space/latest.json", "activations.zarr/resid_post_mean/c/2/0/0", ".tmp/x", "notes.txt"):
        fence.folder.put_new(key, b"whatever")
    assert content_hash(fence.folder, run) == before
    # A repair that makes the same bytes again is the same content.
    slot = (COORDINATES_RECORD, 0, 0)
    record = read_record(fence.folder, slot, 0)
    objects = {stored.key: fence.folder.get(stored.key) for stored in record.objects}
    commit(fence, slot, objects, rows=range(4), dropped={}, generation=1)
    assert committed_slots(fence.folder)[slot] == 1
    assert content_hash(fence.folder, run) == before


def test_a_damaged_record_has_no_hash(fence: Fence, run: Manifest) -> None:
    record = read_record(fence.folder, (COORDINATES_RECORD, 0, 0), 0)
    fence.folder.replace(record.key, b"damaged")
    with pytest.raises(IntegrityError, match=re.escape(record.key)):
        content_hash(fence.folder, run)


def test_freezing(fence: Fence, run: Manifest) -> None:
    frozen = freeze_run(fence, run)
    assert frozen.frozen is not None
    assert frozen.frozen["content_hash"] == content_hash(fence.folder, run)
    assert time.time() - time.mktime(time.strptime(frozen.frozen["at"], "%Y-%m-%dT%H:%M:%SZ")) + time.timezone < 60
    assert frozen.frozen["by"]
    assert read_manifest(fence.folder) == read_manifest(fence.folder, MANIFEST_COPY) == frozen
    assert frozen.identity_hash == run.identity_hash
    assert content_hash(fence.folder, frozen) == content_hash(fence.folder, run)
    assert open_run(fence.folder).attrs["frozen"] == frozen.frozen["content_hash"]


def test_a_run_that_is_not_frozen_says_so(fence: Fence, run: Manifest) -> None:
    refuse_frozen(fence.folder, run)
    assert open_run(fence.folder).attrs["frozen"] == "no"


def test_freezing_twice_is_refused(fence: Fence, run: Manifest) -> None:
    frozen = freeze_run(fence, run)
    before = fence.folder.get(MANIFEST)
    assert frozen.frozen is not None
    message = (
        f"{fence.folder.url}: the run is frozen as {frozen.frozen['content_hash']}; nothing can be added or changed. "
        "Work on a copy: `personaspace store cp RUN NEW_RUN`, which is not frozen."
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        freeze_run(fence, frozen)
    assert fence.folder.get(MANIFEST) == before


def test_what_changed_meanwhile_is_not_frozen(fence: Fence, run: Manifest) -> None:
    """The caller verified the manifest that it gives."""
    grown = grow(fence, run, 2)
    with pytest.raises(LeaseError, match="was changed by another driver"):
        freeze_run(fence, run)
    assert read_manifest(fence.folder) == grown


def test_a_frozen_run_does_not_grow(fence: Fence, run: Manifest) -> None:
    freeze_run(fence, run)
    before = {path: path.read_bytes() for path in files(fence)}
    with pytest.raises(LeaseError, match="was changed by another driver; start again"):
        grow(fence, run, 2)  # A driver that prepared before it was frozen.
    assert require_manifest(fence.folder).frozen is not None
    data = {path: data for path, data in before.items() if path.name in (MANIFEST, MANIFEST_COPY)}
    assert {path: path.read_bytes() for path in data} == data


def files(fence: Fence) -> list[Path]:
    return [Path(root) / name for root, _, names in os.walk(fence.folder.url) for name in names]


def test_rows_are_part_of_the_hash(fence: Fence, run: Manifest, tmp_path: Path) -> None:
    """Two plans of the same shape that assign rows otherwise."""
    with acquire(LocalFolder(tmp_path / "other"), timeout=60, say=pytest.fail) as lease:
        rows = [replace(row, rollout_id=f"other{row.row}") for row in planned()]
        other = write_run(lease.fence, None, small_manifest(), rows)
        complete(lease.fence, units=[0, 1])
        assert content_hash(lease.fence.folder, other) != content_hash(fence.folder, run)
