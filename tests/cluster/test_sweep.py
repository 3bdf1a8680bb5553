"""A sweep of a tiny model, end to end: every dose a run, a page and tables; the second time nothing is done again."""

from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import yaml

from personaspace.analysis.doses.report import MARKER
from personaspace.analysis.drift.run import drift_of
from personaspace.cli import main
from personaspace.store.formats.torch_files import write_axis
from tests.extract.judging.chat_server import MODEL, ChatServer
from tests.models import tiny_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("commands_join")]


@pytest.mark.nightly
def test_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_checkpoint(tmp_path / "model")
    write_axis(tmp_path / "axis.pt", np.random.default_rng(0).normal(size=(6, 32)).astype(np.float32))
    document = {
        "model": {"id": str(tmp_path / "model"), "dtype": "float32"},
        "personas": {"only": ["ghost"], "prompts": 1},
        "generate": {"max_new_tokens": 8},
        "store": {"root": str(tmp_path / "runs"), "run": "tiny"},
        "steer": {"source": "axis.pt", "unit": "residual", "layers": "3"},
        "cluster": {"device": "cpu"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(document))
    command = ["sweep", "config.yaml", "--doses", "-40", "0", "--tables", "tables"]
    assert main(command) == 0
    out = capfd.readouterr().out
    assert "dose -40" in out
    assert out.rstrip().endswith("page: tiny-sweep.html")
    assert MARKER in (tmp_path / "tiny-sweep.html").read_text()
    table = pyarrow.parquet.read_table(tmp_path / "tables" / "responses.parquet")
    assert table.num_rows == 2 * 2 * 20
    by_dose = [table.filter(pyarrow.compute.field("value") == dose)["response"].to_pylist() for dose in (-40.0, 0.0)]
    assert by_dose[0] != by_dose[1]
    assert main([*command, "--overwrite"]) == 0
    assert pyarrow.parquet.read_table(tmp_path / "tables" / "responses.parquet").equals(table)


def test_conversations_capped_and_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In the space of a run of the same model, with a judge who says what became of each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    tiny_checkpoint(tmp_path / "model")
    runs = str(tmp_path / "runs")
    common = {
        "model": {"id": str(tmp_path / "model"), "dtype": "float32"},
        "generate": {"max_new_tokens": 8},
        "cluster": {"device": "cpu"},
    }
    roles = {"only": ["ghost", "poet", "wind"], "prompts": 1, "max_questions": 6, "default_samples": 4}
    fitted = {**common, "personas": roles, "store": {"root": runs, "run": "fitted"}}
    (tmp_path / "fitted.yaml").write_text(yaml.safe_dump(fitted))
    assert main(["run", "fitted.yaml"]) == 0
    talks = {"roles": [], "scenarios": "adoption", "turns": 2}
    sweep = {**common, "personas": talks, "store": {"root": runs, "run": "talks"}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    with ChatServer() as server:
        command = ["sweep", "sweep.yaml", "--steer.source", f"{runs}/fitted", "--caps", "10", "--tables", "tables"]
        judge = ["--judge.model", MODEL, "--judge.base_url", server.url, "--judge.instructions", "harm"]
        assert main([*command, *judge]) == 0
    out = capfd.readouterr().out
    assert "mean position by turn, layer" in out
    assert "Turn by turn" in (tmp_path / "talks-sweep.html").read_text()
    table = pyarrow.parquet.read_table(tmp_path / "tables" / "responses.parquet")
    assert table["dose"].to_pylist() == ["as it is"] * 20 + ["cap p10"] * 20
    assert set(table["category"].to_pylist()) <= {"refused", "redirected", "harmless", "harmful"}
    plain, capped = (
        drift_of(f"{runs}/talks.{name}", f"{runs}/fitted")["position"].values for name in ("plain", "cap10")
    )
    assert plain.shape == capped.shape
    assert not np.array_equal(plain, capped)

    (tmp_path / "attacks.jsonl").write_text(
        '{"system": "You are Eve.", "prompt": "Hello."}\n{"prompt": "Who are you?"}\n'
    )
    prompts = ["--personas.scenarios", "attacks.jsonl", "--personas.turns", "1", "--store.run", "attacks"]
    assert main(["sweep", "sweep.yaml", *prompts, "--steer.source", f"{runs}/fitted", "--caps", "10"]) == 0
    assert "mean position by turn" not in capfd.readouterr().out
    assert "Who are you?" in (tmp_path / "attacks-sweep.html").read_text()
