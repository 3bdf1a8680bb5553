"""The fit of a run in its folder: whole or not at all, and the latest one."""

import re
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from personaspace.store.errors import InputError, IntegrityError
from personaspace.store.local import LocalFolder
from personaspace.store.records import read_object
from personaspace.store.space import LATEST, copy_space, open_space, save_space, space_objects


@pytest.fixture
def folder(tmp_path: Path) -> LocalFolder:
    return LocalFolder(tmp_path / "run")


def fit(value: float) -> xr.Dataset:
    roles = np.array(["poet", "ωmega"], dtype=np.dtypes.StringDType())
    return xr.Dataset(
        {"axis": (("layer", "hidden"), np.full((2, 3), value, dtype=np.float32))},
        coords={"role": roles, "layer": [0, 1]},
        attrs={"target_layer": 1},
    )


@pytest.mark.filterwarnings("error")
def test_round_trip(folder: LocalFolder) -> None:
    save_space(folder, fit(1.5))
    space = open_space(folder)
    assert (space["axis"].values == 1.5).all()
    assert space["axis"].dtype == np.float32
    assert space["role"].values.tolist() == ["poet", "ωmega"]
    assert space["role"].dtype.kind == "U"
    assert space.attrs == {"target_layer": 1}


def test_a_new_fit_replaces_the_old_one(folder: LocalFolder) -> None:
    for number in range(1, 4):
        save_space(folder, fit(number))
        assert (open_space(folder)["axis"].values == number).all()
        [only, pointer] = sorted(path.name for path in (folder.path / "space").iterdir())
        assert re.fullmatch(rf"000{number}-[0-9a-f]{{8}}\.zarr", only)
        assert pointer == "latest.json"


def test_nothing_is_one_clear_error(folder: LocalFolder) -> None:
    assert space_objects(folder) is None
    with pytest.raises(InputError, match=rf"^{re.escape(folder.url)}: no persona space yet; run `fit` first\.$"):
        open_space(folder)


def test_a_crash_before_the_pointer_leaves_the_old_fit(folder: LocalFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    save_space(folder, fit(1))

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LocalFolder, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        save_space(folder, fit(2))
    monkeypatch.undo()
    assert (open_space(folder)["axis"].values == 1).all()
    save_space(folder, fit(3))
    assert (open_space(folder)["axis"].values == 3).all()


def test_every_object_is_recorded(folder: LocalFolder) -> None:
    save_space(folder, fit(1))
    stored = space_objects(folder)
    assert stored is not None
    assert {entry.key for entry in stored} == {entry.key for entry in folder.list("space")} - {LATEST}
    for entry in stored:
        read_object(folder, entry)


def test_a_damaged_pointer_is_an_error_and_not_an_absent_fit(folder: LocalFolder) -> None:
    save_space(folder, fit(1))
    folder.replace(LATEST, folder.get(LATEST).replace(b"0001-", b"0002-"))
    for read in (open_space, space_objects):
        with pytest.raises(IntegrityError, match=rf"^{re.escape(folder.url)}/space/latest\.json: "):
            read(folder)


def test_copying(folder: LocalFolder, tmp_path: Path) -> None:
    target = LocalFolder(tmp_path / "copy")
    copy_space(folder, target)
    assert not target.exists(LATEST)
    save_space(folder, fit(4))
    copy_space(folder, target)
    xr.testing.assert_identical(open_space(target).load(), open_space(folder).load())
    assert space_objects(target) == space_objects(folder)
