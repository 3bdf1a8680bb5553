"""Who speaks at each dose, counted from stored runs."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from personaspace.analysis.doses.measure import doses_table, read_doses, speakers
from personaspace.store.commit import commit
from personaspace.store.errors import InputError
from personaspace.store.layout import rollouts_key
from personaspace.store.lease import acquire
from personaspace.store.local import LocalFolder
from personaspace.store.records import ROLLOUTS
from personaspace.store.rollouts import encode_rollouts
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
    doses = read_doses({0.0: plain, -1.0: away})
    assert [dose.value for dose in doses] == [-1.0, 0.0]
    assert {name: share.count for name, share in doses[0].speakers().items() if share.count} == {
        "nonhuman": 5,
        "unsaid": 5,
    }
    assert (doses[0].coherent.count, doses[1].coherent.count) == (5, 10)
    assert doses[1].speakers()["assistant"].share == 1
    assert doses[0].steer["layers"] == [2]
    table = doses_table(doses)
    assert table.num_rows == 20
    assert table.filter(pa.compute.field("dose") == -1.0)["coherent"].to_pylist().count(False) == 5


def test_a_dose_without_responses_is_refused(tmp_path: Path) -> None:
    folder = LocalFolder(tmp_path / "empty")
    with acquire(folder, timeout=60, say=print) as lease:
        small_runs.create(lease.fence)
    with pytest.raises(InputError, match="has no responses yet"):
        read_doses({0.0: folder})
