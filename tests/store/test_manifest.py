"""``run.json``: which settings are the same run, and what people are told when they are not."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from personaspace.store.errors import IdentityError, IntegrityError
from personaspace.store.layout import Layout
from personaspace.store.manifest import MANIFEST, Manifest, check_identity, identity_diff, read_manifest, write_session
from personaspace.store.local import LocalFolder

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
        "plan": {"rows": 10, "rows_per_role": [10], "unit_order": [0, 1, 2]},
        "execution": {"cluster": {"stages": 2}},
    }
    return Manifest(**{**fields, **changes})


@pytest.fixture
def folder(tmp_path: Path) -> LocalFolder:
    return LocalFolder(tmp_path / "run")


def edit(folder: LocalFolder, **changes: Any) -> None:
    """What an editor would do to the stored file."""
    folder.replace(MANIFEST, json.dumps({**json.loads(folder.get(MANIFEST)), **changes}).encode())


def test_round_trip(folder: LocalFolder) -> None:
    assert read_manifest(folder) is None
    folder.replace(MANIFEST, manifest(sessions=[{"epoch": 1}]).encode())
    assert read_manifest(folder) == manifest(sessions=[{"epoch": 1}])


def test_identity_hash_is_stable() -> None:
    """Resumes of stored runs depend on this very value."""
    assert manifest().identity_hash == "e5b7a5e96609b549"


def test_identity_hash_ignores_order_and_execution() -> None:
    shuffled = dict(reversed(IDENTITY.items())) | {"generate": {"max_new_tokens": 64, "temperature": 0.7}}
    other = manifest(identity=shuffled, execution={"cluster": {"stages": 4}}, sessions=[{"epoch": 1}])
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


def test_new_run_and_same_identity_are_accepted(folder: LocalFolder) -> None:
    assert check_identity(folder, manifest()) is None
    assert not folder.path.exists()
    folder.replace(MANIFEST, manifest().encode())
    assert check_identity(folder, manifest(execution={})) == manifest()


def test_another_identity_is_refused_and_nothing_changes(folder: LocalFolder) -> None:
    folder.replace(MANIFEST, manifest().encode())
    before = folder.get(MANIFEST)
    planned = manifest(identity={**IDENTITY, "generate": {"temperature": 1.0, "max_new_tokens": 64}})
    message = (
        f"{folder.path}: this run exists with another identity. Stored -> asked for:\n"
        "  generate.temperature: 0.7 -> 1.0\n"
        "Use another --store.run for the new settings, or the stored settings to resume. Nothing was changed."
    )
    with pytest.raises(IdentityError, match=f"^{re.escape(message)}$") as error:
        check_identity(folder, planned)
    assert error.value.exit_code == 2
    assert folder.get(MANIFEST) == before
    assert [path.name for path in folder.path.rglob("*") if path.is_file()] == [MANIFEST]


def test_edited_identity_is_detected(folder: LocalFolder) -> None:
    folder.replace(MANIFEST, manifest().encode())
    edit(folder, identity={**IDENTITY, "generate": {"temperature": 0.1}})
    message = f"{folder.path / MANIFEST}: identity_hash {manifest().identity_hash} does not match the identity"
    with pytest.raises(IntegrityError, match=re.escape(message)):
        read_manifest(folder)


@pytest.mark.parametrize("version", [0, 2, "1"])
def test_other_schema_versions_are_refused(folder: LocalFolder, version: object) -> None:
    folder.replace(MANIFEST, manifest().encode())
    edit(folder, schema_version=version, something_new=1)
    message = f"{folder.path / MANIFEST}: schema_version {version} is not readable, this is 1."
    with pytest.raises(IntegrityError, match=f"^{re.escape(message)}$"):
        read_manifest(folder)


def test_version_is_looked_at_before_anything_else(folder: LocalFolder) -> None:
    folder.replace(MANIFEST, b'{"schema_version": 2, "id": "sha256:ab"}')
    with pytest.raises(IntegrityError, match="schema_version 2 is not readable, this is 1"):
        read_manifest(folder)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"schema_version": 1, "identity_hash": "ab"}'])
def test_what_is_no_manifest_is_one_clear_error(folder: LocalFolder, content: bytes) -> None:
    folder.replace(MANIFEST, content)
    with pytest.raises(IntegrityError, match=rf"^{re.escape(str(folder.path / MANIFEST))}: not a run manifest \("):
        read_manifest(folder)


def test_sessions_add_up_and_execution_is_the_latest(folder: LocalFolder) -> None:
    for epoch, stages in ((1, 2), (2, 4)):
        planned = manifest(execution={"cluster": {"stages": stages}})
        write_session(folder, read_manifest(folder) or planned, planned, {"epoch": epoch})
    stored = read_manifest(folder)
    assert stored == replace(manifest(), execution={"cluster": {"stages": 4}}, sessions=[{"epoch": 1}, {"epoch": 2}])
