"""A process that resolves a Hugging Face id and loads some slices: `python -m tests.extract.load_from_hub ID 0-2 2-6`.

Prints one line of JSON: for each slice a hash of its weights.
"""

import hashlib
import json
import sys

from transformers.utils import logging

from personaspace.extract.checkpoint import resolve
from personaspace.extract.config import ModelConfig
from personaspace.extract.slicing import Slice, load_slice


def digest(model: Slice) -> str:
    """SHA-256 of all weights, by name."""
    total = hashlib.sha256()
    for name, parameter in sorted(model.decoder.named_parameters()):
        total.update(name.encode() + parameter.detach().numpy().tobytes())
    return total.hexdigest()


def main() -> None:
    logging.disable_progress_bar()
    checkpoint = resolve(ModelConfig(id=sys.argv[1]))
    ranges = [tuple(map(int, text.split("-"))) for text in sys.argv[2:]]
    print(json.dumps([digest(load_slice(checkpoint, first=a, stop=b, dtype="float32")) for a, b in ranges]))


if __name__ == "__main__":
    main()
