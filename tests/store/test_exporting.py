"""What a run holds reaches the files of other projects and programs, and comes back."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from personaspace.analysis.config import AnalysisConfig
from personaspace.analysis.fit import fit
from personaspace.extract.personas import plan_imported
from personaspace.store import open_run
from personaspace.store.commit import ROLLOUTS, commit, record_key
from personaspace.store.creation import write_run
from personaspace.store.errors import InputError, IntegrityError
from personaspace.store.exporting import EXPORTS, directions_of, export
from personaspace.store.formats.gguf_files import read_control_vector
from personaspace.store.formats.role_vectors import read_role_vectors
from personaspace.store.formats.safetensors_files import read_directions
from personaspace.store.importing import import_assistant_axis
from personaspace.store.importing_scores import import_scores
from personaspace.store.layout import rollouts_key
from personaspace.store.lease import Fence, acquire
from personaspace.store.local import LocalFolder
from personaspace.store.rollouts import encode_rollouts, read_rollouts
from personaspace.store.schema import RESID_POST_MEAN
from personaspace.store.scores import Score, commit_scores
from personaspace.store.space import open_space
from tests.store import small_runs
from tests.store.reference_files import PROMPTS, activations, responses, scores, write_output

PLACE = {
    "assistant-axis": "out",
    "safetensors": "d.safetensors",
    "gguf": "d.gguf",
    "parquet": "d.parquet",
    "dataset": "out",
}
"""Format -> a name for what is exported."""


def quiet(_: str) -> None:
    pass


def make(path: Path, fill: Callable[[Fence], object]) -> LocalFolder:
    folder = LocalFolder(path)
    with acquire(folder, timeout=60, say=pytest.fail) as lease:
        fill(lease.fence)
    return folder


def rollouts_with_system_prompts(fence: Fence) -> None:
    """Those of the small runs, as prompted."""
    rows = small_runs.planned()
    for unit in range(small_runs.LAYOUT.units):
        planned = small_runs.LAYOUT.unit_row_range(unit)
        chosen = [
            replace(small_runs.rollout(row), messages=[{"role": "system", "content": "AB"[row.prompt]}, *rest])
            for row in rows
            if row.row in planned
            for rest in [small_runs.rollout(row).messages]
        ]
        objects = {rollouts_key(unit): encode_rollouts(chosen)}
        commit(fence, (ROLLOUTS, unit, 0), objects, rows=planned, dropped={})


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> LocalFolder:
    """A run as we generate them; row 5 (`poet`) is dropped; scored by one judge, in part; fitted."""

    def fill(fence: Fence) -> None:
        small_runs.create(fence)
        rollouts_with_system_prompts(fence)
        small_runs.commit_shards(fence, small_runs.LAYOUT, small_runs.ALL)
        small_runs.commit_coordinates(fence, small_runs.LAYOUT, range(3), dropped=[5])
        scored = [Score(row=0, score=3), Score(row=3, score=1)]
        commit_scores(fence, small_runs.LAYOUT, "gpt", 0, scores=scored)

    folder = make(tmp_path_factory.mktemp("own") / "run", fill)
    fit(folder, AnalysisConfig(permutations=5, components=1))
    return folder


@pytest.fixture(scope="module")
def out(own: LocalFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run as files of the reference project."""
    place = tmp_path_factory.mktemp("exported") / "out"
    export(own, place, "assistant-axis", say=quiet)
    return place


def test_files_as_the_reference_project_reads_them(own: LocalFolder, out: Path) -> None:
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()) == sorted(
        [
            *(f"{part}/{role}{ending}" for part, ending in
              {"responses": ".jsonl", "activations": ".pt", "vectors": ".pt"}.items() for role in small_runs.ROLES),
            "scores/default.json",
            "axis.pt",
        ]
    )  # fmt: skip
    lines = [json.loads(line) for line in (out / "responses" / "poet.jsonl").read_text().splitlines()]
    assert lines[1] == {
        "system_prompt": "A",
        "prompt_index": 0,
        "question_index": 0,
        "question": "q0?",
        "label": "pos",
        "conversation": [
            {"role": "system", "content": "A"},
            {"role": "user", "content": "q0?"},
            {"role": "assistant", "content": "Answer 6"},
        ],
    }
    tensors = torch.load(out / "activations" / "poet.pt", weights_only=True)
    assert list(tensors) == ["pos_p0_q1", "pos_p0_q0", "pos_p1_q1"]  # rows 4, 6 and 7
    stored = torch.from_numpy(small_runs.values()[6]).to(torch.bfloat16)
    assert torch.equal(tensors["pos_p0_q0"], stored)
    assert json.loads((out / "scores" / "default.json").read_text()) == {"pos_p0_q0": 3, "pos_p1_q0": 1}
    space = open_space(own)
    assert torch.equal(torch.load(out / "axis.pt"), torch.from_numpy(space["axis"].values))
    default, poet = (torch.load(out / "vectors" / f"{role}.pt", weights_only=True) for role in ("default", "poet"))
    assert (default["type"], poet["type"], poet["role"]) == ("mean", "pos_all", "poet")
    assert torch.equal(poet["vector"], torch.from_numpy(space["role_vector"].sel(role="poet").values))
    # As the project's own last step makes the axis of the vectors.
    others = torch.stack([torch.load(out / "vectors" / f"{role}.pt")["vector"] for role in ("poet", "hacker")])
    assert torch.allclose(default["vector"] - others.mean(0), torch.load(out / "axis.pt"), atol=1e-6)


