"""`personaspace caps RUN`: capping thresholds on the Assistant Axis, what they would touch, and a file of them."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from personaspace.analysis.caps.ranges import (
    PERCENTILES,
    Over,
    check_ranges,
    parse_range,
    suggested_ranges,
    sweep_ranges,
    written,
)
from personaspace.status_cli import run_of
from personaspace.store.errors import InputError
from personaspace.store.manifest import require_manifest

if TYPE_CHECKING:
    from personaspace.store.formats.directions import CappingConfig

EPILOG = """\
examples:
  personaspace caps runs/demo
  personaspace caps runs/demo --layers 20-23 22-25 --percentiles 10 25
  personaspace caps runs/demo --output capping.pt            for the assistant-axis project's steering code
  personaspace caps runs/demo --sweep --output capping.json  every window of the second half: choose by experiment

A percentile counts from the Assistant's end, as in the reference project's files: p25 leaves a quarter of the rollouts
alone and touches the others, so the lower, the stronger. docs/caps.md has the formula, the signs and the trap."""
ENDINGS = (".pt", ".json")


def add_caps(commands: Any) -> None:
    """Add `caps` to the command line's parser."""
    caps = commands.add_parser(
        "caps",
        help="capping thresholds on the axis: what they touch, and a capping config of them",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    caps.add_argument("target", metavar="RUN", help="folder or URL of a fitted run, such as runs/demo, or its config")
    caps.add_argument(
        "--layers",
        nargs="+",
        default=(),
        metavar="A-B",
        help="ranges of layers to cap together, both ends in (default: the paper's, at this model's depth)",
    )
    caps.add_argument("--sweep", action="store_true", help="also windows of three widths over the second half")
    caps.add_argument(
        "--percentiles",
        nargs="+",
        type=float,
        default=PERCENTILES,
        metavar="P",
        help="percent of the rollouts that a cap leaves alone (default 1 25 50 75, the paper's)",
    )
    caps.add_argument(
        "--over", choices=get_args(Over), default="all", help="whose rollouts the percentiles are of (default all)"
    )
    caps.add_argument("--all", action="store_true", help="thresholds of all layers, not only those of the ranges")
    caps.add_argument(
        "--output", type=Path, metavar="FILE", help="write a capping config: .pt (the reference's format) or .json"
    )
    caps.add_argument("--overwrite", action="store_true", help="replace FILE")


def run_caps(parsed: argparse.Namespace, flags: Sequence[str]) -> int:
    """Print thresholds and what they touch, write them if asked, and return the exit code 0."""
    from personaspace.analysis.caps.thresholds import capping_config, compute_caps
    from personaspace.caps_output import NOT_HARMLESS, print_experiments, print_layers
    from personaspace.store.exchange.export import refuse_bad_place
    from personaspace.store.space import open_space

    if flags:
        raise InputError(f"caps: unknown argument {flags[0]}. See `personaspace caps --help`.")
    output: Path | None = parsed.output
    if output is not None:
        if output.suffix not in ENDINGS:
            raise InputError(f"caps --output: {output} is no kind that is known; end its name in .pt or .json.")
        refuse_bad_place(output)
    folder = run_of(parsed.target)
    depth = require_manifest(folder).layout.layers
    space = open_space(folder)
    ranges = _ranges(parsed, depth, [int(layer) for layer in space["layer"].values])
    caps = compute_caps(folder, over=parsed.over, percentiles=parsed.percentiles, ranges=ranges)
    counts = ", ".join(
        f"{count:,} of {group}"
        for group, count in zip(caps["group"].values, caps["group_count"].values.tolist(), strict=True)
    )
    print(f"{folder.url}: {depth} layers; rollouts: {counts}; percentiles over {caps.attrs['over_count']:,} of them")
    print_layers(caps, ranges, every=parsed.all)
    print_experiments(caps, ranges)
    print(f"*: touches {NOT_HARMLESS:.0%} of default's own rollouts or more: the Assistant itself is changed.")
    print("Shares are of responses, by their means. A cap acts on each token: where few responses are touched, more")
    print("tokens are, since tokens spread wider than means.")
    if output is None:
        print("--output FILE.pt or FILE.json writes them, an experiment for each row of the second table.")
    else:
        _write(output, capping_config(space, caps), overwrite=parsed.overwrite)
        print(f"{output}: written, {caps.sizes['range'] * caps.sizes['percentile']} experiments")
    return 0


def _ranges(parsed: argparse.Namespace, depth: int, layers: Sequence[int]) -> list[range]:
    """The ranges asked for; else those that are suggested, as far as the fit has their layers."""
    asked = [parse_range(text) for text in parsed.layers]
    check_ranges(asked, layers)
    fitted = set(layers)
    offered = [] if asked else suggested_ranges(depth)
    swept = sweep_ranges(depth) if parsed.sweep else ()
    ranges = list(dict.fromkeys([*asked, *(chosen for chosen in (*offered, *swept) if fitted.issuperset(chosen))]))
    if not ranges:
        raise InputError(
            "caps: the fit has none of the suggested ranges "
            f"({', '.join(map(written, offered))} of {depth} layers) whole; name some with --layers."
        )
    return ranges


def _write(file: Path, config: "CappingConfig", *, overwrite: bool) -> None:
    if file.suffix == ".json":
        from personaspace.store.formats.capping_json import write_capping_json

        write_capping_json(file, config, overwrite=overwrite)
    else:
        from personaspace.store.formats.torch_files import write_capping

        write_capping(file, config, overwrite=overwrite)
