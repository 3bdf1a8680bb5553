"""What the driver does for each window of a real run: the real extract step, with stages that compute nothing.

They write shards of zeros by the real protocol, so that the driver finds the records that it looks for. Layer groups
are eight, as in a 70B run of 80 layers; rollouts have that run's lengths.
"""

import json
import random
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import ray

from personaspace.cluster import extraction
from personaspace.cluster.config import ClusterConfig
from personaspace.cluster.events import Busy, Loaded
from personaspace.cluster.generation import generate
from personaspace.cluster.job import prepare
from personaspace.cluster.replicas import loaded
from personaspace.cluster.session import hold_run
from personaspace.cluster.shards import UnitShards
from personaspace.cluster.simulation.scenario import draw_lengths
from personaspace.cluster.stages import Order, Ran, StageSpec
from personaspace.extract.config import ExtractConfig, GenerateConfig, ModelConfig, PersonasConfig
from personaspace.store.commit import commit
from personaspace.store.config import StoreConfig
from personaspace.store.layout import shard_key
from personaspace.store.schema import encode_shard

UNIT_ROWS = 120
UNITS_PER_ROLE = 2
GROUPS = 8
WORDS = ("time", "people", "water", "house", "world", "night", "music", "river", "paper", "table")
"""One token each, in most vocabularies."""
PROMPT_OVERHEAD = 30
"""Tokens that the template adds, about."""


@ray.remote(num_cpus=0, concurrency_groups={"store": 1}, enable_tensor_transport=True)
class Blank:
    """A stage that computes nothing, and commits zeros."""

    def __init__(self, spec: StageSpec) -> None:
        self._spec = spec
        layout = spec.layout
        self._shards = {
            len(layout.group_layers(group)): encode_shard(
                np.zeros((layout.unit_rows, len(layout.group_layers(group)), layout.hidden), np.float32),
                layout,
                spec.precision,
            )
            for group in range(layout.groups)
        }

    def load(self) -> Loaded:
        return loaded(time.monotonic())

    def forward(self, order: Order, received: Ran | None) -> Ran:
        now = time.time()
        before = () if received is None else received.busy
        return Ran(busy=(*before, Busy(activity="forward", start=now, stop=now)))

    @ray.method(concurrency_group="store")
    def commit(self, window: int, units: Sequence[UnitShards]) -> Busy:
        begin, layout = time.time(), self._spec.layout
        for unit in units:
            for array, group in unit.shards:
                key = shard_key(self._spec.arrays[0].path, unit.unit, group)
                commit(
                    self._spec.fence,
                    (array, unit.unit, group),
                    {key: self._shards[len(layout.group_layers(group))]},
                    rows=layout.unit_row_range(unit.unit),
                    dropped=unit.dropped,
                    source=unit.source,
                )
        return Busy(activity="commit", start=begin, stop=time.time())


def measure_work(model: str, folder: Path, roles: int, window_rows: int) -> dict[str, Any]:
    """Seconds of the driver for a window, a micro-batch and a unit. A Ray cluster must be there."""
    shutil.rmtree(folder, ignore_errors=True)
    rows = roles * UNITS_PER_ROLE * UNIT_ROWS
    write_rollouts(folder / "responses", roles, random.Random(0))
    model = str(Path(model).expanduser())
    begin = time.perf_counter()
    checkpoint_layers = json.loads((Path(model) / "config.json").read_text())["num_hidden_layers"]
    job = prepare(
        model=ModelConfig(id=model, dtype="bfloat16"),
        personas=PersonasConfig(),
        generate=GenerateConfig(responses=str(folder / "responses")),
        extract=ExtractConfig(window_rows=window_rows),
        store=StoreConfig(
            root=str(folder), run="run", unit_rows=UNIT_ROWS, layer_group=-(-checkpoint_layers // GROUPS)
        ),
        execution={},
    )
    prepared = time.perf_counter() - begin
    cluster = ClusterConfig(stages=2, replicas=1, device="cpu")
    seconds: dict[str, list[Took]] = {}
    with hold_run(job, say=print) as fence:
        generate(job, fence, cluster, lambda _: None)
        with ExitStack() as stack:
            stack.enter_context(patch.object(extraction, "StageActor", Blank))
            for owner, name in (
                (extraction, "load_window"),
                (extraction, "commit_coordinates"),
                (extraction.Extraction, "submit"),
                (extraction.Extraction, "finished"),
                (extraction.Extraction, "commit"),
            ):
                stack.enter_context(timed(owner, name, seconds.setdefault(name, [])))
            begin = time.perf_counter()
            extraction.extract(job, fence, cluster, lambda _: None)
            whole = time.perf_counter() - begin
    shutil.rmtree(folder)
    return {
        "rollouts": rows,
        "windows": len(seconds["load_window"]),
        "micro_batches": len(seconds["submit"]),
        "prepare_s": prepared,
        "extract_s": whole,
        "load_window_s_per_rollout": sum(took.computing for took in seconds["load_window"]) / rows,
        "submit_s_per_stage": statistics.median(took.whole for took in seconds["submit"]) / 2,
        "finished_s": statistics.median(took.whole for took in seconds["finished"]),
        "commit_s_per_rollout": sum(took.whole for took in seconds["commit"]) / rows,
        "coordinates_s_per_unit": statistics.median(took.computing for took in seconds["commit_coordinates"]),
        "coordinates_whole_s": statistics.median(took.whole for took in seconds["commit_coordinates"]),
    }


def write_rollouts(folder: Path, roles: int, draw: random.Random) -> None:
    """Conversations of random words with the lengths that the simulation draws, as assistant-axis files."""
    folder.mkdir(parents=True)
    each = UNITS_PER_ROLE * UNIT_ROWS
    lengths = iter(draw_lengths(roles * each, draw.randrange(2**32)))
    for role in range(roles):
        lines = []
        for number in range(each):
            prompt, response = next(lengths)
            texts = (max(1, prompt - PROMPT_OVERHEAD), response)
            asked, answered = (" ".join(draw.choices(WORDS, k=count)) for count in texts)
            lines.append(
                json.dumps(
                    {
                        "prompt_index": 0,
                        "question_index": number,
                        "question": f"Question {number}?",
                        "label": "pos",
                        "system_prompt": "",
                        "conversation": [
                            {"role": "user", "content": asked},
                            {"role": "assistant", "content": answered},
                        ],
                    }
                )
            )
        name = f"role{role:03d}" if role else "default"
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))


class Took(NamedTuple):
    """Seconds of a call."""

    whole: float
    computing: float
    """Its thread had a core."""


@contextmanager
def timed(owner: Any, name: str, seconds: list[Took]) -> Iterator[None]:
    """Note how long each call of a function takes that the step calls."""
    original = getattr(owner, name)

    def measured(*arguments: Any, **options: Any) -> Any:
        start, computing = time.perf_counter(), time.thread_time()
        try:
            return original(*arguments, **options)
        finally:
            seconds.append(Took(time.perf_counter() - start, time.thread_time() - computing))

    with patch.object(owner, name, measured):
        yield