def test_exported_responses_can_be_planned_and_run_again(own: LocalFolder, out: Path) -> None:
    plan = plan_imported(out / "responses")
    stored = {entry["response"]: entry for entry in read_rollouts(own).to_pylist() if entry["row"] != 5}
    assert {row.response for row in plan.rows} == set(stored)
    for row in plan.rows:
        entry = stored[str(row.response)]
        assert list(row.messages) == entry["messages"]
        assert plan.roles[row.role_id].id == entry["role"]


def test_a_run_comes_back_from_its_files(own: LocalFolder, out: Path, tmp_path: Path) -> None:
    again = LocalFolder(tmp_path / "again")
    import_assistant_axis(out, again, model="tiny", judge="gpt", say=quiet)
    before, after = open_run(own), open_run(again)
    usable = np.flatnonzero(before["status"].values == 1)
    assert after.sizes["rollout"] == len(usable) == 9
    # Roles by name, and rows within them as they were.
    order = sorted(usable, key=lambda row: (["default", "hacker", "poet"].index(before["role"].values[row]), row))
    values, rounded = before[RESID_POST_MEAN].values[order], after[RESID_POST_MEAN].values
    assert (rounded == torch.from_numpy(values).to(torch.bfloat16).float().numpy()).all()
    np.testing.assert_allclose(rounded, values, rtol=2**-8)
    for name in ("role", "prompt", "score"):
        np.testing.assert_array_equal(after[name].values, before[name].values[order])
    assert after["question_id"].values.tolist() == [f"aa{before['question'].values[row]}" for row in order]


def test_reference_files_come_back_from_a_run(tmp_path: Path) -> None:
    source = write_output(tmp_path / "source")
    folder = LocalFolder(tmp_path / "run")
    import_assistant_axis(source, folder, model="m", unit_rows=4, say=quiet)
    export(folder, tmp_path / "out", "assistant-axis", say=quiet)
    for role, prompts in PROMPTS.items():
        place = {prompt: number for number, prompt in enumerate(prompts)}  # a run numbers its prompts from 0 up
        lines = (tmp_path / "out" / "responses" / f"{role}.jsonl").read_text().splitlines()
        expected = [line | {"prompt_index": place[line["prompt_index"]]} for line in responses(role)]
        assert [json.loads(line) for line in lines] == expected
        renamed = {f"pos_p{place[prompt]}_q{question}": f"pos_p{prompt}_q{question}" for prompt in prompts
                   for question in (5, 17, 40)}  # fmt: skip
        tensors = torch.load(tmp_path / "out" / "activations" / f"{role}.pt", weights_only=True)
        assert all(torch.equal(tensors[new], activations(role)[old]) for new, old in renamed.items())
        judged = json.loads((tmp_path / "out" / "scores" / f"{role}.json").read_text())
        assert judged == {new: scores(role)[old] for new, old in renamed.items()}
    assert not (tmp_path / "out" / "vectors").exists()  # no fit yet


def test_scores_of_exported_responses_come_back(own: LocalFolder, out: Path, tmp_path: Path) -> None:
    """The responses are judged elsewhere, by somebody who knows the files only."""
    shutil.copytree(own.path, tmp_path / "run")
    shutil.copytree(out, tmp_path / "out")
    (tmp_path / "out" / "scores" / "poet.json").write_text('{"pos_p0_q0": 2}')
    (tmp_path / "out" / "scores" / "default.json").unlink()
    folder = LocalFolder(tmp_path / "run")
    import_scores(tmp_path / "out", folder, judge="other", say=quiet)
    score = open_run(folder, scores="other")["score"].values
    assert np.flatnonzero(~np.isnan(score)).tolist() == [6]
    with pytest.raises(InputError, match="gpt, other have judged this run; name one of them"):
        export(folder, tmp_path / "again", "assistant-axis", say=quiet)
    export(folder, tmp_path / "again", "assistant-axis", scores="other", say=quiet)
    assert [file.name for file in (tmp_path / "again" / "scores").iterdir()] == ["poet.json"]


