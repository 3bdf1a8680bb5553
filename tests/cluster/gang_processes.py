"""Processes that form a gang for tests, and what the tests have them do.

The test stays outside, as a driver does: it hands the rendezvous of rank 0 to the others, and calls all ranks at once.
"""

import importlib.util
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers.utils import logging

from personaspace.cluster.gang import Gang, Rendezvous
from personaspace.cluster.tensor import load_causal_lm_parallel, load_tensor_parallel
from personaspace.extract.chat import ChatFormat
from personaspace.extract.checkpoint import Checkpoint
from personaspace.extract.config import Dtype, GenerateConfig, ModelConfig, Site
from personaspace.extract.generate.engine import Response
from personaspace.extract.generate.transformers_engine import TransformersEngine
from personaspace.extract.hooks import LayerHook
from personaspace.extract.selfcheck import check_stage
from personaspace.extract.slicing import Slice
from personaspace.extract.stage import Stage
from tests.extract.families import samples_batch
from tests.extract.offload_memory import growth
from tests.extract.test_stage_memory import Scarce

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None and os.environ.get("PERSONASPACE_REQUIRE_DEEPSPEED") != "1",
    reason="DeepSpeed is not installed (PERSONASPACE_REQUIRE_DEEPSPEED=1 runs the tests all the same)",
)


class GangProcesses:
    """A gang on this machine, one process per rank, that does what it is told."""

    def __init__(self, ranks: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(ranks):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=_rank, args=(rank, ranks, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        address = self._pipes[0].recv()
        for pipe in self._pipes[1:]:
            pipe.send(address)
        for pipe in self._pipes:
            assert pipe.recv() == "joined"

    def call(self, task: Callable[..., Any], *args: Any) -> list[Any]:
        """``task(gang, *args)`` of each rank; raises the first rank's exception if there is one."""
        return self.call_each(task, [args] * len(self._pipes))

    def call_each(self, task: Callable[..., Any], args: Sequence[Sequence[Any]]) -> list[Any]:
        """The same with each rank's own arguments."""
        for rank, own in enumerate(args):
            self.send(rank, task, *own)
        results = [self.result(rank) for rank in range(len(args))]
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results

    def send(self, rank: int, task: Callable[..., Any], *args: Any) -> None:
        """Have one rank begin."""
        self._pipes[rank].send((task, args))

    def result(self, rank: int) -> Any:
        """What one rank gives, or its exception."""
        return self._pipes[rank].recv()

    def kill(self, rank: int) -> None:
        """SIGKILL, as the kernel does it where memory runs out."""
        pid = self._processes[rank].pid
        assert pid
        os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _rank(rank: int, ranks: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    meeting: Rendezvous | str
    if rank == 0:
        meeting = Rendezvous()
        pipe.send(meeting.address)
    else:
        meeting = pipe.recv()
    gang = Gang(meeting, rank=rank, ranks=ranks)
    pipe.send("joined")
    while True:
        task, args = pipe.recv()
        try:
            pipe.send(task(gang, *args))
        except Exception as error:
            error.add_note(traceback.format_exc())
            pipe.send(error)


def means(gang: Gang, checkpoint: Checkpoint, sites: tuple[Site, ...], dtype: Dtype) -> list[NDArray[np.float32]]:
    """Of each of tests.extract.families' samples ``(Z, L, S, D)``, from a checked slice."""
    model = load_tensor_parallel(checkpoint, gang, dtype=dtype)
    with Stage(model, sites=sites) as stage:
        check_stage(stage, packed=False)
        pooled = stage.forward(samples_batch()).pooled()
    return [rows.means_SD for rows in pooled.values()]


def halved(gang: Gang, checkpoint: Checkpoint, scarce: bool) -> list[tuple[int, NDArray[np.float32]]]:
    """Parts and means of the samples where memory is plenty, and where at most 2 rows have room if it is scarce."""
    model = load_tensor_parallel(checkpoint, gang, dtype="float32", stop=3)

    def meet() -> None:
        gang.run_out_of_memory(timedelta(seconds=3))

    results = []
    for hooks in ((), (LayerHook(layer=1, change=Scarce(rows=2)),) if scarce else ()):
        with Stage(model, hooks=hooks, before_halves=meet) as stage:
            output = stage.forward(samples_batch())
        pooled = output.pooled()
        results.append((output.parts, np.concatenate([pooled[row].means_SD for row in sorted(pooled)], axis=2)))
    return results


def responses(gang: Gang, checkpoint: Checkpoint, prompts: list[list[int]], config: GenerateConfig) -> list[Response]:
    chat = ChatFormat(checkpoint, ModelConfig(id=checkpoint.source))
    model = load_causal_lm_parallel(checkpoint, gang, dtype="float32")
    return TransformersEngine(model, chat, agree=gang.agree).generate(prompts, list(range(len(prompts))), config)


def load(gang: Gang, checkpoint: Checkpoint) -> None:
    load_tensor_parallel(checkpoint, gang, dtype="float32")


def held(gang: Gang, checkpoint: Checkpoint, stop: int) -> dict[str, int]:
    """Elements of a block on this rank, and bytes by which the process grows while the model is loaded and runs."""
    kept: list[Slice] = []

    def loaded() -> Slice:
        kept.append(load_tensor_parallel(checkpoint, gang, dtype="float32", stop=stop))
        return kept[0]

    grown = growth(loaded)
    return {"grown": grown, "block": sum(weight.numel() for weight in kept[0].blocks[0].parameters())}


def agreed(gang: Gang) -> tuple[list[int], float, float]:
    token_B = torch.tensor([gang.rank, 7 + gang.rank])
    return gang.agree(token_B).tolist(), gang.largest(gang.rank), gang.sum(gang.rank + 1)


def folder_of(path: Path, files: str = "*.safetensors") -> int:
    """Bytes of the files."""
    return sum(file.stat().st_size for file in path.glob(files))
