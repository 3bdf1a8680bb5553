"""Files appear whole or not at all."""

from pathlib import Path

import pytest

from personaspace.store.errors import InputError
from personaspace.store.formats.files import replacing, replacing_parts, require_file
from personaspace.store.formats.json_text import parse_json


def test_a_file_appears_at_the_end(tmp_path: Path) -> None:
    file = tmp_path / "new" / "folder" / "a.json"
    with replacing(file, overwrite=False) as temporary:
        temporary.write_text("whole")
        assert not file.exists()
        assert temporary.parent == file.parent
    assert [path.name for path in file.parent.iterdir()] == ["a.json"]
    assert file.read_text() == "whole"


def fail_after_half(file: Path) -> None:
    file.write_text("half")
    raise ZeroDivisionError


def test_a_failure_leaves_nothing_and_harms_nothing(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(file, overwrite=True) as temporary:
        fail_after_half(temporary)
    with pytest.raises(FileNotFoundError), replacing(file, overwrite=True):
        pass  # nothing was written
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_existing_files_are_replaced_only_on_demand(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text("old")
    with pytest.raises(InputError) as error, replacing(file, overwrite=False):
        pass
    assert str(error.value) == f"{file}: exists already; choose another name, or allow it to be overwritten."
    with replacing(file, overwrite=True) as temporary:
        temporary.write_text("new")
    assert file.read_text() == "new"


def test_refused_places(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder; name the file to write"), replacing(tmp_path, overwrite=True):
        pass
    (tmp_path / "a").write_text("")
    with pytest.raises(InputError, match="a: is not a folder"), replacing(tmp_path / "a" / "b", overwrite=True):
        pass
    with pytest.raises(InputError, match="nothing: does not exist; name an existing file"):
        require_file(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b'{"a": 1, "b": 2, "a": 3}', "key 'a' is given twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b"\xff", "'utf-8' codec can't decode byte 0xff"),
        (b"9" * 10_000, "Exceeds the limit"),
    ],
)
def test_refused_json(raw: bytes, reason: str) -> None:
    with pytest.raises(InputError, match=f"^scores.json: not valid JSON: {reason}"):
        parse_json(raw, "scores.json: not valid JSON")


def test_parts_of_a_folder_take_the_place_of_what_was_there(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "out"
    with replacing_parts(folder, ("a", "b.txt"), overwrite=False) as temporary:
        (temporary / "a").mkdir()
        (temporary / "a" / "1").write_text("one")
        (temporary / "b.txt").write_text("two")
        assert not folder.exists()
    (folder / "mine").write_text("stays")
    with pytest.raises(InputError, match="exists and is not empty"), replacing_parts(folder, ("a",), overwrite=False):
        pass
    with pytest.raises(ZeroDivisionError), replacing_parts(folder, ("a", "b.txt"), overwrite=True) as temporary:
        fail_after_half(temporary / "b.txt")
    assert (folder / "b.txt").read_text() == "two"
    with replacing_parts(folder, ("a", "b.txt"), overwrite=True) as temporary:
        (temporary / "a").mkdir()
    assert sorted(path.name for path in folder.iterdir()) == ["a", "mine"]
    assert not list((folder / "a").iterdir())
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def test_parts_go_into_folders_only(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with (
        pytest.raises(InputError, match="out: exists and is not empty"),
        replacing_parts(tmp_path / "out", ("a",), overwrite=True),
    ):
        pass
