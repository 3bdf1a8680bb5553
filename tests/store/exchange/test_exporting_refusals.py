"""What can't be exported is refused, and nothing is written then; what exists is replaced only if that is allowed."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from personaspace.store import open_run
from personaspace.store.commit import commit
from personaspace.store.creation import write_run
from personaspace.store.errors import InputError, IntegrityError
from personaspace.store.exchange.export import EXPORTS, export
from personaspace.store.layout import rollouts_key
from personaspace.store.lease import Fence
from personaspace.store.local import LocalFolder
from personaspace.store.records import ROLLOUTS, record_key
from personaspace.store.rollouts import encode_rollouts
from tests.store import small_runs
from tests.store.exchange.exported_runs import PLACE, fitted_run, make, quiet


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> LocalFolder:
    return fitted_run(tmp_path_factory.mktemp("own") / "run")


@pytest.mark.parametrize(
    ("format_", "changes", "message"),
    [
        (
            "csv",
            {},
            (
                "export: 'csv' is not a format; choose one of assistant-axis, safetensors, gguf, parquet, dataset, "
                "tables, transcripts."
            ),
        ),
        ("assistant-axis", {"roles": ["pirate"]}, "no role 'pirate' in this run; it has default, poet, hacker."),
        ("safetensors", {"roles": ["pirate"]}, "the fit has no role 'pirate'; it has poet, hacker, default."),
        ("assistant-axis", {"layers": [7]}, "the fit has no layer 7; it has 0, 1, 2, 3, 4."),
        ("parquet", {"layers": [5]}, "the fit has no layer 5; it has 0, 1, 2, 3, 4."),
        ("assistant-axis", {"scores": "me"}, "no scores of 'me'. Judges with scores: gpt."),
        ("assistant-axis", {"sample": 1}, "no usable rollouts of default, poet, hacker with sample 1: 0 are dropped"),
        ("gguf", {"roles": ["poet", "hacker"]}, "2 roles are given; a control vector is one direction"),
        ("gguf", {"roles": ["default"]}, "there is no way from the default role to itself"),
        ("dataset", {"license": "My Own"}, "Dataset card: license is 'My Own'"),
    ],
)
def test_refused_exports(
    own: LocalFolder, tmp_path: Path, format_: str, changes: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as error:
        export(own, tmp_path / PLACE.get(format_, "out"), format_, say=quiet, **changes)
    assert message in str(error.value)
    assert not list(tmp_path.iterdir())


# Of conversations: tests/cluster/test_conversations.py.
@pytest.mark.parametrize("format_", [name for name in EXPORTS if name != "transcripts"])
def test_what_exists_is_replaced_only_if_allowed(own: LocalFolder, tmp_path: Path, format_: str) -> None:
    place = tmp_path / PLACE[format_]
    export(own, place, format_, roles=["hacker"], say=quiet)
    with pytest.raises(InputError, match="exists"):
        export(own, place, format_, roles=["poet"], say=quiet)
    if place.is_dir():
        (place / "mine.txt").write_text("stays")
    export(own, place, format_, roles=["poet"], overwrite=True, say=quiet)
    if format_ == "assistant-axis":
        assert [file.name for file in (place / "responses").iterdir()] == ["poet.jsonl"]
        assert not (place / "scores").exists()
    if place.is_dir():
        assert (place / "mine.txt").read_text() == "stays"
    assert len(list(tmp_path.iterdir())) == (2 if format_ == "safetensors" else 1)


@pytest.mark.parametrize("format_", EXPORTS)
def test_nothing_is_written_into_a_run(own: LocalFolder, format_: str) -> None:
    before = list(own.list())
    for place in (own.path, own.path / PLACE[format_], own.path / "deep" / PLACE[format_]):
        with pytest.raises(InputError, match=f"lies in the run {own.path}; choose another place"):
            export(own, place, format_, overwrite=True, say=quiet)
    assert list(own.list()) == before


def test_a_manifest_must_not_look_like_a_run(own: LocalFolder, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"its manifest would be run\.json"):
        export(own, tmp_path / "run.safetensors", "safetensors", say=quiet)


def test_half_a_run_without_a_fit(tmp_path: Path) -> None:
    def fill(fence: Fence) -> None:
        small_runs.create(fence)
        small_runs.complete(fence, units=[1])

    folder = make(tmp_path / "run", fill)
    said: list[str] = []
    export(folder, tmp_path / "out", "assistant-axis", say=said.append)
    assert said[0] == f"{folder.url}: 4 rollouts of 1 roles; left out: 0 dropped, 6 pending"
    assert said[1] == f"{folder.url}: no fit yet, so vectors and axis are left out; run `fit` to have them"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["activations", "responses"]
    for format_ in ("safetensors", "gguf", "parquet"):
        with pytest.raises(InputError, match="no persona space yet; run `fit` first"):
            export(folder, tmp_path / PLACE[format_], format_, say=quiet)
    with pytest.raises(InputError, match=r"layers \[9\] are not stored for every rollout; 0 to 4 are\."):
        export(folder, tmp_path / "more", "assistant-axis", layers=[9], say=quiet)


def test_an_empty_run_has_nothing_to_export(tmp_path: Path) -> None:
    folder = make(tmp_path / "run", small_runs.create)
    with pytest.raises(InputError, match="no usable rollouts of default, poet, hacker: 0 are dropped, 10 pending"):
        export(folder, tmp_path / "out", "assistant-axis", say=quiet)
    with pytest.raises(InputError, match="no run here"):
        export(LocalFolder(tmp_path / "nowhere"), tmp_path / "out", "dataset", say=quiet)


def samples(path: Path, ids: tuple[str, ...] = small_runs.ROLES) -> LocalFolder:
    """A run in which `default` (or whatever its name is) has two samples of prompt 0 and question 0."""

    def fill(fence: Fence) -> None:
        rows = [replace(row, prompt=0, question=0, sample=row.row % 2) for row in small_runs.planned()][:2]
        roles = [{"id": role, "kind": "any", "description": "", "prompts": ["A"]} for role in ids]
        tables = {**small_runs.small_manifest().tables, "roles": roles}
        layout = replace(small_runs.LAYOUT, segments=(2,))
        manifest = small_runs.small_manifest(layout, tables=tables)
        write_run(fence, None, manifest, rows)
        rollouts = [replace(small_runs.rollout(row), role=ids[0]) for row in rows]
        commit(fence, (ROLLOUTS, 0, 0), {rollouts_key(0): encode_rollouts(rollouts)}, rows=range(2), dropped={})
        small_runs.commit_shards(fence, layout, [(0, 0), (0, 1)])
        small_runs.commit_coordinates(fence, layout, [0])

    return make(path, fill)


def test_one_of_several_samples_has_to_be_chosen(tmp_path: Path) -> None:
    folder = samples(tmp_path / "run")
    assert open_run(folder)["sample"].values.tolist()[:2] == [0, 1]
    with pytest.raises(InputError) as error:
        export(folder, tmp_path / "out", "assistant-axis", say=quiet)
    assert "role 'default' has samples 0 and 1 of prompt 0 and question 0" in str(error.value)
    assert "Choose one, such as sample 0." in str(error.value)
    export(folder, tmp_path / "out", "assistant-axis", sample=1, say=quiet)
    assert len((tmp_path / "out" / "responses" / "default.jsonl").read_text().splitlines()) == 1
    export(folder, tmp_path / "all", "dataset", say=quiet)
    assert pq.read_metadata(tmp_path / "all" / "data" / "rollouts" / "000000.parquet").num_rows == 2


@pytest.mark.parametrize("role", ["../evil", "/tmp/evil", "..", "a/b", "a\x00b", ""])
@pytest.mark.parametrize("format_", ["assistant-axis", "dataset"])
def test_roles_that_lead_out_of_the_folder_are_refused(tmp_path: Path, role: str, format_: str) -> None:
    folder = samples(tmp_path / "run", (role, "poet", "hacker"))
    with pytest.raises(InputError, match="can't be a file name"):
        export(folder, tmp_path / "deep" / "out", format_, sample=0, say=quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_crash_leaves_nothing_behind(own: LocalFolder, tmp_path: Path) -> None:
    """The second role's rollouts are damaged: what was written of the first goes, too."""
    shutil.copytree(own.path, tmp_path / "run")
    folder = LocalFolder(tmp_path / "run")
    folder.delete(record_key((ROLLOUTS, 1, 0), 0))
    said: list[str] = []
    with pytest.raises(IntegrityError, match="unit 1 has activations, but its rollouts are missing"):
        export(folder, tmp_path / "out", "assistant-axis", say=said.append)
    assert said[-1] == "default: 4 rollouts (1 of 3 roles)"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
