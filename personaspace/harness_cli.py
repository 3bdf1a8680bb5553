"""`personaspace harness RUN`: what capping costs in capability, by lm-evaluation-harness, side by side."""

import argparse
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from personaspace.config import with_steer_flags
from personaspace.live import model_of
from personaspace.steer.config import SteerConfig
from personaspace.store.errors import InputError
from personaspace.store.formats.files import refuse_existing, replacing
from personaspace.store.location import open_folder
from personaspace.store.manifest import require_manifest

EPILOG = """\
examples:
  personaspace harness runs/demo --tasks gsm8k ifeval --limit 200
  personaspace harness runs/demo --tasks mmlu_pro --percentile 50 --layers 20-23 --output capability.json
  personaspace harness runs/demo --tasks my_task --include-path my_tasks --method add --coefficient -0.5
  lm-eval run --model personaspace ...     needs `import personaspace.steer.harness` first (docs/steering.md)

RUN is a run with a fit; its model runs the tasks twice, as it is and changed as the flags of `steer` say (default: the
paper's cap). Tasks that the harness brings are downloaded by it; others lie in --include-path."""


def add_harness(commands: Any) -> None:
    """Add `harness` to the command line's parser."""
    harness = commands.add_parser(
        "harness",
        help="capability of the model, capped and not, by lm-evaluation-harness",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    harness.add_argument("run", metavar="RUN", help="folder or URL of a run with a fit")
    harness.add_argument("--tasks", nargs="+", required=True, metavar="TASK", help="names of the harness's tasks")
    harness.add_argument("--include-path", type=Path, metavar="FOLDER", help="further tasks, as YAML files")
    harness.add_argument("--limit", type=int, metavar="N", help="questions of each task (default: all)")
    harness.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each (default: the task's own)")
    harness.add_argument("--batch-size", type=int, default=8, metavar="N", help="default 8")
    harness.add_argument("--chat", action="store_true", help="put questions through the model's chat template")
    harness.add_argument("--model", metavar="ID", help="model to load, where that of the run lies elsewhere")
    harness.add_argument("--device", help="such as cuda:1 (default: the GPU if there is one)")
    harness.add_argument("--output", type=Path, metavar="FILE", help="also write all results as JSON")
    harness.add_argument("--overwrite", action="store_true", help="replace that file")


def run_harness(parsed: argparse.Namespace, flags: Sequence[str]) -> int:
    """Evaluate both, print them side by side, and return the exit code 0."""
    steer = with_steer_flags(SteerConfig(source=parsed.run), flags, prog="personaspace harness RUN")
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("harness: needs lm-evaluation-harness. Install it: pip install 'personaspace[harness]'")
    if parsed.output is not None:
        refuse_existing(parsed.output, overwrite=parsed.overwrite)
    folder = open_folder(parsed.run)
    manifest = require_manifest(folder)
    model_config = model_of(manifest.execution, folder.url, parsed.model)
    # The libraries of the model load here, so that --help and bad input answer at once.
    import torch

    from personaspace.extract.chat import ChatFormat
    from personaspace.extract.checkpoint import resolve
    from personaspace.extract.generate.transformers_engine import load_causal_lm
    from personaspace.extract.precision import machine_dtype
    from personaspace.steer.harness import check_tasks, compare_capability
    from personaspace.steer.sources import resolve_interventions

    check_tasks(parsed.tasks, parsed.include_path)
    resolve_interventions(steer)
    device = parsed.device or ("cuda" if torch.cuda.is_available() else "cpu")
    checkpoint = resolve(model_config)
    dtype = machine_dtype(device) if model_config.dtype == "auto" else model_config.dtype
    found = compare_capability(
        load_causal_lm(checkpoint, dtype=dtype, device=device),
        ChatFormat(checkpoint, model_config).tokenizer,
        steer,
        parsed.tasks,
        include_path=None if parsed.include_path is None else str(parsed.include_path),
        limit=parsed.limit,
        num_fewshot=parsed.num_fewshot,
        batch_size=parsed.batch_size,
        apply_chat_template=parsed.chat,
    )
    if parsed.output is not None:
        with replacing(parsed.output, overwrite=True) as file:
            file.write_text(json.dumps(found, indent=1, default=str) + "\n", encoding="utf-8")
    _show(found)
    return 0


def _show(found: Mapping[str, Mapping[str, Any]]) -> None:
    table = Table("task", "metric", "plain", "steered", "difference", box=None, pad_edge=False)
    for task, plain in found["plain"].items():
        steered = found["steered"][task]
        for name, value in plain.items():
            metric, _, rest = name.partition(",")
            if not isinstance(value, float) or metric.endswith("_stderr"):
                continue
            errors = [of.get(f"{metric}_stderr,{rest}") for of in (plain, steered)]
            texts = [
                f"{of[name]:.3f}" + (f" ± {error:.3f}" if isinstance(error, float) else "")
                for of, error in zip((plain, steered), errors, strict=True)
            ]
            table.add_row(task, metric, *texts, f"{steered[name] - value:+.3f}")
    Console(highlight=False, soft_wrap=True).print(table)
