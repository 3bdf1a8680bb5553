"""`personaspace preview` marks exactly the tokens that are averaged, on the terminal and in the page."""

import json
import re
from pathlib import Path

import pytest
import yaml

from personaspace.cli import main
from personaspace.extract.reductions import ALLOWED
from tests.models import tiny_checkpoint

TALK = [
    {"role": "system", "content": "Be a ghost."},
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "A ghost."},
    {"role": "user", "content": "And the sea?"},
]


def write_config(folder: Path, *, imported: bool) -> Path:
    """A config on a tiny model; its two responses (one of them empty) are imported, or none are."""
    document: dict[str, object] = {
        "model": {"id": str(tiny_checkpoint(folder / "model", layers=2))},
        "store": {"root": str(folder / "runs"), "run": "preview"},
    }
    if imported:
        responses = folder / "responses"
        responses.mkdir()
        for role, answer in (("default", "The sea is wide."), ("ghost", "")):
            line = {
                "system_prompt": "Be a ghost.",
                "prompt_index": 0,
                "question_index": 0,
                "question": "And the sea?",
                "label": "pos",
                "conversation": [*TALK, {"role": "assistant", "content": answer}],
            }
            (responses / f"{role}.jsonl").write_text(json.dumps(line) + "\n")
        document["generate"] = {"responses": str(responses)}
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(document))
    return file


def shown(capsys: pytest.CaptureFixture[str]) -> str:
    """The output without the frame, its line breaks as they are."""
    return re.sub(r" *│\n│ ", "\n", capsys.readouterr().out)


def test_averaged_tokens_are_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, imported=True)
    assert main(["preview", str(config), "--role", "default"]) == 0
    output = shown(capsys)
    assert re.findall("⟦(.*?)⟧", output.split("chat template")[1], re.S) == ["The sea is wide."]
    assert "arrays: resid_post_mean" in output
    assert re.search(r"mean: \d+ tokens \[\d+, \d+\)", output)
    assert not (tmp_path / "runs").exists()


def test_every_reduction_has_its_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, imported=True)
    options = ["--extract.reductions", "last_prompt", "first_1", "turns"]
    assert main(["preview", str(config), "--role", "default", *options]) == 0
    output = shown(capsys)
    marked = re.findall("⟦(.*?)⟧", output.split("chat template")[1], re.S)
    assert marked[0] == "A ghost."
    # The last token of the prompt is the line break before the response.
    assert "".join(marked[1:]).replace("\n", "") == "⏎The sea is wide."
    for name, count in (("last_prompt", 1), ("first_1", 1), ("turn 0", r"\d+"), ("turn 1", r"\d+")):
        assert re.search(rf"{name}: {count} tokens", output)


def test_dropped_rollouts_say_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preview", str(write_config(tmp_path, imported=True)), "--role", "ghost"]) == 0
    assert "dropped: the response is empty" in shown(capsys)


def test_what_is_not_generated_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preview", str(write_config(tmp_path, imported=False)), "--count", "2"]) == 0
    output = shown(capsys)
    assert output.count("the response comes here; all of its tokens count") == 2
    assert "not generated yet" in output


def test_what_the_run_has_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, imported=True)
    assert main(["generate", str(config), "--extract.max-dropped", "1"]) == 0
    responses = tmp_path / "responses" / "default.jsonl"
    capsys.readouterr()
    assert main(["preview", str(config), "--role", "default"]) == 0
    stored = shown(capsys)
    assert "The sea is wide." in stored
    assert responses.is_file()


def test_the_page_has_the_same_text_in_colours(tmp_path: Path) -> None:
    page = tmp_path / "preview.html"
    assert main(["preview", str(write_config(tmp_path, imported=True)), "--html", str(page)]) == 0
    html = page.read_text(encoding="utf-8")
    coloured = re.findall(r'<span class="(r\d+)">([^<]*)</span>', html)
    greens = set(re.findall(r"\.(r\d+) \{[^}]*background-color: #(?:1b5e20|388e3c)", html))
    said = "".join(text for name, text in coloured if name in greens)
    assert "The sea is wide." in said
    assert "Who are you?" not in said
    assert "⟦" not in html


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--role", "poet"], "--role: 'poet' is not in this config. It has default, ghost."),
        (
            ["--extract.reductions", "median"],
            f"extract.reductions: 'median'; allowed are {ALLOWED}.",
        ),
    ],
)
def test_bad_options(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    assert main(["preview", str(write_config(tmp_path, imported=True)), *options]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
