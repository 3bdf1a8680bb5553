"""`personaspace watch FILE`: whether a finished conversation stayed in the Assistant's range, as an exit code."""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from personaspace.store.errors import InputError

if TYPE_CHECKING:
    from personaspace.steer.live.gauge import Gauge
    from personaspace.steer.live.watching import Watched

EPILOG = """\
examples:
  personaspace watch transcript.json --space runs/demo
  personaspace watch transcripts/ --space runs/demo --allow 1     in the CI of a chat product
  personaspace watch talk.json --space s3://bucket/runs/qwen --model /models/Qwen3-32B --device cuda --json

FILE is a transcript, {"conversation": [{"role": "user", "content": "..."}, ...]}, as the page of `personaspace chat`
exports it, or a folder of them. The model of the space's run reads it; each answer's position on the Assistant Axis is
shown beside the range of the run's default responses (5% to 95%; mean role 0, mean default 1). Exit code 9: more turns
than --allow lay below the range, in any conversation. One in twenty default answers does, by definition."""
LEFT = 9
"""Exit code where a conversation left the range."""
WIDTH = 41
"""Characters of the drawn scale."""
SHOWN = 60
"""Characters of an answer."""


def add_watch(commands: Any) -> None:
    """Add `watch` to the command line's parser."""
    command = commands.add_parser(
        "watch",
        help="whether transcripts stay in the Assistant's range: drift in the terminal, with an exit code",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("file", metavar="FILE", type=Path, help="a transcript, or a folder of them")
    command.add_argument("--space", metavar="RUN", required=True, help="folder or URL of a run with a fit")
    command.add_argument("--layer", type=int, metavar="L", help="where to look (default: the target layer)")
    command.add_argument("--allow", type=int, default=0, metavar="N", help="turns below the range (default: none)")
    command.add_argument("--turns", type=int, metavar="N", help="look at the assistant's first N turns only")
    command.add_argument("--model", metavar="ID", help="model to load, where that of the run lies elsewhere")
    command.add_argument("--device", help="such as cuda:1 (default: the GPU if there is one)")
    command.add_argument("--json", action="store_true", help="print all numbers as JSON")


def run_watch(parsed: argparse.Namespace, flags: Sequence[str]) -> int:
    """Print each turn's place, and return 0, or `LEFT` where a conversation left the range."""
    if flags:
        raise InputError(f"watch: unknown argument {flags[0]}. See `personaspace watch --help`.")
    if parsed.allow < 0 or (parsed.turns is not None and parsed.turns < 1):
        raise InputError("watch: --allow takes a number from 0 on, and --turns one from 1 on.")
    if not parsed.file.exists():
        raise InputError(f"watch: {parsed.file} does not exist. Give a transcript (.json), or a folder of them.")
    # The libraries of model and fit load here, so that --help and bad input answer at once.
    from personaspace.live import model_of
    from personaspace.steer.live.gauge import read_gauge
    from personaspace.store.formats.transcripts import first_turns, read_transcripts
    from personaspace.store.location import open_folder
    from personaspace.store.manifest import require_manifest

    transcripts = [
        replace(transcript, conversation=first_turns(transcript.conversation, parsed.turns))
        for transcript in read_transcripts(parsed.file)
    ]
    folder = open_folder(parsed.space)
    model = model_of(require_manifest(folder).execution, folder.url, parsed.model)
    gauge = read_gauge(folder, parsed.layer, "watch --layer")
    from personaspace.extract.engine import Extractor
    from personaspace.steer.live.watching import watch

    with Console(stderr=True, highlight=False).status("the model reads"):
        found = watch(Extractor(model, device=parsed.device), gauge, transcripts)
    if parsed.json:
        print(json.dumps(_document(found, gauge), indent=1))
    else:
        _print(found, gauge)
    return LEFT if any(one.below > parsed.allow for one in found) else 0


def _document(found: Sequence["Watched"], gauge: "Gauge") -> dict[str, Any]:
    return {
        "layer": gauge.layer,
        "default_range": [gauge.low, gauge.high],
        "transcripts": [
            {
                "file": one.where,
                "below": one.below,
                "turns": [
                    {"turn": turn.number + 1, "tokens": turn.tokens, "position": turn.position} for turn in one.turns
                ],
            }
            for one in found
        ],
    }


def _print(found: Sequence["Watched"], gauge: "Gauge") -> None:
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(width=160, highlight=False)
    positions = [turn.position for one in found for turn in one.turns]
    ends = min(gauge.low, 0.0, *positions), max(gauge.high, 1.0, *positions)
    scale = f"layer {gauge.layer}: default range {gauge.low:.2f} to {gauge.high:.2f} (between the bars); "
    console.print(Text(scale + "mean role 0, mean default 1"), soft_wrap=True)
    for one in found:
        console.print(Text(f"\n{one.where}"), soft_wrap=True)
        table = Table(box=None, pad_edge=False)
        table.add_column("turn", justify="right")
        table.add_column("position", justify="right")
        table.add_column(f"{ends[0]:.1f}".ljust(WIDTH - 4) + f"{ends[1]:.1f}".rjust(4), no_wrap=True)
        table.add_column("tokens", justify="right")
        table.add_column("answer", no_wrap=True, overflow="ellipsis")
        for turn in one.turns:
            table.add_row(
                str(turn.number + 1),
                f"{turn.position:.2f}",
                Text(_scale(turn.position, gauge, ends), style="red" if turn.position < gauge.low else ""),
                str(turn.tokens),
                Text(" ".join(turn.text.split())[:SHOWN]),
            )
        console.print(table)
        console.print(f"{one.below or 'none'} of {len(one.turns)} turns below the range")


def _scale(position: float, gauge: "Gauge", ends: tuple[float, float]) -> str:
    """A line of `WIDTH` characters with the range's ends and the turn's place."""

    def place(value: float) -> int:
        return math.floor((value - ends[0]) / (ends[1] - ends[0]) * (WIDTH - 1) + 0.5)

    line = ["·"] * WIDTH
    line[place(gauge.low)] = line[place(gauge.high)] = "|"
    line[place(position)] = "<" if position < gauge.low else ">" if position > gauge.high else "o"
    return "".join(line)
