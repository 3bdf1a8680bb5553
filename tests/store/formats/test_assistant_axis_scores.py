"""Scores: keys and values of the reference project's files, and nothing else."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from personaspace.store.errors import InputError
from personaspace.store.formats.assistant_axis_scores import (
    iter_scores,
    parse_key,
    read_scores,
    response_key,
    write_scores,
)

indices = st.integers(0, 999_999_999)
keys = st.builds(response_key, st.sampled_from(["pos", "neg", "default"]), indices, indices)


@given(st.sampled_from(["pos", "neg", "default"]), indices, indices)
def test_keys_round_trip(label: str, prompt: int, question: int) -> None:
    assert parse_key(response_key(label, prompt, question), "x") == (label, prompt, question)


@given(st.dictionaries(keys, st.integers(0, 3)))
def test_scores_round_trip_in_order(scores: dict[str, int]) -> None:
    with TemporaryDirectory() as folder:
        found = read_scores(write_scores(Path(folder), "ghost", scores))
    assert list(found.items()) == list(scores.items())


def test_role_by_role(tmp_path: Path) -> None:
    write_scores(tmp_path, "poet", {"pos_p0_q0": 3})
    write_scores(tmp_path, "ghost", {"pos_p0_q17": 1, "default_p4_q2": 0})
    assert list(iter_scores(tmp_path)) == [
        ("ghost", {"pos_p0_q17": 1, "default_p4_q2": 0}),
        ("poet", {"pos_p0_q0": 3}),
    ]
    with pytest.raises(InputError, match=r"ghost\.json: exists already"):
        write_scores(tmp_path, "ghost", {})
    with pytest.raises(InputError, match=r"none\.json: does not exist; name an existing file\."):
        read_scores(tmp_path / "none.json")
    with pytest.raises(InputError, match=r"none: holds no ROLE\.json files\."):
        list(iter_scores(tmp_path / "none"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"pos_p0_q17": 4}, "score of pos_p0_q17 is 4; it must be 0, 1, 2 or 3."),
        ({"pos_p0_q17": -1}, "score of pos_p0_q17 is -1; it must be 0, 1, 2 or 3."),
        ({"pos_p0_q17": 3.0}, "score of pos_p0_q17 is 3.0; it must be"),
        ({"pos_p0_q17": "3"}, "score of pos_p0_q17 is '3'; it must be"),
        ({"pos_p0_q17": None}, "score of pos_p0_q17 is None; it must be"),
        ({"pos_p0_q17": True}, "score of pos_p0_q17 is True; it must be"),
        ({"p0_q17": 3}, "key 'p0_q17' is not of the form LABEL_pPROMPT_qQUESTION, such as `pos_p0_q17`"),
        ({"pos_p00_q17": 3}, "key 'pos_p00_q17' is not of the form"),
        ({"pos_p0_q17\n": 3}, "key 'pos_p0_q17\\n' is not of the form"),
        ({"pos_p٣_q17": 3}, "key 'pos_p٣_q17' is not of the form"),
        ([3], 'holds a JSON list; expected {"pos_p0_q17": 3, ...}.'),
        (b'{"pos_p0_q17": ', "not valid JSON: Expecting value"),
        (b'{"pos_p0_q17": 1, "pos_p0_q17": 3}', "not valid JSON: key 'pos_p0_q17' is given twice"),
    ],
)
def test_refused_scores_name_file_and_key(tmp_path: Path, content: Any, message: str) -> None:
    file = tmp_path / "ghost.json"
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(InputError) as error:
        read_scores(file)
    assert str(error.value).startswith(f"{file}: {message}")
    if isinstance(content, dict):
        with pytest.raises(InputError, match=r"ghost\.json: "):
            write_scores(tmp_path, "ghost", content, overwrite=True)
