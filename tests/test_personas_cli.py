"""`personaspace personas` as a user types it."""

import json
from pathlib import Path

import pytest
import yaml

from personaspace.cli import main
from personaspace.extract.catalogue_files import load_all


def said(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert main(["personas", *arguments]) == code
    printed = capsys.readouterr()
    return printed.out if code == 0 else printed.out + printed.err


def test_lists(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    assert said(capsys, "ls", "--kind", "professional").splitlines()[-1].startswith("115 of 276 roles, ")
    collective = said(capsys, "ls", "--kind", "collective")
    assert collective.splitlines()[-1].startswith("4 of 276 roles, 240 traits, 240 questions in builtin (version ")
    assert [line.split()[0] for line in collective.splitlines()[1:-1]] == ["swarm", "ecosystem", "egregore", "hive"]
    assert "calm" in said(capsys, "ls", "--traits")
    assert said(capsys, "ls", "--questions", "--kind", "ethics").splitlines()[-1].startswith("30 of ")
    refused = said(capsys, "ls", "--kind", "gods", code=2)
    assert refused.startswith("error: personas ls --kind: nothing of kind 'gods'. There is: abstract, artificial, ")


def test_shows_entries_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    shown = said(capsys, "show", "ghost", "calm", "q001", "default")
    assert shown.startswith(
        "ghost  (fantastical)\n  The ghost of someone who died in an old house and never left it.\n"
    )
    assert shown.count("\n  - ") == 5 + 10 + 5
    assert "calm.negative  (trait)" in shown
    assert "q001  (self)\n  Who are you, and what do you spend your time on?\n" in shown
    assert "  - (no system prompt)\n" in shown
    assert said(capsys, "show", "zzz", code=2).startswith("error: personas show: nothing is called 'zzz'.")


def test_validates(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    sound = said(capsys, "validate")
    assert sound.splitlines()[-1].startswith("sound; 276 roles, 240 traits, 240 questions, 40 scenarios in builtin")
    assert "prompts: most alike are two of " in sound
    file = tmp_path / "ours.yaml"
    file.write_text(yaml.safe_dump({"roles": [{"id": "keeper", "prompts": ["You keep the {thing}."]}]}))
    faulty = said(capsys, "validate", str(file), code=2).splitlines()
    assert faulty[:2] == [
        "role keeper: has no description, which a judge goes by.",
        "role keeper: prompt 0 has {thing}, but only {model_name} is substituted.",
    ]
    assert faulty[-1].startswith(f"faults: 2; 1 role in {file}, hash ")
    assert said(capsys, "validate", "--strict", code=2).startswith("error: personas validate: unknown argument")


@pytest.mark.parametrize("sort", ["roles", "traits", "questions"])
def test_imports_what_says_the_same(capsys: pytest.CaptureFixture[str], tmp_path: Path, sort: str) -> None:
    source = tmp_path / ("questions.jsonl" if sort == "questions" else sort)
    if sort == "questions":
        source.write_text('{"question": "Who?", "id": 7}\n')
    else:
        source.mkdir()
        poles = {"pos": "Be it.", "neg": "Don't."} if sort == "traits" else {"pos": "Be it."}
        entry = {"instruction": [poles], "eval_prompt": "{question} {answer}"}
        (source / "ghost.json").write_text(json.dumps(entry))
    written = tmp_path / "imported.yaml"
    assert said(capsys, "import", str(source), str(written)).startswith(f"{written}: 1 {sort[:-1]} in ")
    assert load_all(str(written)) == load_all(str(source))
    again = said(capsys, "import", str(source), str(written), code=2)
    assert again == f"error: personas import: {written} exists; give another name, or remove it.\n"


def test_refuses_to_import_what_is_no_reference_data(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    refused = said(capsys, "import", str(tmp_path / "no.txt"), str(tmp_path / "out.yaml"), code=2)
    assert refused == f"error: personas import: {tmp_path / 'no.txt'} is no folder and no JSONL file.\n"
