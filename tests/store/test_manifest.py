"""``run.json``: which settings are the same run, and what people are told when they are not."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from personaspace.store.errors import IdentityError, InputError, IntegrityError, LeaseError
from personaspace.store.layout import Layout
from personaspace.store.lease import Fence, acquire
from personaspace.store.local import LocalFolder
from personaspace.store.manifest import (
    MANIFEST,
    MANIFEST_COPY,
    Manifest,
    check_identity,
    identity_diff,
    read_manifest,
    refuse_frozen,
    require_manifest,
    write_manifest,
)
from personaspace.store.records import StoredObject
from personaspace.store.schema import ArraySpec
from personaspace.store.sealed import seal, unseal

IDENTITY = {
    "model": {"name": "tiny", "revision": None, "files": {"model.safetensors": "ab12"}},
    "generate": {"temperature": 0.7, "max_new_tokens": 64},
    "extract": {"arrays": ["resid_post_mean"]},
}


def manifest(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "identity": IDENTITY,
        "layout": Layout(segments=(10,), layers=5, hidden=6, unit_rows=4, layer_group=3),
        "tables": {"roles": [{"id": "poet", "kind": "dramatic"}], "questions": [{"id": "q1", "text": "Why?"}]},
        "arrays": (ArraySpec(name="resid_post_mean", description="Means", layers=(0, 3)),),
        "plan": (StoredObject(key="plan/000000.parquet", bytes=7, sha256="ab" * 32),),
        "unit_order": (0, 2, 1),
        "metadata": (StoredObject(key="activations.zarr/zarr.json", bytes=9, sha256="cd" * 32),),
        "execution": {"cluster": {"stages": 2}},
    }
    return Manifest(**{**fields, **changes})


@pytest.fixture
def folder(tmp_path: Path) -> LocalFolder:
    return LocalFolder(tmp_path / "run")


@pytest.fixture
def fence(folder: LocalFolder) -> Iterator[Fence]:
    with acquire(folder, timeout=60, say=pytest.fail) as lease:
        yield lease.fence


def edit(folder: LocalFolder, **changes: Any) -> None:
    """A stored manifest whose seal holds, with other content."""
    folder.replace(MANIFEST, seal({**unseal(folder.get(MANIFEST), MANIFEST), **changes}))


def test_round_trip(folder: LocalFolder) -> None:
    assert read_manifest(folder) is None
    for written in (
        manifest(),
        manifest(sessions=({"epoch": 1},), layout=manifest().layout.grow(3), spans_per_rollout=2),
        manifest(arrays=(ArraySpec(name="a", description="", spans=("whole",)), ArraySpec(name="b", description=""))),
        manifest(frozen={"content_hash": "ab", "at": "now", "by": "me"}),
    ):
        folder.replace(MANIFEST, written.encode())
        assert read_manifest(folder) == written
        assert require_manifest(folder).encode() == written.encode()


def test_last_epoch() -> None:
    assert manifest().last_epoch == 0
    assert manifest(sessions=({"epoch": 1}, {"epoch": 7}, {"epoch": 3})).last_epoch == 7


def test_identity_hash_is_stable() -> None:
    """Resumes of stored runs depend on this very value."""
    assert manifest().identity_hash == "e5b7a5e96609b549"


def test_identity_hash_ignores_order_and_execution() -> None:
    shuffled = dict(reversed(IDENTITY.items())) | {"generate": {"max_new_tokens": 64, "temperature": 0.7}}
    other = manifest(
        identity=shuffled,
        layout=manifest().layout.grow(5),
        arrays=(),
        execution={"cluster": {"stages": 4}},
        sessions=({"epoch": 1},),
    )
    assert other.identity_hash == manifest().identity_hash


LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
TREES = st.dictionaries(
    st.text("abc", min_size=1, max_size=3),
    LEAVES | st.lists(LEAVES, max_size=2) | st.dictionaries(st.text("abc", min_size=1), LEAVES, min_size=1, max_size=3),
    max_size=4,
)


@given(TREES)
@settings(deadline=None)
def test_a_stored_identity_equals_itself(identity: Mapping[str, Any]) -> None:
    stored = Manifest.decode(manifest(identity=identity).encode(), "run.json")
    assert stored.identity_hash == manifest(identity=identity).identity_hash
    assert identity_diff(stored.identity, identity) == []


@given(TREES, TREES)
@example({"temperature": 1}, {"temperature": 1.0})
@example({"files": {}}, {})
@settings(deadline=None)
def test_the_diff_is_empty_only_for_the_same_identity(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    same = manifest(identity=stored).identity_hash == manifest(identity=asked).identity_hash
    assert (identity_diff(stored, asked) == []) == same


def test_diff_names_key_and_both_values() -> None:
    asked = {
        "model": {**IDENTITY["model"], "revision": "main", "files": {"other.safetensors": "ab12"}},
        "generate": {"temperature": 1.0, "max_new_tokens": 64},
        "extract": {"arrays": ["resid_post_mean", "resid_post_last"]},
    }
    assert identity_diff(IDENTITY, asked) == [
        'extract.arrays: ["resid_post_mean"] -> ["resid_post_mean", "resid_post_last"]',
        "generate.temperature: 0.7 -> 1.0",
        'model.files.model.safetensors: "ab12" -> (absent)',
        'model.files.other.safetensors: (absent) -> "ab12"',
        'model.revision: null -> "main"',
    ]


def test_the_same_identity_is_accepted(folder: LocalFolder) -> None:
    check_identity(folder, manifest(), json.loads(json.dumps(IDENTITY)))
    assert not folder.path.exists()


def test_another_identity_is_refused(folder: LocalFolder) -> None:
    asked = {**IDENTITY, "generate": {"temperature": 1.0, "max_new_tokens": 64}}
    message = (
        f"{folder.path}: this run exists with another identity. Stored -> asked for:\n"
        "  generate.temperature: 0.7 -> 1.0\n"
        "Use another --store.run for the new settings, or the stored settings to resume. Nothing was changed."
    )
    with pytest.raises(IdentityError, match=f"^{re.escape(message)}$") as error:
        check_identity(folder, manifest(), asked)
    assert error.value.exit_code == 2
    assert not folder.path.exists()


def test_an_identity_that_is_not_its_hash_is_detected(folder: LocalFolder) -> None:
    folder.replace(MANIFEST, manifest().encode())
    edit(folder, identity={**IDENTITY, "generate": {"temperature": 0.1}})
    message = f"{folder.path / MANIFEST}: identity_hash {manifest().identity_hash} does not match the identity"
    with pytest.raises(IntegrityError, match=re.escape(message)):
        read_manifest(folder)


def test_a_manifest_edited_by_hand_is_detected(folder: LocalFolder) -> None:
    data = manifest().encode()
    assert b'"stages": 2' in data
    folder.replace(MANIFEST, data.replace(b'"stages": 2', b'"stages": 3'))
    message = (
        f"{folder.path / MANIFEST}: {len(data)} bytes that don't match their own checksum: damaged, or edited by hand. "
        "`personaspace store verify` shows all damage, `personaspace store repair` mends it."
    )
    with pytest.raises(IntegrityError, match=f"^{re.escape(message)}$"):
        read_manifest(folder)


@given(bit=st.integers(0, len(manifest().encode()) * 8 - 1))
@settings(max_examples=300, deadline=None)
def test_a_flipped_bit_is_found(bit: int) -> None:
    damaged = bytearray(manifest().encode())
    damaged[bit // 8] ^= 1 << bit % 8
    with pytest.raises(IntegrityError, match=r"^run\.json: "):
        Manifest.decode(bytes(damaged), "run.json")


@pytest.mark.parametrize("version", [0, 2, 4, "3", None])
def test_other_schema_versions_are_refused(folder: LocalFolder, version: object) -> None:
    folder.replace(MANIFEST, manifest().encode())
    edit(folder, schema_version=version, something_new=1)
    message = f"{folder.path / MANIFEST}: schema_version {version} is not readable, this is 3."
    with pytest.raises(IntegrityError, match=f"^{re.escape(message)}$"):
        read_manifest(folder)


def test_version_is_looked_at_before_anything_else(folder: LocalFolder) -> None:
    """Of a run of the first release, whose manifest had no seal, too."""
    folder.replace(MANIFEST, b'{"schema_version": 1, "id": "sha256:ab"}')
    with pytest.raises(IntegrityError, match="schema_version 1 is not readable, this is 3"):
        read_manifest(folder)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b"7", b'{"identity_hash": "ab"}'])
def test_what_is_no_manifest_is_one_clear_error(folder: LocalFolder, content: bytes) -> None:
    folder.replace(MANIFEST, content)
    message = f"{folder.path / MANIFEST}: not a run manifest ("
    with pytest.raises(IntegrityError, match=f"^{re.escape(message)}.*`personaspace store repair` restores it"):
        read_manifest(folder)


@pytest.mark.parametrize("changes", [{"layout": {"segments": [3]}}, {"plan": [{}]}, {"more": 1}, {"arrays": None}])
def test_a_sealed_document_that_is_no_manifest_is_refused(folder: LocalFolder, changes: dict[str, Any]) -> None:
    folder.replace(MANIFEST, manifest().encode())
    edit(folder, **changes)
    with pytest.raises(IntegrityError, match=f"^{re.escape(str(folder.path / MANIFEST))}: not a run manifest \\("):
        read_manifest(folder)


def test_no_run_is_one_clear_error(folder: LocalFolder) -> None:
    message = f"{folder.path}: no run here (no run.json). Give the folder of a run, such as runs/demo."
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        require_manifest(folder)


def test_writing_keeps_a_copy_and_replaces_only_what_was_seen(fence: Fence) -> None:
    first = manifest()
    second = replace(first, sessions=({"epoch": 1},))
    write_manifest(fence, None, first)
    write_manifest(fence, first, second)
    assert read_manifest(fence.folder) == read_manifest(fence.folder, MANIFEST_COPY) == second
    for before in (None, first):
        message = f"{fence.folder.url}/{MANIFEST}: was changed by another driver; start again."
        with pytest.raises(LeaseError, match=f"^{re.escape(message)}$"):
            write_manifest(fence, before, replace(first, execution={"lost": True}))
    assert read_manifest(fence.folder) == read_manifest(fence.folder, MANIFEST_COPY) == second


def test_what_was_read_can_be_replaced(fence: Fence) -> None:
    """Tuples come back as lists, floats as they print: what is compared is the bytes."""
    write_manifest(fence, None, manifest(execution={"a": (1, 2), "b": 1e-05, "c": "ω"}))
    stored = require_manifest(fence.folder)
    write_manifest(fence, stored, replace(stored, execution={}))
    assert require_manifest(fence.folder).execution == {}


def test_a_fenced_out_driver_writes_no_manifest(fence: Fence) -> None:
    write_manifest(fence, None, manifest())
    before = fence.folder.get(MANIFEST)
    with pytest.raises(LeaseError, match="lease epoch 0 has ended"):
        write_manifest(Fence(fence.folder, 0), manifest(), manifest(execution={}))
    assert fence.folder.get(MANIFEST) == before


def test_a_frozen_run_is_refused(folder: LocalFolder) -> None:
    refuse_frozen(folder, None)
    refuse_frozen(folder, manifest())
    message = (
        f"{folder.path}: the run is frozen as 1f2e; nothing can be added or changed. "
        "Work on a copy: `personaspace store cp RUN NEW_RUN`, which is not frozen."
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        refuse_frozen(folder, manifest(frozen={"content_hash": "1f2e", "at": "now", "by": "me"}))
