"""Where memory runs out a micro-batch is run in parts, with the same result; a rollout is lost only alone."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from personaspace.extract.checkpoint import Checkpoint
from personaspace.extract.hooks import LayerHook
from personaspace.extract.packing import MicroBatch
from personaspace.extract.slicing import load_slice
from personaspace.extract.stage import OUT_OF_MEMORY, Stage, StageOutput
from tests.extract.families import SAMPLES, SITES, samples_batch

LENGTHS = [sample.length for sample in SAMPLES]
PACKING = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
STAGES = pytest.mark.parametrize(("first", "stop"), [(0, 3), (3, 6)], ids=["first", "later"])


class Scarce:
    """A change that runs out of memory where more than so many rows or tokens come at once."""

    def __init__(self, *, rows: int = 99, tokens: int = 999) -> None:
        self.limits = (rows, tokens)
        self.shapes: list[tuple[int, int]] = []

    def __call__(self, h_BTD: torch.Tensor) -> torch.Tensor:
        rows, tokens, _ = h_BTD.shape
        self.shapes.append((rows, tokens))
        if rows > self.limits[0] or tokens > self.limits[1]:
            raise torch.OutOfMemoryError(f"{rows} x {tokens}")
        return h_BTD


def forward(
    checkpoint: Checkpoint, first: int, stop: int, *, packed: bool, scarce: Scarce | None = None
) -> tuple[MicroBatch, StageOutput]:
    """The samples' micro-batch at one stage of a longer chain."""
    hooks = [] if scarce is None else [LayerHook(layer=first + 1, change=scarce)]
    model = load_slice(checkpoint, first=first, stop=stop, dtype="float32")
    with Stage(model, last=False, sites=SITES, hooks=hooks) as stage:
        _, received_BTD = stage.probe(LENGTHS, packed=packed)
        batch = samples_batch(packed=packed)
        return batch, stage.forward(batch, received_BTD)


def sums(output: StageOutput) -> dict[int, NDArray[np.float32]]:
    return {row: pooled.sums_SD for row, pooled in output.pooled().items()}


def states(batch: MicroBatch, output: StageOutput, rows: Sequence[int]) -> list[NDArray[np.float32]]:
    """What the next stage gets of each rollout, without padding."""
    assert output.hidden_BTD is not None
    assert output.hidden_BTD.shape == (*batch.shape, 32)
    places = [(*batch.origins[row], LENGTHS[row]) for row in rows]
    return [output.hidden_BTD[row, first : first + length].numpy() for row, first, length in places]


def assert_same(got: Sequence[NDArray[np.float32]], expected: Sequence[NDArray[np.float32]]) -> None:
    """Up to rounding, which depends on the shape of the batch."""
    for a, b in zip(got, expected, strict=True):
        assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(b)


@STAGES
@pytest.mark.parametrize(
    ("packed", "limits", "shapes"),
    [
        # Lengths are 40, 9, 31, 12, 23.
        (False, {"rows": 2}, [(5, 40), (2, 40), (3, 31), (1, 31), (2, 23)]),
        (True, {"tokens": 60}, [(1, 115), (1, 49), (1, 66), (1, 31), (1, 35)]),
    ],
    ids=["padded", "packed"],
)
def test_halves_give_what_the_whole_gives(
    llama: Checkpoint, first: int, stop: int, packed: bool, limits: dict[str, int], shapes: list[tuple[int, int]]
) -> None:
    scarce = Scarce(**limits)
    batch, split = forward(llama, first, stop, packed=packed, scarce=scarce)
    _, whole = forward(llama, first, stop, packed=packed)
    assert scarce.shapes == shapes
    assert (split.parts, split.failed) == (3, {})
    assert (whole.parts, whole.failed) == (1, {})
    assert list(sums(split)) == list(batch.rows)
    assert_same(list(sums(split).values()), list(sums(whole).values()))
    assert_same(states(batch, split, batch.rows), states(batch, whole, batch.rows))


@STAGES
@PACKING
def test_a_rollout_that_is_too_long_alone_fails_alone(llama: Checkpoint, first: int, stop: int, packed: bool) -> None:
    batch, split = forward(llama, first, stop, packed=packed, scarce=Scarce(tokens=30))
    _, whole = forward(llama, first, stop, packed=packed)
    assert split.failed == dict.fromkeys((0, 2), OUT_OF_MEMORY)
    assert OUT_OF_MEMORY == "out of memory, even alone in its micro-batch"
    survivors = (1, 3, 4)
    # Packed, the last two don't fit together: 12 and 23 tokens.
    assert split.parts == (5 if packed else 4)
    assert list(sums(split)) == list(survivors)
    assert_same(list(sums(split).values()), [sums(whole)[row] for row in survivors])
    assert_same(states(batch, split, survivors), states(batch, whole, survivors))
    assert all((lost == 0).all() for lost in states(batch, split, (0, 2)))


def test_nothing_survives(llama: Checkpoint) -> None:
    _, output = forward(llama, 0, 3, packed=False, scarce=Scarce(rows=0))
    assert (sorted(output.failed), output.parts, output.pooled()) == ([0, 1, 2, 3, 4], 5, {})


def test_a_stage_goes_on_after_it_ran_out(llama: Checkpoint) -> None:
    scarce = Scarce(rows=2)
    model = load_slice(llama, first=0, stop=6, dtype="float32")
    with Stage(model, hooks=[LayerHook(layer=5, change=scarce)]) as stage:
        assert stage.forward(samples_batch()).parts == 3
        scarce.limits = (99, 999)
        assert stage.forward(samples_batch()).parts == 1


def test_other_errors_are_not_taken_for_it(llama: Checkpoint) -> None:
    def change(h_BTD: torch.Tensor) -> torch.Tensor:
        calls.append(h_BTD.shape)
        return h_BTD @ torch.zeros(1, 1)

    calls: list[torch.Size] = []
    model = load_slice(llama, first=0, stop=6, dtype="float32")
    with (
        Stage(model, hooks=[LayerHook(layer=0, change=change)]) as stage,
        pytest.raises(RuntimeError, match="shapes cannot be multiplied"),
    ):
        stage.forward(samples_batch())
    assert len(calls) == 1


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="limits the address space as Linux counts it")
def test_memory_that_really_runs_out(llama: Checkpoint) -> None:
    """With 150 MB left a rollout of 2,000 tokens runs alone; with 60 MB it does not, and others survive."""
    command = [sys.executable, "-m", "tests.extract.scarce_memory", llama.source, "150", "60"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    split, lost = map(json.loads, done.stdout.splitlines())
    assert split["failed"] == {}
    assert lost["failed"] == {"0": OUT_OF_MEMORY}
    for found in (split, lost):
        assert found["parts"] > 1
        assert found["error"] <= 1e-5
