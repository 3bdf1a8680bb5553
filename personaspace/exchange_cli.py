"""`personaspace store export | import | import-scores | convert`: runs and axes to and from other projects' files."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from personaspace.store.config import Precision
from personaspace.store.location import open_folder

Add = Callable[[str, str, Callable[[argparse.Namespace, Sequence[str]], int]], argparse.ArgumentParser]
"""Adds an action with a help text and what carries it out."""
FORMATS = ("assistant-axis", "safetensors", "gguf", "parquet", "dataset", "tables", "transcripts")


def add_exchange(add: Add) -> None:
    """Add the four actions to those of `personaspace store`."""
    export = add("export", "Write a run, or the axis and role vectors of its fit, for other programs.", _export)
    export.add_argument("run", metavar="RUN")
    export.add_argument("destination", type=Path, metavar="DEST", help="a folder, or a file for the vector formats")
    export.add_argument(
        "--format",
        required=True,
        choices=FORMATS,
        help="assistant-axis: that project's output folder; safetensors: axis and role vectors with a JSON manifest; "
        "gguf: a control vector for llama.cpp; parquet: role vectors; dataset: a Hugging Face dataset folder; "
        "tables: CSV and Parquet of what the report draws; "
        "transcripts: conversations of several turns, as JSON",
    )
    export.add_argument("--roles", nargs="+", default=(), metavar="ROLE", help="only these (gguf: the direction to it)")
    export.add_argument("--layers", nargs="+", type=int, default=(), metavar="LAYER", help="only these")
    export.add_argument("--scores", metavar="JUDGE", help="whose scores, where several judged")
    export.add_argument("--sample", type=int, help="only this one (assistant-axis needs it where there are several)")
    export.add_argument("--model-hint", metavar="KIND", help="gguf: such as llama; default: the model's name")
    export.add_argument("--license", default="other", help="dataset: of the card; default: other")
    export.add_argument("--overwrite", action="store_true", help="replace what is at DEST")

    run = add("import", "Make a run of the assistant-axis project's output folder; repeat it to resume.", _import)
    run.add_argument("source", type=Path, metavar="SOURCE", help="folder with responses/ and activations/")
    run.add_argument("run", metavar="RUN")
    run.add_argument("--model", required=True, help="name of the model that it came from")
    run.add_argument("--precision", choices=get_args(Precision), default="16", help="kept mantissa bits; default: 16")
    run.add_argument("--unit-rows", type=int, help="rollouts per shard")
    run.add_argument("--layer-group", type=int, help="layers per shard")
    run.add_argument("--judge", default="assistant-axis", help="name for its scores, if there are any")
    run.add_argument("--repair", action="store_true", help="verify, and import damaged pieces again")

    scores = add("import-scores", "Put a judge's scores (ROLE.json files) onto a run.", _import_scores)
    scores.add_argument("source", type=Path, metavar="SOURCE", help="folder of ROLE.json files")
    scores.add_argument("run", metavar="RUN")
    scores.add_argument("--judge", required=True, help="name of this version of the judge")

    convert = add("convert", "Convert axis, role vectors or capping config between formats, by file endings.", _convert)
    convert.add_argument("source", type=Path, metavar="SOURCE", help=".pt, .safetensors, .gguf, .parquet, .json")
    convert.add_argument("destination", type=Path, metavar="DEST")
    convert.add_argument("--model", help="name of the model, where SOURCE does not say it")
    convert.add_argument("--role", help="gguf: the direction to this role in place of the axis")
    convert.add_argument("--model-hint", metavar="KIND", help="gguf: such as llama")
    convert.add_argument("--overwrite", action="store_true", help="replace DEST")


def _export(parsed: argparse.Namespace, _: Sequence[str]) -> int:
    from personaspace.store.exchange.export import export

    export(open_folder(parsed.run), parsed.destination, **_options(parsed, "run", "destination"))
    return 0


def _import(parsed: argparse.Namespace, _: Sequence[str]) -> int:
    from personaspace.store.exchange.import_run import import_assistant_axis

    import_assistant_axis(parsed.source, open_folder(parsed.run), **_options(parsed, "source", "run"))
    return 0


def _import_scores(parsed: argparse.Namespace, _: Sequence[str]) -> int:
    from personaspace.store.exchange.import_scores import import_scores

    import_scores(parsed.source, open_folder(parsed.run), judge=parsed.judge)
    return 0


def _convert(parsed: argparse.Namespace, _: Sequence[str]) -> int:
    from personaspace.store.exchange.convert import convert_directions

    convert_directions(parsed.source, parsed.destination, **_options(parsed, "source", "destination"))
    return 0


def _options(parsed: argparse.Namespace, *places: str) -> dict[str, Any]:
    """The action's own options, by the names of the function that takes them."""
    return {
        name: value for name, value in vars(parsed).items() if name not in {"command", "action", "handler", *places}
    }
