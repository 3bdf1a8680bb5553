"""A gang: processes that run one model in lock-step, each with a share of every block.

All of them call the same things in the same order; where one stops, the others wait for it in a collective until their
time is up. So whoever starts a gang ends all of it when any of its processes fails.
"""

import importlib.util
import os
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch
from torch import distributed
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from personaspace.store.errors import InputError, WorkerError

TIMEOUT = timedelta(minutes=10)
"""How long a process waits for the others in a collective before it fails."""
PATIENCE = timedelta(minutes=1)
"""How long a process that has run out of memory waits for the others to run out of it too."""


class OutOfStepError(WorkerError):
    """The ranks of a gang are not at the same point any more; it has to be ended and started again."""


class Rendezvous:
    """Where the processes of a gang find each other; rank 0 opens it and keeps it for as long as the gang lasts."""

    def __init__(self, host: str = "127.0.0.1", *, timeout: timedelta = TIMEOUT) -> None:
        # Port 0: the system chooses a free one and it is taken at once, so nobody can come in between.
        self.store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)

    @property
    def address(self) -> str:
        """`host:port` for the other ranks."""
        return f"{self.store.host}:{self.store.port}"


class Gang:
    """This process's place in a gang. Waits until all ranks are there.

    ``meeting`` is the rendezvous itself for rank 0, and its address for the others. Processes talk by gloo where
    ``device`` is the CPU and by NCCL where it is `cuda`; there each has to see one device only. A process belongs to
    one gang at a time. Raises InputError without DeepSpeed, and torch's DistError if others don't come in time.
    """

    def __init__(
        self,
        meeting: Rendezvous | str,
        *,
        rank: int,
        ranks: int,
        device: str = "cpu",
        timeout: timedelta = TIMEOUT,
    ) -> None:
        self.rank = rank
        self.ranks = ranks
        self.device = torch.device(device)
        self.deepspeed = _deepspeed(self.device.type)
        if isinstance(meeting, Rendezvous):
            self._store = meeting.store
        else:
            host, _, port = meeting.rpartition(":")
            self._store = TCPStore(host, int(port), is_master=False, timeout=timeout)
        self._shortages = 0
        arguments: dict[str, Any] = {}
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            arguments["device_id"] = torch.device("cuda", torch.cuda.current_device())
        distributed.init_process_group(
            "nccl" if self.device.type == "cuda" else "gloo",
            store=self._store,
            rank=rank,
            world_size=ranks,
            timeout=timeout,
            **arguments,
        )
        self.deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        self.group = self.deepspeed.comm.get_world_group()

    def agree(self, token_B: torch.Tensor) -> torch.Tensor:
        """Token ids (B,) of rank 0: sampling must not drift apart where ranks round otherwise."""
        agreed_B = token_B.contiguous()
        distributed.broadcast(agreed_B, src=0)
        return agreed_B

    def largest(self, number: float) -> float:
        """The largest of all ranks' numbers, so that all draw the same conclusion from it."""
        return self._reduce(number, distributed.ReduceOp.MAX)

    def sum(self, number: float) -> float:
        """The sum of all ranks' numbers."""
        return self._reduce(number, distributed.ReduceOp.SUM)

    def run_out_of_memory(self, patience: timedelta = PATIENCE) -> None:
        """Wait until all ranks have run out of memory at this very point, so that all may go on with less.

        Ranks hold equal shares and do the same, so as a rule they do. Where one runs out alone, the others wait for it
        in a collective; whatever it did next would be added to what they wait for. Then OutOfStepError is raised.
        """
        self._shortages += 1
        keys = [f"out of memory/{self._shortages}/{rank}" for rank in range(self.ranks)]
        # How many collectives this process has taken part in.
        everyone: Any = distributed.group.WORLD
        done = everyone._get_sequence_number_for_group()
        self._store.set(keys[self.rank], str(done))
        try:
            self._store.wait(keys, patience)
        except distributed.DistStoreError as error:
            raise self._out_of_step() from error
        if len({self._store.get(key) for key in keys}) > 1:
            raise self._out_of_step()

    def leave(self) -> None:
        """End the process group. The model that was sharded over the gang can't run after it."""
        self.deepspeed.comm.destroy_process_group()

    def _out_of_step(self) -> OutOfStepError:
        return OutOfStepError(
            f"rank {self.rank} of {self.ranks} ran out of memory where others did not. End the gang, start it again, "
            "and run the micro-batch in smaller parts."
        )

    def _reduce(self, number: float, how: Any) -> float:
        value = torch.tensor(number, dtype=torch.float64, device=self.device)
        distributed.all_reduce(value, op=how)
        return float(value)


def _deepspeed(device: str) -> ModuleType:
    """DeepSpeed, set up for the device; imported on use, since importing takes its time and claims an accelerator."""
    if importlib.util.find_spec("deepspeed") is None:
        raise InputError(
            "cluster.sharding: tensor needs DeepSpeed, which is not installed. Install personaspace[deepspeed] on "
            "every node, or set it to `pipeline`."
        )
    # Otherwise it takes a GPU wherever it sees one, whatever the model runs on.
    os.environ["DS_ACCELERATOR"] = device
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    chosen = get_accelerator().device_name()
    if chosen != device:
        raise InputError(f"DeepSpeed was set up for {chosen} in this process, so it can't shard over {device}.")
    # Its own all-reduce for CPUs is compiled when first used, for minutes; a build that is killed leaves a lock that
    # hangs the next, and it joins all processes of a machine. gloo needs no compiler and gives the same sums.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    module: ModuleType = deepspeed
    return module
