"""Verification finds what was damaged, names what it costs, and reports nothing that is sound."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from personaspace.store.commit import commit
from personaspace.store.errors import InputError, IntegrityError
from personaspace.store.index import write_index
from personaspace.store.layout import rollouts_key, shard_key
from personaspace.store.lease import LEASE, acquire
from personaspace.store.local import LocalFolder
from personaspace.store.manifest import MANIFEST, MANIFEST_COPY, require_manifest
from personaspace.store.records import COORDINATES_RECORD, ROLLOUTS, Record
from personaspace.store.schema import RESID_POST_MEAN
from personaspace.store.scores import Score, commit_scores
from personaspace.store.verify import verify
from tests.store.small_runs import LAYOUT, complete, create, shard_bytes


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> LocalFolder:
    """A complete run with scores and index, its driver gone."""
    folder = LocalFolder(tmp_path_factory.mktemp("verify") / "run")
    with acquire(folder, timeout=60, say=print) as lease:
        manifest = create(lease.fence)
        complete(lease.fence)
        for unit in range(LAYOUT.units):
            scores = [Score(row=row, score=3.0) for row in LAYOUT.unit_row_range(unit)]
            commit_scores(lease.fence, LAYOUT, "judge", unit, scores)
        write_index(lease.fence, manifest)
    return folder


@pytest.fixture
def run(whole: LocalFolder, tmp_path: Path) -> LocalFolder:
    return copy(whole, tmp_path / "run")


def copy(folder: LocalFolder, target: Path) -> LocalFolder:
    made = LocalFolder(target)
    for entry in folder.list():
        made.replace(entry.key, folder.get(entry.key))
    return made


def found(run: LocalFolder) -> dict[str, str]:
    """Key -> kind of every problem."""
    return {problem.key: problem.kind for problem in verify(run).problems}


def test_a_sound_run_has_no_problems(whole: LocalFolder) -> None:
    seen: list[tuple[int, int]] = []
    result = verify(whole, lambda objects, size: seen.append((objects, size)))
    assert result.problems == ()
    assert result.rows() == []
    assert not result.writing
    assert seen[-1] == (result.objects, result.bytes)
    # Everything but lease, lock, manifests and the index's head is compared with a checksum elsewhere.
    assert result.objects >= len([entry for entry in whole.list() if "json" not in entry.key])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_flipped_bit_is_found_and_nothing_else(whole: LocalFolder, tmp_path: Path, data: st.DataObject) -> None:
    key = data.draw(st.sampled_from([entry.key for entry in whole.list() if entry.bytes]))
    content = bytearray(whole.get(key))
    bit = data.draw(st.integers(0, len(content) * 8 - 1))
    content[bit // 8] ^= 1 << (bit % 8)
    run = copy(whole, tmp_path / "run")
    run.replace(key, bytes(content))
    expected = "index.json" if key.startswith("index.") else key
    assert found(run) == {expected: "damaged"}


def test_every_deleted_object_is_found(whole: LocalFolder, tmp_path: Path) -> None:
    run = copy(whole, tmp_path / "run")
    for entry in list(whole.list()):
        if entry.key == ".lock":
            continue
        run.delete(entry.key)
        problems = found(run)
        if entry.key.startswith("commits/") and "scores" not in entry.key:
            # Nothing rests on this record, so what is left to see are its objects.
            record = Record.decode(whole.get(entry.key), entry.key)
            assert problems == {stored.key: "orphan" for stored in record.objects}
        else:
            key = "index.json" if entry.key.startswith("index.") else entry.key
            assert problems == {key: "damaged" if key == "index.json" else "missing"}
        run.replace(entry.key, whole.get(entry.key))


def test_it_says_which_rollouts_are_lost(run: LocalFolder) -> None:
    run.delete(shard_key(RESID_POST_MEAN, 2, 1))
    result = verify(run)
    assert result.rows() == [8, 9]
    assert [problem.slot for problem in result.harmful] == [(RESID_POST_MEAN, 2, 1)]


def test_a_crash_between_publish_and_record_leaves_an_orphan(tmp_path: Path) -> None:
    run = LocalFolder(tmp_path / "run")
    with acquire(run, timeout=60, say=print) as lease:
        create(lease.fence)
        run.put_new(shard_key(RESID_POST_MEAN, 0, 0), shard_bytes(LAYOUT, 0, 0))
        under_own_lease = verify(run, own_epoch=lease.epoch)
        assert [problem.kind for problem in under_own_lease.problems] == ["orphan"]
    assert found(run) == {shard_key(RESID_POST_MEAN, 0, 0): "orphan"}
    assert verify(run).harmful == []


def test_work_in_hand_of_a_live_driver_is_not_judged(tmp_path: Path) -> None:
    run = LocalFolder(tmp_path / "run")
    with acquire(run, timeout=60, say=print) as lease:
        create(lease.fence)
        run.put_new(shard_key(RESID_POST_MEAN, 0, 0), shard_bytes(LAYOUT, 0, 0))
        run.put_new(".tmp/half", b"ha")
        result = verify(run)
        assert result.writing
        assert result.problems == ()


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        (".tmp/0123", "leftover"),
        ("commits/000000/.nfs000123", "leftover"),
        ("activations.zarr/resid_post_mean/c/0/0/0.abc.partial", "leftover"),
        ("space/0001-abc.zarr/zarr.json", "leftover"),
        ("plan/000001.parquet", "leftover"),
        ("notes.txt", "foreign"),
        ("activations.zarr/extra/zarr.json", "foreign"),
        ("activations.zarr/resid_post_mean/c/99/0/0", "foreign"),
        ("rollouts/000099.parquet", "foreign"),
        ("commits/readme", "foreign"),
    ],
)
def test_what_does_not_belong_is_named(run: LocalFolder, key: str, kind: str) -> None:
    run.replace(key, b"x")
    problems = found(run)
    problems.pop("space/latest.json", None)  # A fit without its pointer is a finding of its own.
    assert problems == {key: kind}


def test_rollouts_made_again_make_their_activations_stale(run: LocalFolder) -> None:
    manifest = require_manifest(run)
    with acquire(run, timeout=60, say=print, after_epoch=manifest.last_epoch) as lease:
        sources = {}
        for group in range(LAYOUT.groups):
            slot = (RESID_POST_MEAN, 0, group)
            key = shard_key(*slot)
            sources[slot] = commit(
                lease.fence,
                slot,
                {key: run.get(key)},
                rows=LAYOUT.unit_row_range(0),
                dropped={},
                source="0" * 64,
                generation=1,
            )
    assert found(run) == {shard_key(*slot): "stale" for slot in sources}
    assert verify(run).rows() == [0, 1, 2, 3]


def test_a_missing_record_is_found_by_what_rests_on_it(run: LocalFolder) -> None:
    manifest = require_manifest(run)
    with acquire(run, timeout=60, say=print, after_epoch=manifest.last_epoch) as lease:
        coordinates = {
            entry.key: run.get(entry.key) for entry in run.list("activations.zarr") if entry.key.endswith("/c/1")
        }
        commit(
            lease.fence,
            (COORDINATES_RECORD, 1, 0),
            coordinates,
            rows=LAYOUT.unit_row_range(1),
            dropped={},
            covers=("resid_post_mean.000", "resid_post_mean.001"),
            source="f" * 64,
            generation=1,
        )
    for key in ("commits/000001/resid_post_mean.001.000.json", shard_key(RESID_POST_MEAN, 1, 1)):
        run.delete(key)
    assert found(run)["commits/000001/resid_post_mean.001.000.json"] == "missing"
    run.delete("commits/000001/rollouts.000.000.json")
    run.delete(rollouts_key(1))
    assert found(run)["commits/000001/rollouts.000.000.json"] == "missing"
    assert (ROLLOUTS, 1, 0) in {problem.slot for problem in verify(run).harmful}


def test_one_sound_copy_of_the_manifest_is_enough(run: LocalFolder) -> None:
    run.replace(MANIFEST, b"{}")
    assert found(run) == {MANIFEST: "damaged"}
    run.replace(MANIFEST_COPY, b"{}")
    with pytest.raises(IntegrityError, match=r"both copies of run\.json are damaged; restore the run from a copy"):
        verify(run)


def test_no_run_here(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no run here \(no run\.json\)"):
        verify(LocalFolder(tmp_path))


def test_an_edited_lease_is_damage(run: LocalFolder) -> None:
    run.replace(LEASE, json.dumps({"epoch": 99}).encode())
    assert found(run) == {LEASE: "damaged"}


def test_copies_of_the_manifest_that_differ(run: LocalFolder) -> None:
    run.replace(MANIFEST_COPY, replace(require_manifest(run), execution={"x": 1}).encode())
    assert found(run) == {MANIFEST_COPY: "damaged"}
