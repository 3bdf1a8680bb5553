"""What can't be imported is refused with its file and key, before anything is written."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from personaspace.store.errors import InputError
from personaspace.store.local import LocalFolder
from tests.store.exchange.reference_files import (
    HIDDEN,
    LAYERS,
    import_all,
    key,
    response,
    responses,
    write_output,
    write_role,
    write_scores,
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_output(tmp_path_factory.mktemp("source") / "out")


NEG = response("ghost", 1, 5, label="neg")
OTHER_QUESTION = response("ghost", 3, 5, question="Another?")
OTHER_PROMPT = response("ghost", 1, 17, system_prompt="Another.")
TWICE = response("ghost", 1, 5, label="default")
SAME = response("ghost", 3, 5, conversation=response("ghost", 1, 5)["conversation"])
FIRST = response("ghost", 1, 5)
ONE = {key(1, 5): torch.ones(LAYERS, HIDDEN)}


@pytest.mark.parametrize(
    ("lines", "tensors", "message"),
    [
        ([FIRST], {**ONE, key(1, 17): ONE[key(1, 5)]}, "ghost.pt: pos_p1_q17 have no response in "),
        ([FIRST, response("ghost", 1, 17)], ONE, "ghost.jsonl: pos_p1_q17 have no activations in "),
        ([FIRST], {key(1, 5): torch.ones(LAYERS, 9)}, "ghost.pt: its tensors are (5, 9), those of other roles (5, 8);"),
        ([FIRST], {key(1, 5): torch.ones(LAYERS)}, "ghost.pt: pos_p1_q5: is float32 (5,); it must be"),
        ([FIRST], {key(1, 5): torch.full((5, 8), torch.nan)}, "ghost.pt: pos_p1_q5: holds values that are not finite"),
        ([FIRST], {"p1_q5": ONE[key(1, 5)]}, "ghost.pt: key 'p1_q5' is not of the form"),
        ([NEG], {key(1, 5, "neg"): ONE[key(1, 5)]}, "ghost.jsonl:1: label is 'neg'; only roles"),
        ([FIRST, OTHER_QUESTION], ONE, "ghost.jsonl:2: question_index 5 has another question before."),
        ([FIRST, OTHER_PROMPT], ONE, "ghost.jsonl:2: prompt_index 1 has another system prompt before."),
        ([FIRST, TWICE], ONE, "ghost.jsonl:2: the same prompt and question as "),
        ([FIRST, SAME], {**ONE, key(3, 5): ONE[key(1, 5)]}, "ghost.jsonl:2: the same response as "),
        ([], ONE, "ghost.jsonl: holds no responses; remove it, and its activations."),
    ],
)
def test_refused_sources(tmp_path: Path, lines: list[Any], tensors: Any, message: str) -> None:
    source = write_output(tmp_path / "out", ["default"])
    write_role(source, "ghost", lines, tensors)
    folder = LocalFolder(tmp_path / "run")
    with pytest.raises(InputError) as error:
        import_all(source, folder)
    assert message in str(error.value)
    if "not finite" not in message:  # Values are read when they are stored.
        assert not folder.path.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out: (out / "activations" / "poet.pt").unlink(), "poet.jsonl: has no activations ("),
        (lambda out: (out / "responses" / "poet.jsonl").unlink(), "poet.pt: has no responses ("),
        (lambda out: os.rename(out / "responses", out / "texts"), "holds no folder `responses`; give an output"),
        (lambda out: (out / "responses" / "...jsonl").write_text(""), "role name '..' can't be a file name;"),
        (lambda out: write_scores(out, "hacker", {key(0, 5): 1}), "hacker.json: the run has no role 'hacker'; it has"),
        (lambda out: write_scores(out, "ghost", {key(1, 6): 1}), "ghost.json: pos_p1_q6: the run has no such rollout"),
    ],
)
def test_refused_folders(tmp_path: Path, change: Callable[[Path], object], message: str) -> None:
    source = write_output(tmp_path / "out")
    change(source)
    with pytest.raises(InputError) as error:
        import_all(source, LocalFolder(tmp_path / "run"))
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": " "}, "give the name of the model"),
        ({"unit_rows": 0}, "unit_rows: 0; it must be 1 or more."),
        ({"layer_group": 6}, "layer_group: 6 is more than the 5 layers of the activations."),
        ({"judge": "../x"}, "'../x'"),
    ],
)
def test_refused_settings(source: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        import_all(source, LocalFolder(tmp_path / "run"), **changes)
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_place_with_other_things_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds \['notes.txt'\], but no run\.json"):
        import_all(source, LocalFolder(tmp_path))


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.marker}",))


@pytest.mark.parametrize("plain", [True, False])
def test_pickled_code_is_refused_and_not_run(tmp_path: Path, plain: bool) -> None:
    source = write_output(tmp_path / "out")
    entry = {key(1, 5): Evil(tmp_path / "run_by_pickle")}
    if plain:
        (source / "activations" / "ghost.pt").write_bytes(pickle.dumps(entry, protocol=2))
    else:
        torch.save(entry, source / "activations" / "ghost.pt")
    with pytest.raises(InputError, match=r"ghost\.pt: .*(nothing of it was run|can't be read)"):
        import_all(source, LocalFolder(tmp_path / "run"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_responses_are_read_as_json_alone(tmp_path: Path) -> None:
    source = write_output(tmp_path / "out")
    (source / "responses" / "ghost.jsonl").write_text(json.dumps(responses("ghost")[0])[:-1])
    with pytest.raises(InputError, match=r"ghost\.jsonl:1: not a line of UTF-8 JSON"):
        import_all(source, LocalFolder(tmp_path / "run"))
