"""How much a process grows at most when it runs a model from disk, and from memory; test_offload.py starts it.

python -m tests.extract.offload_memory CHECKPOINT

Prints the bytes of the weights, and of resident memory (the mapped pages of the checkpoint's files with it) that come
on top while the model is loaded and runs.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from personaspace.extract.checkpoint import resolve
from personaspace.extract.config import ModelConfig
from personaspace.extract.offload import Offload, load_offloaded
from personaspace.extract.slicing import Slice, load_slice
from personaspace.extract.stage import Stage


def resident(field: str) -> int:
    """`VmRSS` or its peak `VmHWM`, in bytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def growth(load: Callable[[], Slice]) -> int:
    """Bytes by which the process grows at most while the model is loaded and runs twice."""
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    with Stage(load()) as stage:
        batch, _ = stage.probe((200,))
        for _ in range(2):
            stage.forward(batch)
    return resident("VmHWM") - before


def main(folder: str) -> None:
    torch.set_num_threads(1)
    checkpoint = resolve(ModelConfig(id=folder))

    def from_disk() -> Slice:
        return load_offloaded(checkpoint, Offload(to="disk"), dtype="float32", stop=layers)

    # What the first pass of all takes once is no part of it.
    layers = 1
    growth(from_disk)
    layers = checkpoint.layers
    print(
        json.dumps(
            {
                "weights": sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")),
                "on disk": growth(from_disk),
                "in memory": growth(lambda: load_slice(checkpoint, first=0, stop=layers, dtype="float32")),
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1])
