import csv
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

from personaspace.analysis.agreement import agreement_of_run
from personaspace.extract.judging.sheet import read_sheet, write_sheet
from personaspace.store.errors import InputError
from personaspace.store.lease import acquire
from personaspace.store.local import LocalFolder
from personaspace.store.manifest import require_manifest
from personaspace.store.scores import Score, commit_scores, read_judgements
from tests.extract.judging.runs import make_run


@pytest.fixture
def folder(tmp_path: Path) -> LocalFolder:
    """A run of 48 rollouts, 24 of the hacker's scored by `machine`: mostly 3, two of them 0."""
    folder = make_run(tmp_path / "run", rows=48, unit_rows=8)
    layout = require_manifest(folder).layout
    with acquire(folder, timeout=1, say=print) as lease:
        for unit in range(1, layout.units):
            rows = layout.unit_row_range(unit)
            scores = [Score(row=row, score=0.0 if row in (20, 40) else 3.0, reason="=because") for row in rows]
            commit_scores(lease.fence, layout, "machine", unit, scores)
    return folder


def lines(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as text:
        return list(csv.DictReader(text))


def fill(file: Path, scores: dict[int, str]) -> Path:
    filled = [{**line, "human_score": scores.get(int(line["row"]), ""), "human_note": "seen"} for line in lines(file)]
    with file.open("w", encoding="utf-8", newline="") as text:
        writer = csv.DictWriter(text, list(filled[0]))
        writer.writeheader()
        writer.writerows(filled)
    return file


def test_a_sheet_is_spread_over_scores_and_roles_and_its_scores_come_back(folder: LocalFolder, tmp_path: Path) -> None:
    file = tmp_path / "sheet.csv"
    assert write_sheet(folder, file, judge="machine", count=8) == 8
    written = lines(file)
    assert Counter(line["judge_score"] for line in written) == {"3": 6, "0": 2}
    assert Counter(line["role"] for line in written)["poet"] >= 2
    assert written[0]["question"].endswith("?")
    assert {line["judge_reason"] for line in written} == {"'=because"}  # No formula for a spreadsheet.
    rows = [int(line["row"]) for line in written]
    assert read_sheet(folder, fill(file, dict.fromkeys(rows[:7], "3")), judge="human") == 7
    human = {row: score for unit in read_judgements(folder, "human").values() for row, score in unit.scores.items()}
    assert human == {row: Score(row=row, score=3.0, reason="seen") for row in rows[:7]}
    # More of the same sheet, later; what was given stays.
    assert read_sheet(folder, fill(file, dict.fromkeys(rows, "3")), judge="human") == 8
    found = agreement_of_run(folder, "machine", "human")
    assert found.all.rollouts == 8
    assert found.only_first == 32
    assert found.confusion[3][3] == 6
    assert found.confusion[0][3] == 2


def test_a_blind_sheet_does_not_say_what_the_judge_said(folder: LocalFolder, tmp_path: Path) -> None:
    for name in ("sheet.csv", "sheet.html"):
        write_sheet(folder, tmp_path / name, judge="machine", count=8, is_blind=True)
        assert "because" not in (tmp_path / name).read_text()


def test_a_page_escapes_what_responses_hold(folder: LocalFolder, tmp_path: Path) -> None:
    file = tmp_path / "sheet.html"
    write_sheet(folder, file, judge="machine", count=8)
    page = file.read_text()
    assert page.count("<section") == 8
    assert "Answer 20" in page


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("human_score", "5", r"sheet.csv:2: human_score is '5' and row '\d+'; a score is 0, 1, 2 or 3."),
        ("rollout_id", "feed", r"sheet.csv:2: row \d+ of .* is not the rollout 'feed'."),
        ("row", "9999", r"sheet.csv:2: row 9999 of .* is not the rollout"),
    ],
)
def test_a_sheet_that_does_not_fit_is_refused(
    folder: LocalFolder, tmp_path: Path, column: str, value: str, message: str
) -> None:
    file = tmp_path / "sheet.csv"
    write_sheet(folder, file, judge="machine", count=3)
    entries = [{**line, "human_score": "1"} for line in lines(file)]
    entries[0][column] = value
    with file.open("w", encoding="utf-8", newline="") as text:
        writer = csv.DictWriter(text, list(entries[0]))
        writer.writeheader()
        writer.writerows(entries)
    with pytest.raises(InputError, match=message):
        read_sheet(folder, file)
    assert read_judgements(folder, "human") == {}


def test_scores_of_a_human_do_not_change(folder: LocalFolder, tmp_path: Path) -> None:
    file = tmp_path / "sheet.csv"
    write_sheet(folder, file, judge="machine", count=1)
    row = int(lines(file)[0]["row"])
    read_sheet(folder, fill(file, {row: "1"}))
    with pytest.raises(InputError, match=rf"sheet.csv:2: 'human' has scored row {row} already, with 1."):
        read_sheet(folder, fill(file, {row: "2"}))
    read_sheet(folder, fill(file, {row: "2"}), judge="human-2")


def test_unknown_judges_and_files_are_refused(folder: LocalFolder, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'nobody' has scored nothing"):
        write_sheet(folder, tmp_path / "sheet.csv", judge="nobody", count=3)
    with pytest.raises(InputError, match=r"is neither .csv nor .html"):
        write_sheet(folder, tmp_path / "sheet.xlsx", judge="machine", count=3)
    with pytest.raises(InputError, match=r"no scores of 'nobody'"):
        agreement_of_run(folder, "machine", "nobody")


@pytest.mark.browser
def test_the_page_saves_what_was_filled_in(folder: LocalFolder, tmp_path: Path) -> None:
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        assert not os.environ.get("PERSONASPACE_REQUIRE_BROWSER"), "there is no Chromium"
        pytest.skip("NOT TESTED: the page in a browser, since there is no Chromium")
    file = tmp_path / "sheet.html"
    write_sheet(folder, file, judge="machine", count=4)
    with sync_playwright() as driver:
        page = driver.chromium.launch(executable_path=path, args=["--no-sandbox"]).new_page()
        page.goto(file.as_uri())
        for place, score in enumerate("102"):
            page.locator("section").nth(place).locator(f"input[value='{score}']").check()
        page.locator("section input[type=text]").first.fill('a "note", with a comma')
        assert page.locator("#state").inner_text() == "3 of 4 scored"
        with page.expect_download() as download:
            page.locator("#save").click()
        download.value.save_as(tmp_path / "filled.csv")
    assert read_sheet(folder, tmp_path / "filled.csv") == 3
    given = [score for unit in read_judgements(folder, "human").values() for score in unit.scores.values()]
    assert sorted(score.score for score in given) == [0, 1, 2]
    assert 'a "note", with a comma' in {score.reason for score in given}
