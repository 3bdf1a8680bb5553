"""The report's section on quality: what it shows, and that texts of catalogues stay texts."""

from pathlib import Path

from personaspace.analysis.quality.assess import assess
from personaspace.analysis.quality.section import ROLES_SHOWN, QualitySection, quality_section
from personaspace.store.local import LocalFolder
from tests.analysis.browsing import text_of
from tests.analysis.quality.responses import LOOP, PLAIN, REFUSAL, write
from tests.analysis.report.rendered import render
from tests.analysis.spaces import build_space


def test_section_holds_the_worst_roles_and_what_the_fit_left_out(tmp_path: Path) -> None:
    folder = LocalFolder(tmp_path / "run")
    responses = [f"{number}: {PLAIN}" for number in range(12)]
    responses[4], responses[5] = LOOP, REFUSAL
    write(folder, responses)
    section = quality_section(assess(folder), {"leave_out": "refused", "left_out_count": 1})
    assert section.left_out == "The fit leaves out 1 of them (refused)."
    assert section.headings == ("Role", "Rollouts", "Flawed", "Looping", "Refused")
    assert section.rows[0] == ("poet", "4", "50% (15-85%)", "25%", "25%")
    assert section.more == 0
    text = text_of(render(build_space(), quality=section))
    assert "12 responses themselves" in text
    assert "8% (1-35%) begin with a refusal: 1" in text
    assert "poet 4 50% (15-85%) 25% 25%" in text


def test_a_fit_from_before_there_was_quality() -> None:
    assert "Quality of the responses" not in text_of(render(build_space()))


def test_names_of_roles_stay_text() -> None:
    evil = "<script>window.hacked=1</script>"
    section = QualitySection(
        rollouts=1,
        lines=(evil,),
        standing_out=(evil,),
        left_out=evil,
        headings=("Role", evil),
        rows=((evil, "1"),) * ROLES_SHOWN,
        more=3,
    )
    page = render(build_space(), quality=section)
    assert "<script>window" not in page.split('id="quality"')[1].split("</section>")[0]
    assert "and 3 more roles" in text_of(page)
