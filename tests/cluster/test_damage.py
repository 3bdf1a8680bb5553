"""Flipped bits and deleted objects of a real run: found by `store verify`, mended by `store repair`."""

import random
from pathlib import Path

import pytest

from tests.cluster.damage import build, damage


@pytest.mark.slow
def test_damage_is_found_and_mended(tmp_path: Path) -> None:
    whole = build(tmp_path)
    done = damage(whole, tmp_path / "runs" / "damaged", flips=16, deletions=4, draw=random.Random(1))
    assert len(done.flipped) == 16
    assert len(done.deleted) == 4
    assert (done.missed, done.false, done.left, done.different) == ((), (), (), ())
