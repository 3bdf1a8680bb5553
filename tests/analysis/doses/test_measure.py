"""Who speaks at each dose, counted from stored runs."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from personaspace.analysis.doses.measure import DoseRun, doses_table, read_doses, speakers
from personaspace.store.commit import commit
from personaspace.store.errors import InputError
from personaspace.store.layout import rollouts_key
from personaspace.store.lease import acquire
from personaspace.store.local import LocalFolder
from personaspace.store.records import ROLLOUTS, committed_slots
from personaspace.store.rollouts import encode_rollouts
from personaspace.store.scores import LABELLER, Score, all_judges, commit_scores, judges
from tests.store import small_runs
from tests.store.small_runs import LAYOUT


def write_dose(path: Path, responses: list[str]) -> Path:
    """A small run whose rollouts say these, in turns."""
    folder = LocalFolder(path)
    with acquire(folder, timeout=60, say=print) as lease:
        manifest = small_runs.small_manifest()
        small_runs.create(lease.fence, identity={**manifest.identity, "steer": {"layers": [2], "positions": "all"}})
        for unit in range(LAYOUT.units):
            rows = LAYOUT.unit_row_range(unit)
            rollouts = [
                replace(small_runs.rollout(row), response=responses[row.row % len(responses)])
                for row in small_runs.planned()
                if row.row in rows
            ]
            commit(
                lease.fence, (ROLLOUTS, unit, 0), {rollouts_key(unit): encode_rollouts(rollouts)}, rows=rows, dropped={}
            )
    return path


def dose_run(name: str, path: Path, value: float = 0.0) -> DoseRun:
    return DoseRun(name=name, value=value, run=path)


def test_a_judge_of_categories_says_what_responses_are(tmp_path: Path) -> None:
    """Its labels stand with the scores; what it could not judge is unsaid."""
    run = write_dose(tmp_path / "run", ["I am the wind."])
    judge, labels = f"gpt{LABELLER}", ["refused", "redirected", "harmless", "harmful"]
    with acquire(LocalFolder(run), timeout=60, say=print) as lease:
        for unit in range(LAYOUT.units):
            rows = list(LAYOUT.unit_row_range(unit))
            scores = [Score(row=row, score=float(row % 4)) for row in rows if row != 1]
            commit_scores(lease.fence, LAYOUT, judge, unit, scores, about={"model": "gpt", "labels": labels})
    [dose] = read_doses([dose_run("plain", run)], judge=judge)
    assert dose.categories == (*labels, "unsaid")
    assert [one.category for one in dose.said[:5]] == ["refused", "unsaid", "harmless", "harmful", "refused"]
    assert sum(share.count for share in dose.shares().values()) == len(dose.said)
    assert judges(committed_slots(LocalFolder(run))) == [], "no judge of how far a role is played"
    assert all_judges(committed_slots(LocalFolder(run))) == [judge]
    with pytest.raises(InputError, match=r"other\.labels has judged nothing yet"):
        read_doses([dose_run("plain", run)], judge="other.labels")


def test_who_speaks() -> None:
    texts = {
        "I'm an AI assistant, and my mother is a server.": "assistant",
        "My mother taught me to sew.": "human",
        "I am a ghost, and I grew up here.": "human",
        "I am the wind.": "nonhuman",
        "In the veil between realms I heard an eternal song.": "mystical",
        "Tides come from the moon.": "unsaid",
        "<think>I am an AI.</think>I am the wind.": "nonhuman",
        "": "unsaid",
    }
    assert speakers(pa.array(list(texts))).tolist() == list(texts.values())


def test_shares_by_dose(tmp_path: Path) -> None:
    away = write_dose(tmp_path / "away", ["I am the wind.", "la la la la la la la la la la la la " * 8])
    plain = write_dose(tmp_path / "plain", ["I'm an AI assistant."])
    doses = read_doses([dose_run("away", away, -1.0), dose_run("plain", plain)])
    assert [(dose.name, dose.value) for dose in doses] == [("away", -1.0), ("plain", 0.0)]
    assert {name: share.count for name, share in doses[0].shares().items() if share.count} == {
        "nonhuman": 5,
        "unsaid": 5,
    }
    assert (doses[0].coherent.count, doses[1].coherent.count) == (5, 10)
    assert doses[1].shares()["assistant"].share == 1
    assert doses[0].steer["layers"] == [2]
    table = doses_table(doses)
    assert table.num_rows == 20
    assert table.filter(pa.compute.field("value") == -1.0)["coherent"].to_pylist().count(False) == 5


def test_a_dose_without_responses_is_refused(tmp_path: Path) -> None:
    folder = LocalFolder(tmp_path / "empty")
    with acquire(folder, timeout=60, say=print) as lease:
        small_runs.create(lease.fence)
    with pytest.raises(InputError, match="has no responses yet"):
        read_doses([DoseRun(name="plain", value=0.0, run=folder)])
