"""What a run holds reaches the files of other projects and programs, and comes back."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from personaspace.extract.personas import plan_imported
from personaspace.store import open_run
from personaspace.store.errors import InputError
from personaspace.store.exchange.export import directions_of, export
from personaspace.store.exchange.import_run import import_assistant_axis
from personaspace.store.exchange.import_scores import import_scores
from personaspace.store.formats.gguf_files import read_control_vector
from personaspace.store.formats.role_vectors import read_role_vectors
from personaspace.store.formats.safetensors_files import read_directions
from personaspace.store.local import LocalFolder
from personaspace.store.rollouts import read_rollouts
from personaspace.store.schema import RESID_POST_MEAN
from personaspace.store.space import open_space
from tests.store import small_runs
from tests.store.exchange.exported_runs import fitted_run, quiet
from tests.store.exchange.reference_files import PROMPTS, activations, responses, scores, write_output


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> LocalFolder:
    return fitted_run(tmp_path_factory.mktemp("own") / "run")


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
    order = sorted(usable, key=lambda row: (["default", "hacker", "poet"].index(str(before["role"].values[row])), row))
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
