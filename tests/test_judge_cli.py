"""`personaspace judge`, `judge-agreement` and `judge-sheet` as a user types them."""

import json
from pathlib import Path

import pytest
import yaml

from personaspace.analysis.config import AnalysisConfig
from personaspace.analysis.fit import chosen_judge
from personaspace.cli import main
from personaspace.store.errors import InputError
from personaspace.store.scores import read_judgements
from tests.extract.judging.chat_server import MODEL, ChatServer
from tests.extract.judging.runs import KEY, make_run


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def judge(run: Path, server: ChatServer, *more: str) -> int:
    return main(["judge", str(run), "--model", MODEL, "--base-url", server.url, *more])


def test_judging_comparing_and_checking(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    folder = make_run(run)
    with ChatServer() as server:
        assert judge(run, server, "--name", "one") == 0
        assert judge(run, server, "--name", "two", "--sample", "6", "--temperature", "1") == 0
        assert judge(run, server, "--roles", "poet") == 0
        assert "scored 4 rollouts, 0 could not be scored" in capsys.readouterr().out
    assert sum(len(unit.scores) for unit in read_judgements(folder, "two").values()) == 6
    assert main(["judge-agreement", str(run), "one", "two", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["all"]["rollouts"] == 6
    assert found["all"]["share"] == 1
    assert found["only_first"] == 14
    assert main(["judge-agreement", str(run), "one", "two"]) == 0
    assert "6 rollouts scored by both (only one: 14, only two: 0)" in capsys.readouterr().out
    assert main(["status", str(run)]) == 0
    assert "judge      4/4 rollouts (100%)" in capsys.readouterr().out
    sheet = tmp_path / "sheet.csv"
    assert main(["judge-sheet", str(run), str(sheet), "--judge", "one", "--count", "5"]) == 0
    assert len(sheet.read_text().splitlines()) == 6
    assert main(["judge-sheet", str(run), str(sheet), "--judge", "human", "--read"]) == 2
    assert "no line has a human_score; fill in 0, 1, 2 or 3." in capsys.readouterr().err


def test_a_judge_of_categories_reads_everybody_and_filters_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    folder = make_run(run)
    with ChatServer() as server:
        assert judge(run, server, "--name", "one", "--instructions", "harm") == 0
        assert "24 rollouts by one.labels" in capsys.readouterr().out
        assert judge(run, server, "--instructions", "speaker") == 0
        assert judge(run, server, "--name", "one.labels", "--instructions", "speaker") == 2
        assert "'one.labels' is the name of another judge" in capsys.readouterr().err
    judgements = read_judgements(folder, "one.labels").values()
    assert sum(len(unit.scores) for unit in judgements) == 24
    assert {tuple(unit.about["labels"]) for unit in judgements} == {("refused", "redirected", "harmless", "harmful")}
    assert chosen_judge(folder, AnalysisConfig()) is None
    with pytest.raises(InputError, match=r"'one\.labels' has scored nothing"):
        chosen_judge(folder, AnalysisConfig(scores="one.labels"))


def test_more_rollouts_are_added_to_what_a_judge_has_scored(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    with ChatServer() as server:
        for count in (3, 9, 20):
            assert judge(tmp_path / "run", server, "--name", "one", "--sample", str(count)) == 0
            assert sum(len(unit.scores) for unit in read_judgements(folder, "one").values()) == count
        assert set(server.rows_asked.values()) == {1}


def test_a_name_belongs_to_one_judge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "run")
    with ChatServer() as server:
        assert judge(tmp_path / "run", server, "--name", "one", "--sample", "2") == 0
        assert judge(tmp_path / "run", server, "--name", "one", "--temperature", "0.5") == 2
        assert len(server.requests) == 2
    error = capsys.readouterr().err
    assert "'one' is the name of another judge" in error
    assert "temperature: 0.0 -> 0.5" in error


def test_the_judge_of_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "run")
    config = tmp_path / "config.yaml"
    with ChatServer() as server:
        section = {
            "model": MODEL,
            "base_url": server.url,
            "budget": 1.0,
            "price_in": 1.0,
            "price_out": 2.0,
            "sample": 4,
        }
        store = {"root": str(tmp_path), "run": "run"}
        config.write_text(yaml.safe_dump({"model": {"id": "x"}, "store": store, "judge": section}))
        assert main(["judge", str(config), "--dry-run"]) == 0
        assert "to judge: 4 rollouts" in capsys.readouterr().out
        assert server.requests == []
        assert main(["judge", str(config), "--sample", "5"]) == 0
        assert len(server.requests) == 5
    [name] = {entry.key.split("/")[1] for entry in folder.list("scores")}
    assert name.startswith(f"{MODEL}-")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "judge: give the folder of a run"),
        (["RUN"], "judge.model: is not set."),
        (["RUN", "--model", "m", "--budget", "3"], "judge.budget: 3 USD can't be kept without prices."),
        (["RUN", "--model", "m", "--roles", "gost"], "judge.roles: the run has no role 'gost'. It has poet"),
        (
            ["RUN", "--model", "m", "--concurrency", "0"],
            "judge.concurrency: Input should be greater than",
        ),
        (["RUN", "--model", "m", "--instructions", "nowhere.yaml"], "judge.instructions: nowhere.yaml: cannot be read"),
        (["RUN", "--model", "m", "--name", "../x"], "judge"),
    ],
)
def test_what_can_not_be_used_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    make_run(tmp_path / "run")
    assert main(["judge", *(str(tmp_path / "run") if part == "RUN" else part for part in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert KEY not in error


def test_help_has_examples_and_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["judge", "--help"])
    shown = capsys.readouterr().out
    assert "personaspace judge runs/demo --model gpt-4.1-mini --dry-run" in shown
    assert "--requests-per-minute" in shown
