"""The command line: the whole job on a tiny model with real Ray, and every bad input with its message and code."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from personaspace.cli import READER_LEFT, main
from personaspace.store import open_run
from personaspace.store.local import LocalFolder
from personaspace.store.rollouts import read_rollouts
from tests.models import tiny_checkpoint

CONFIG = """
model: {{id: {model}, dtype: float32}}
personas: {{only: [pirate, ghost, teacher, doctor], pairing: cycle, max_questions: 8, default_samples: 2}}
generate: {{max_new_tokens: 6, batch_rows: 24}}
extract: {{micro_batch_tokens: 1024, window_rows: 16}}
store: {{root: {root}, run: tiny}}
analysis: {{permutations: 20, components: 3}}
cluster: {{stages: 2, replicas: 2}}
"""


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cluster but the one that the command starts."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


def write_config(folder: Path, model: Path, extra: str = "") -> Path:
    file = folder / "tiny.yaml"
    file.write_text(CONFIG.format(model=model, root=folder / "runs") + extra)
    return file


@pytest.mark.slow
@pytest.mark.usefixtures("alone")
def test_main_job_from_model_to_report(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, model)
    assert main(["run", str(config)]) == 0
    run = tmp_path / "runs" / "tiny"

    dataset = xr.open_zarr(run / "activations.zarr")
    assert dataset["resid_post_mean"].dims == ("rollout", "layer", "hidden")
    assert {"role", "prompt", "question", "n_tokens", "status"} <= set(dataset.coords)
    ok = dataset["status"].values == 1
    assert ok.sum() == 4 * 8 + 2 * 8
    assert np.isfinite(dataset["resid_post_mean"].values[ok]).all()

    rollouts = read_rollouts(LocalFolder(run)).to_pylist()
    assert [rollout["row"] for rollout in rollouts] == list(range(48))
    assert all(1 <= len(rollout["response_token_ids"]) <= 6 for rollout in rollouts)
    opened = open_run(run)
    assert list(opened["n_tokens"].values) == [len(rollout["response_token_ids"]) for rollout in rollouts]
    assert [str(role) for role in opened["role"].values] == [rollout["role"] for rollout in rollouts]

    manifest = json.loads((run / "run.json").read_text())
    assert manifest["identity"]["model"]["files"]["model.safetensors"]
    assert manifest["sessions"][0]["packages"]["torch"]
    page = (run / "report.html").read_text()
    assert "pirate" in page
    assert "Quality of the responses" in page

    warning = "responses were cut off at 6 tokens; only beginnings are averaged; raise generate.max_new_tokens"
    assert f"of 48 {warning}" in " ".join(capsys.readouterr().out.split())
    before = (run / "run.json").read_bytes()
    assert main(["status", str(run)]) == 0
    status = capsys.readouterr().out
    assert "generated  48/48 rollouts" in status
    assert "extracted  48/48 rollouts (0 dropped)" in status
    assert (run / "run.json").read_bytes() == before

    assert main(["extract", str(config), "--cluster.stages", "3"]) == 0
    assert "48 of them done before" in capsys.readouterr().out

    assert main(["generate", str(config), "--generate.seed", "5"]) == 2
    refusal = capsys.readouterr().err
    assert "this run exists with another identity" in refusal
    assert "generate.seed: 0 -> 5" in refusal
    assert "Nothing was changed." in refusal

    larger = ["extract", str(config), "--personas.max-questions", "9"]
    assert main(larger) == 2
    refusal = capsys.readouterr().err
    assert "this run has 48 rollouts; the config plans 6 that it does not have, and lacks 0 of its own." in refusal
    assert "Add --store.grow" in refusal
    assert len(open_run(run)["rollout"]) == 48
    assert main(["generate", *larger[1:], "--store.grow"]) == 0
    assert "(identity " in capsys.readouterr().out
    assert main(["status", str(config)]) == 0
    status = capsys.readouterr().out
    assert "planned    54 rollouts in 2 segments: 5 roles, 9 questions" in status
    assert "generated  54/54 rollouts" in status
    assert "extracted  48/54 rollouts (0 dropped)" in status


def refuse(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str, *, root: Path) -> None:
    before = sorted(root.rglob("*"))
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert sorted(root.rglob("*")) == before


def test_refuses_an_unknown_key(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, model, "extractt: {}\n")
    refuse(capsys, ["run", str(config)], "extractt: unknown key (value {}).", root=tmp_path)


def test_refuses_a_model_that_does_not_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, tmp_path / "nowhere")
    refuse(capsys, ["run", str(config)], f"model.id: {tmp_path / 'nowhere'} does not exist", root=tmp_path)


def test_refuses_a_role_without_instruction(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    roles = tmp_path / "roles"
    roles.mkdir()
    (roles / "default.json").write_text('{"instruction": [{"pos": ""}]}')
    (roles / "ghost.json").write_text('{"questions": []}')
    config = write_config(tmp_path, model)
    arguments = ["run", str(config), "--personas.roles", str(roles)]
    refuse(capsys, arguments, f"{roles / 'ghost.json'}: needs `instruction`", root=tmp_path)


def test_refuses_an_empty_question_list(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "questions.yaml").write_text("version: 1\nquestions: []\n")
    config = write_config(tmp_path, model)
    arguments = ["run", str(config), "--personas.questions", str(tmp_path / "questions.yaml")]
    refuse(capsys, arguments, "give at least one.", root=tmp_path)


def test_refuses_a_model_without_chat_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_checkpoint(tmp_path / "base", chat_template=None)
    config = write_config(tmp_path, model)
    refuse(capsys, ["run", str(config)], "has no chat template. Use `plain` for a base model", root=tmp_path)


def test_refuses_more_stages_than_layer_groups(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, model)
    arguments = ["run", str(config), "--cluster.stages", "7"]
    refuse(capsys, arguments, "cluster.stages: stages must be 1 to 6", root=tmp_path)


def test_refuses_a_target_layer_beyond_the_model(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, model)
    arguments = ["run", str(config), "--analysis.target-layer", "6"]
    refuse(capsys, arguments, "analysis.target_layer: 6; the run has layers 0 to 5.", root=tmp_path)


def test_refuses_a_run_name_with_a_path(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, model)
    refuse(
        capsys, ["run", str(config), "--store.run", "../x"], "store.run: '../x' is no name; use letters", root=tmp_path
    )


def test_refuses_a_relative_store_on_a_cluster(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    config = write_config(tmp_path, model)
    refuse(capsys, ["run", str(config), "--store.root", "runs"], "store.root: runs is relative", root=tmp_path)


def test_status_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refuse(capsys, ["status", str(tmp_path / "runs")], "no run here (no run.json)", root=tmp_path)


def test_status_of_a_damaged_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.json").write_text('{"schema_version": 3}')
    assert main(["status", str(tmp_path)]) == 4
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path}/run.json: 21 bytes that don't match their own checksum")
    assert "Traceback" not in error


def test_credentials_in_a_url_are_refused_and_not_repeated(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, model)
    url = "s3://AKIAEXAMPLE:wJalrSECRET@bucket/runs"
    for arguments in (["run", str(config), "--store.root", url], ["status", url], ["store", "ls", url]):
        assert main(arguments) == 2
        printed = capsys.readouterr()
        assert "s3://...: the URL carries credentials. They belong into the environment" in printed.err
        assert "wJalr" not in printed.out + printed.err
        assert "AKIAEXAMPLE" not in printed.out + printed.err


def test_refuses_layers_beyond_the_model(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, model)
    arguments = ["run", str(config), "--extract.layers", "2", "6"]
    refuse(capsys, arguments, "extract.layers: [6]; give some of the layers 0 to 5.", root=tmp_path)


def test_commands_start_without_what_takes_seconds_to_import() -> None:
    script = "import sys, personaspace.cli, personaspace.store; print(*sys.modules)"
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "transformers", "ray", "dask", "xarray", "pandas", "scipy"} & set(printed.split())


def test_help_lists_commands_and_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "examples:" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    text = capsys.readouterr().out
    for flag in (
        "--model.id",
        "--personas.default-samples",
        "--store.precision",
        "--store.grow",
        "--extract.layers",
        "--cluster.stages",
    ):
        assert flag in text


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    """What `personaspace personas show ghost | head -1` does: the reader leaves while the command still writes."""
    command = [sys.executable, "-m", "personaspace", "personas", "show", "ghost"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as showing:
        assert showing.stdout is not None
        assert showing.stderr is not None
        showing.stdout.close()
        assert showing.stderr.read() == b""
    assert showing.returncode == READER_LEFT
