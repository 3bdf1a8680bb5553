"""The data set's folder: the card's front matter finds the files, and a failure leaves what was there."""

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from personaspace.store.errors import InputError
from personaspace.store.formats.hf_dataset import DatasetCard, DatasetCounts, write_dataset
from tests.store.formats.samples import directions

CARD: dict[str, Any] = {
    "pretty_name": "Personas: of a small model",
    "license": "cc-by-4.0",
    "model": "org/model@abc",
    "identity_hash": "0123456789abcdef",
    "precision": "16 mantissa bits",
    "made_with": "personaspace 0.1.0",
}


def card(**changes: Any) -> DatasetCard:
    return DatasetCard(**(CARD | changes))


def table(*rows: int) -> pa.Table:
    turns = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    messages = pa.array([[{"role": "user", "content": "Who are you?"}]] * len(rows), turns)
    return pa.table({"row": pa.array(rows, pa.int64()), "messages": messages, "seed": pa.array(rows, pa.uint64())})


def front_matter(folder: Path) -> Any:
    start, front, rest = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert start == ""
    assert rest.startswith("\n# ")
    return yaml.safe_load(front)


def test_the_card_finds_every_file(tmp_path: Path) -> None:
    folder = tmp_path / "data-set"
    tables = [table(0, 1), table(2, 3), table(), table(4)]
    counts = write_dataset(folder, card=card(), rollouts=iter(tables), directions=directions(), rows_per_file=3)
    assert counts == DatasetCounts(rollouts=5, files=2, role_vectors=9)
    front = front_matter(folder)
    assert front["pretty_name"] == "Personas: of a small model"
    assert (front["license"], front["size_categories"]) == ("cc-by-4.0", ["n<1K"])
    assert front["tags"] == ["interpretability", "personas"]
    assert [config["config_name"] for config in front["configs"]] == ["rollouts", "role_vectors"]
    found = {
        config["config_name"]: sorted(folder.glob(files["path"]))
        for config in front["configs"]
        for files in config["data_files"]
    }
    assert [len(files) for files in found.values()] == [2, 1]
    assert sorted(folder.rglob("*.parquet")) == sorted(file for files in found.values() for file in files)
    read = pa.concat_tables(pq.read_table(file) for file in found["rollouts"])
    assert read.equals(pa.concat_tables(tables))
    assert pq.read_table(found["role_vectors"][0]).num_rows == 9
    assert [path.name for path in tmp_path.iterdir()] == ["data-set"]


def test_the_card_says_how_it_was_made_and_loaded(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", card=card(notes="Mind the *ghosts*."), rollouts=[table(0)], directions=directions())
    text = (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    for part in ("`org/model@abc`", "`0123456789abcdef`", "16 mantissa bits", "personaspace 0.1.0", "\n\nMind the"):
        assert part in text
    assert "- Role vectors: 9 rows, from 2 roles and `default`, 3 layers, 4 values each." in text
    assert 'rollouts = load_dataset("OWNER/NAME", "rollouts", split="train")\nrole_vectors = load_dataset(' in text
    write_dataset(tmp_path / "b", card=card(license="other"), rollouts=[table(0)])
    assert [config["config_name"] for config in front_matter(tmp_path / "b")["configs"]] == ["rollouts"]
    assert "role_vectors" not in (tmp_path / "b" / "README.md").read_text(encoding="utf-8")


def test_tables_are_let_go(tmp_path: Path) -> None:
    def stream() -> Iterator[pa.Table]:
        given: list[weakref.ref[pa.Table]] = []
        for start in range(0, 100_000, 10_000):
            assert [number for number, table in enumerate(given) if table() is not None] in ([], [len(given) - 1])
            table = pa.table({"row": pa.array(range(start, start + 10_000), pa.int64())})
            given.append(weakref.ref(table))
            yield table
            del table

    counts = write_dataset(tmp_path / "a", card=card(), rollouts=stream())
    assert (counts.rollouts, counts.files) == (100_000, 5)
    assert front_matter(tmp_path / "a")["size_categories"] == ["100K<n<1M"]


def test_overwriting_leaves_other_files_alone(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    (folder / ".git").mkdir(parents=True)
    (folder / ".git" / "config").write_text("mine")
    with pytest.raises(InputError, match="a: exists and is not empty; choose another folder, or allow it"):
        write_dataset(folder, card=card(), rollouts=[table(0)])
    write_dataset(
        folder, card=card(), rollouts=[table(0), table(1)], directions=directions(), rows_per_file=1, overwrite=True
    )
    write_dataset(folder, card=card(), rollouts=[table(7)], overwrite=True)
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == [
        ".git/config",
        "README.md",
        "data/rollouts/000000.parquet",
    ]
    assert pq.read_table(folder / "data" / "rollouts")["row"].to_pylist() == [7]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("rollouts", "changes", "message"),
    [
        ([], {}, "there are no rollouts to write; generate or import some first."),
        ([table()], {}, "there are no rollouts to write"),
        ([table(0), pa.table({"row": [1]})], {}, "a table of rollouts has columns ['row'], those before have ['row', "),
        ([table(0)], {"default_LD": None, "role_RLD": None, "roles": (), "counts": ()}, "the directions hold an axis"),
    ],
)
def test_a_failure_leaves_what_was_there(tmp_path: Path, rollouts: Any, changes: Any, message: str) -> None:
    folder = tmp_path / "a"
    with pytest.raises(InputError) as error:
        write_dataset(folder, card=card(), rollouts=rollouts, directions=directions(**changes))
    assert str(error.value).startswith(f"{folder}: {message}")
    assert list(tmp_path.iterdir()) == []
    write_dataset(folder, card=card(), rollouts=[table(5)])
    with pytest.raises(InputError):
        write_dataset(folder, card=card(), rollouts=rollouts, directions=directions(**changes), overwrite=True)
    assert pq.read_table(folder / "data" / "rollouts")["row"].to_pylist() == [5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"license": ""}, "license is ''; give an identifier as on the Hub, such as `cc-by-4.0`, or `other`."),
        ({"license": "other\ntags: x"}, "license is 'other\\ntags: x'; give an identifier"),
        ({"pretty_name": "a\n---\nb"}, "pretty_name is 'a\\n---\\nb'; it must be one line of text."),
        ({"model": " "}, "model is ' '; it must be one line of text."),
    ],
)
def test_refused_cards(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        card(**changes)
    assert str(error.value).startswith(f"Dataset card: {message}")


def test_titles_can_not_break_the_front_matter(tmp_path: Path) -> None:
    title = "--- {card.model} 'a': [\"b\"] # ж"
    write_dataset(tmp_path / "a", card=card(pretty_name=title), rollouts=[table(0)])
    assert front_matter(tmp_path / "a")["pretty_name"] == title
