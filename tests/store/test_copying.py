"""A run copied to any kind of storage and back is the same run."""

from pathlib import Path

import numpy as np

from personaspace.store import open_run
from personaspace.store.copying import COPYING, copy_run
from personaspace.store.freeze import content_hash
from personaspace.store.lease import acquire
from personaspace.store.local import LocalFolder
from personaspace.store.manifest import require_manifest
from personaspace.store.objects import Folder
from personaspace.store.verify import verify
from tests.store.small_runs import complete, create, grow, values


def copy(source: Folder, target: Folder) -> None:
    with acquire(target, timeout=60, say=print, after_epoch=require_manifest(source).last_epoch) as lease:
        copy_run(source, lease.fence, lambda done, total, size: None)


def test_there_and_back_again(storage: Folder, tmp_path: Path) -> None:
    source, back = LocalFolder(tmp_path / "source"), LocalFolder(tmp_path / "back")
    with acquire(source, timeout=60, say=print) as lease:
        manifest = create(lease.fence)
        complete(lease.fence)
        copy(source, storage)
        grown = grow(lease.fence, manifest, 6)
        complete(lease.fence, grown.layout)
    assert not storage.exists(COPYING)
    assert open_run(storage).sizes["rollout"] == manifest.layout.padded_rows
    copy(source, storage)  # Again, after the source has grown: only the rest is sent.
    copy(storage, back)
    hashes = {content_hash(folder, require_manifest(folder)) for folder in (source, storage, back)}
    assert len(hashes) == 1
    for folder in (storage, back):
        assert verify(folder).harmful == []
        np.testing.assert_array_equal(open_run(folder)["resid_post_mean"].values, values(grown.layout))


def test_a_run_that_is_being_written_is_copied_as_far_as_it_is_committed(tmp_path: Path) -> None:
    source, target = LocalFolder(tmp_path / "source"), LocalFolder(tmp_path / "target")
    with acquire(source, timeout=60, say=print) as lease:
        create(lease.fence)
        complete(lease.fence, units=[0, 1])
        copy(source, target)
    assert verify(target).problems == ()
    assert (open_run(target)["status"].values == 1).sum() == 8
