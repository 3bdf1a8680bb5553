"""What a stage takes of the checkpoint: resident memory and bytes read, for 1, 2 and 3 stages, against its share.

    python benchmarks/stage_memory.py                    # SmolLM2-135M (make demo fetches it), and 1 GB in 25 files
    python benchmarks/stage_memory.py --quick --json out.json

Each stage loads in a fresh process, with the checkpoint out of the page cache, and then reads every weight once, as a
forward pass does: on a CPU weights of the file's own precision are mapped, not copied. Its share is what the tensors of
its layers, and of the embedding on the first, take in the files.
"""

import argparse
import json
import os
import re
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from machine import bytes_read, describe_machine, isolated
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig

from personaspace.extract.anatomy import empty_model
from personaspace.extract.checkpoint import Checkpoint, resolve
from personaspace.extract.config import ModelConfig
from personaspace.extract.demo_model import DEFAULT_FOLDER
from personaspace.extract.slicing import load_slice
from personaspace.store.catalog import human_bytes
from personaspace.store.layout import Layout, choose_layer_group

LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "vocab_size": 64000}
SMALL = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "vocab_size": 8000}
BLOCK = re.compile(r"\.layers\.(\d+)\.")


def make_checkpoint(folder: Path, shape: dict[str, int], files: int) -> Path:
    """Save a random Llama in bfloat16, in about so many files."""
    config = LlamaConfig(**shape, num_attention_heads=16, num_key_value_heads=8)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    size = sum(parameter.numel() * 2 for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=size // files)
    return folder


def share_of(checkpoint: Checkpoint, first: int, stop: int) -> int:
    """Bytes that the stage's own tensors take in the files."""
    total = 0
    for file in Path(checkpoint.source).glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                block = BLOCK.search(name)
                if first <= int(block[1]) < stop if block else first == 0 and "embed_tokens" in name:
                    piece = opened.get_slice(name)
                    bits = int(re.sub(r"\D", "", piece.get_dtype()))
                    total += bits // 8 * int(torch.Size(piece.get_shape()).numel())
    return total


def measure_stage(checkpoint: Checkpoint, first: int, stop: int) -> dict[str, int]:
    """Bytes that one stage takes, in a process that has done nothing else."""
    empty_model(checkpoint)
    for file in Path(checkpoint.source).iterdir():
        _forget(file)
    before, read = _memory(), bytes_read()
    model = load_slice(checkpoint, first=first, stop=stop, dtype="bfloat16")
    for parameter in model.decoder.parameters():
        parameter.view(torch.int16).max()
    after, read_after = _memory(), bytes_read()
    # Parts of files that are in the page cache now can only have come from this stage.
    touched = [file for file in Path(checkpoint.source).glob("*.safetensors") if _is_cached(file)]
    return {
        "rss": after["Rss"] - before["Rss"],
        # What of the resident memory is the checkpoint's own pages: the tensors that were really touched.
        "mapped": after["Rss"] - after["Anonymous"] - before["Rss"] + before["Anonymous"],
        "read": read_after[1] - read[1] + read_after[0] - read[0],
        "files": len(touched),
    }


def _forget(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def _is_cached(file: Path) -> bool:
    """Whether the first bytes of a file, which every reader needs, can be had without waiting for storage."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        return os.preadv(descriptor, [bytearray(8)], 0, os.RWF_NOWAIT) == 8
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)


def _memory() -> dict[str, int]:
    text = Path("/proc/self/smaps_rollup").read_text()
    return {name: int(kilobytes) * 1024 for name, kilobytes in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}


def boundaries(checkpoint: Checkpoint, stages: int) -> list[int]:
    """Where a run would cut: between layer groups."""
    group = choose_layer_group(checkpoint.layers)
    layout = Layout(segments=(1,), layers=checkpoint.layers, hidden=checkpoint.hidden, unit_rows=1, layer_group=group)
    return layout.stage_boundaries(stages, checkpoint.layers // group)


def measure(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    figures = []
    whole = share_of(checkpoint, 0, checkpoint.layers)
    files = len(list(Path(checkpoint.source).glob("*.safetensors")))
    for stages in (1, 2, 3):
        for number, (first, stop) in enumerate(pairwise(boundaries(checkpoint, stages))):
            share = share_of(checkpoint, first, stop)
            found = isolated(measure_stage, checkpoint, first, stop)
            figures.append({"stages": stages, "stage": number, "layers": [first, stop], "share": share, **found})
            print(
                f"{checkpoint.name}: stage {number + 1} of {stages}, layers {first} to {stop - 1}: its tensors "
                f"{human_bytes(share)} ({share / whole:.0%}); resident {human_bytes(found['rss'])}, of the files "
                f"{human_bytes(found['mapped'])} ({found['mapped'] / share:.2f} of its tensors); read "
                f"{human_bytes(found['read'])} ({found['read'] / share:.2f}); {found['files']} of {files} files opened"
            )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEFAULT_FOLDER.expanduser(), help="checkpoint folder")
    parser.add_argument("--folder", type=Path, help="where the random model is made for a while (default: /var/tmp)")
    parser.add_argument("--quick", action="store_true", help="a small random model only")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()

    figures: dict[str, Any] = {"machine": describe_machine(Path.cwd())}
    with tempfile.TemporaryDirectory(dir=arguments.folder or "/var/tmp") as scratch:
        made = make_checkpoint(Path(scratch) / "random", *((SMALL, 6) if arguments.quick else (LARGE, 25)))
        for folder in (made,) if arguments.quick else (arguments.model, made):
            checkpoint = resolve(ModelConfig(id=str(folder)))
            figures[checkpoint.name] = measure(checkpoint)
    stages = [stage for name, found in figures.items() if name != "machine" for stage in found]
    figures["largest_read_over_share"] = max(stage["read"] / stage["share"] for stage in stages)
    figures["largest_mapped_over_share"] = max(stage["mapped"] / stage["share"] for stage in stages)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