def test_some_roles_and_layers(own: LocalFolder, tmp_path: Path) -> None:
    said: list[str] = []
    export(own, tmp_path / "out", "assistant-axis", roles=["poet", "default"], layers=[4, 1], say=said.append)
    assert said[0] == f"{own.url}: 7 rollouts of 2 roles; left out: 1 dropped, 0 pending"
    assert f"{tmp_path / 'out'}: layers 1 to 1, 4 to 4, one after another in each tensor" in said
    assert sorted(file.name for file in (tmp_path / "out" / "activations").iterdir()) == ["default.pt", "poet.pt"]
    tensors = torch.load(tmp_path / "out" / "activations" / "poet.pt", weights_only=True)
    assert torch.equal(tensors["pos_p1_q1"], torch.from_numpy(small_runs.values()[7][[1, 4]]).to(torch.bfloat16))
    axis = torch.load(tmp_path / "out" / "axis.pt")
    assert torch.equal(axis, torch.from_numpy(open_space(own)["axis"].values[[1, 4]]))


def test_directions_of_the_fit(own: LocalFolder) -> None:
    space, found = open_space(own), directions_of(own)
    assert (found.model, found.layers, found.roles, found.counts) == (
        "tiny",
        (0, 1, 2, 3, 4),
        ("poet", "hacker"),
        (3, 2),
    )
    assert found.axis_LD is not None
    assert found.role_RLD is not None
    np.testing.assert_array_equal(found.axis_LD, space["axis"].values)
    np.testing.assert_array_equal(found.role_RLD, space["role_vector"].values)
    assert found.provenance["run"] == "run"
    assert found.provenance["axis"] == "mean(default) - mean of 2 roles"
    assert "lossless" in found.provenance["precision"]


def test_files_for_steering(own: LocalFolder, tmp_path: Path) -> None:
    found = directions_of(own)
    export(own, tmp_path / "d.safetensors", "safetensors", say=quiet)
    back = read_directions(tmp_path / "d.safetensors")
    assert (back.roles, back.layers, dict(back.provenance)) == (found.roles, found.layers, dict(found.provenance))
    np.testing.assert_array_equal(back.axis_LD, found.axis_LD)
    export(own, tmp_path / "d.parquet", "parquet", roles=["hacker"], layers=[2], say=quiet)
    vectors = read_role_vectors(tmp_path / "d.parquet")
    assert (vectors.roles, vectors.layers) == (("hacker",), (2,))
    np.testing.assert_array_equal(vectors.role_LD("hacker"), found.role_LD("hacker")[[2]])
    export(own, tmp_path / "axis.gguf", "gguf", model_hint="llama", say=quiet)
    axis = read_control_vector(tmp_path / "axis.gguf")
    assert (axis.model_hint, axis.layers) == ("llama", (1, 2, 3, 4))
    export(own, tmp_path / "poet.gguf", "gguf", roles=["poet"], say=quiet)
    poet = read_control_vector(tmp_path / "poet.gguf")
    assert poet.model_hint == "tiny"
    np.testing.assert_array_equal(poet.direction_LD, (found.role_LD("poet") - found.role_LD("default"))[1:])


def test_dataset_folder(own: LocalFolder, tmp_path: Path) -> None:
    export(own, tmp_path / "out", "dataset", license="cc-by-4.0", say=quiet)
    front = yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---")[1])
    assert (front["license"], front["pretty_name"]) == ("cc-by-4.0", "Personas of tiny")
    table = pq.read_table(tmp_path / "out" / "data" / "rollouts" / "000000.parquet").to_pylist()
    assert [entry["role"] for entry in table] == ["default"] * 4 + ["poet"] * 3 + ["hacker"] * 2
    assert table[3] == {
        "rollout_id": f"{3:016x}",
        "role": "default",
        "prompt": 1,
        "sample": 0,
        "question_id": "q0",
        "question": "q0?",
        "messages": [{"role": "system", "content": "B"}, {"role": "user", "content": "q0?"}],
        "response": "Answer 3",
        "finish_reason": "stop",
        "n_tokens": 13,
        "score": 1.0,
    }
    assert table[4]["score"] is None
    assert pq.read_metadata(tmp_path / "out" / "data" / "role_vectors" / "000000.parquet").num_rows == 15


def test_what_is_unknown_is_null_in_a_dataset(tmp_path: Path) -> None:
    source = write_output(tmp_path / "source", ["ghost"])
    shutil.rmtree(source / "scores")
    folder = LocalFolder(tmp_path / "run")
    import_assistant_axis(source, folder, model="org/m", say=quiet)
    export(folder, tmp_path / "out", "dataset", say=quiet)
    table = pq.read_table(tmp_path / "out" / "data" / "rollouts" / "000000.parquet").to_pylist()
    assert {(entry["n_tokens"], entry["score"]) for entry in table} == {(None, None)}
    assert "- Model: `org/m`\n" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("format_", "changes", "message"),
    [
        (
            "csv",
            {},
            "export: 'csv' is not a format; choose one of assistant-axis, safetensors, gguf, parquet, dataset.",
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


@pytest.mark.parametrize("format_", EXPORTS)
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
