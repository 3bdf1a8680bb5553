"""A stage in a process whose memory is nearly all used up; test_stage_memory.py starts it.

python -m tests.extract.scarce_memory CHECKPOINT MEGABYTES...

For each amount of memory prints what one micro-batch gave: in how many parts, what failed, and the largest relative
error of the rest.
"""

import json
import re
import resource
import sys
from pathlib import Path

import numpy as np
import torch

from personaspace.extract.checkpoint import resolve
from personaspace.extract.config import ModelConfig
from personaspace.extract.slicing import load_slice
from personaspace.extract.stage import Stage

LENGTHS = (2000, 512, 512, 512, 500, 400)


def main(checkpoint: str, amounts: list[int]) -> None:
    torch.set_num_threads(1)
    # Eager attention takes memory by the square of the length: 64 MB for each copy of the scores of the longest.
    model = load_slice(resolve(ModelConfig(id=checkpoint)), first=0, stop=2, dtype="float32", attention="eager")
    with Stage(model, last=False) as stage:
        batch, _ = stage.probe(LENGTHS)
        alone = [stage.forward(batch.part(row, row + 1)).pooled()[row].sums_SD for row in batch.rows]
        used = re.search(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert used
        for megabytes in amounts:
            limit = int(used[1]) * 1024 + megabytes * 2**20
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
            output = stage.forward(batch)
            assert output.hidden_BTD is not None
            assert output.hidden_BTD.shape[:2] == batch.shape
            error = max(
                np.abs(rows.sums_SD - alone[row]).max() / np.abs(alone[row]).max()
                for row, rows in output.pooled().items()
            )
            print(json.dumps({"parts": output.parts, "failed": output.failed, "error": float(error)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], [int(amount) for amount in sys.argv[2:]])
