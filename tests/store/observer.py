"""A reader that looks at a run again and again while it is written: all it sees must be committed, whole and right."""

import random
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr
import zarr

from personaspace.store import open_run
from personaspace.store.layout import ZARR_GROUP, Layout, coordinate_key
from personaspace.store.manifest import MANIFEST
from personaspace.store.objects import Folder
from personaspace.store.records import COORDINATES_RECORD, Slot, committed_slots
from personaspace.store.schema import COORDINATES, RESID_POST_MEAN, decode_coordinate
from tests.store import small_runs
from tests.store.kill_run import dropped_rows, values


@dataclass(slots=True)
class Observer:
    """Looks at one run."""

    folder: Folder
    layout: Layout
    units: int
    """How many units, at random, each look reads."""
    looks: int = 0
    partial: int = 0
    """Looks that saw a part of the run."""
    faults: list[str] = field(default_factory=list)
    _chance: random.Random = field(default_factory=random.Random)
    _expected: dict[str, Any] = field(default_factory=dict)

    def watch(self, is_over: Callable[[], bool]) -> None:
        """Look until ``is_over``."""
        while not is_over():
            try:
                self.look()
            except Exception:  # Whatever a reader meets, it is a fault.
                self.faults.append(traceback.format_exc())
            time.sleep(0.005)

    def look(self) -> None:
        """Read once, through open_run and with plain Zarr. Raises AssertionError if anything is wrong."""
        if not self.folder.exists(MANIFEST):
            return
        units = sorted(self._chance.sample(range(self.layout.units), min(self.units, self.layout.units)))
        before = set(committed_slots(self.folder))
        run = open_run(self.folder)
        seen = self._seen(run, units)
        after = set(committed_slots(self.folder))
        must = {slot for slot in before if self._is_visible(slot, units)}
        assert must <= seen, f"committed, but not to be seen: {sorted(must - seen)[:3]}"
        assert seen <= after, f"seen without a record: {sorted(seen - after)[:3]}"
        self._look_with_plain_zarr(units)
        self.looks += 1
        self.partial += 0 < len(before) < self._slots()

    def _seen(self, run: xr.Dataset, units: list[int]) -> set[Slot]:
        """What is there of the units; every value must be the right one."""
        seen: set[Slot] = set()
        for unit in units:
            rows = self.layout.unit_slice(unit)
            part = run.isel(rollout=rows)
            seen |= self._check_shards(unit, part[RESID_POST_MEAN].values)
            status = part["status"].values
            if status.any():
                np.testing.assert_array_equal(status, self._coordinates()["status"][rows])
                np.testing.assert_array_equal(part["n_tokens"].values, self._coordinates()["n_tokens"][rows])
                seen.add((COORDINATES_RECORD, unit, 0))
            else:
                assert not part["n_tokens"].values.any()
        return seen

    def _look_with_plain_zarr(self, units: list[int]) -> None:
        """A reader that knows no records may see more, but nothing torn and nothing wrong."""
        group = zarr.open_group(self.folder.zarr_store(ZARR_GROUP), mode="r")
        for unit in units:
            rows = self.layout.unit_slice(unit)
            self._check_shards(unit, np.asarray(group[RESID_POST_MEAN][rows]))
            for name in COORDINATES:
                found = np.asarray(group[name][rows])
                if (found != ("" if name == "role" else 0)).any():
                    np.testing.assert_array_equal(found, self._coordinates()[name][rows])

    def _check_shards(self, unit: int, found: Any) -> set[Slot]:
        seen: set[Slot] = set()
        expected = values(self.layout)[self.layout.unit_slice(unit)]
        for group in range(self.layout.groups):
            layers = self.layout.group_layers(group)
            part = found[:, layers.start : layers.stop]
            if np.isfinite(part).any():
                np.testing.assert_array_equal(part, expected[:, layers.start : layers.stop])
                seen.add((RESID_POST_MEAN, unit, group))
        return seen

    def _is_visible(self, slot: Slot, units: list[int]) -> bool:
        array, unit, _ = slot
        return unit in units and array in (RESID_POST_MEAN, COORDINATES_RECORD)

    def _coordinates(self) -> dict[str, Any]:
        if not self._expected:
            dropped = dropped_rows(self.layout)
            units = [small_runs.coordinates(self.layout, unit, dropped) for unit in range(self.layout.units)]
            for name in COORDINATES:
                chunks = [objects[coordinate_key(name, unit)] for unit, objects in enumerate(units)]
                decoded = [decode_coordinate(chunk, self.layout, name) for chunk in chunks]
                self._expected[name] = np.concatenate(decoded)
        return self._expected

    def _slots(self) -> int:
        return self.layout.units * (self.layout.groups + 2)
