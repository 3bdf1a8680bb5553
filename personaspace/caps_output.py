"""What `personaspace caps` prints: thresholds of layers and of experiments, and what they touch."""

from collections.abc import Sequence

import numpy as np
import xarray as xr
from rich.console import Console
from rich.table import Table

from personaspace.analysis.caps.ranges import range_id, written

NOT_HARMLESS = 0.1
"""Share of default's own rollouts from which on a threshold is marked."""


def print_layers(caps: xr.Dataset, ranges: Sequence[range], *, every: bool) -> None:
    """Each layer's projections by group, and each percentile's threshold with what it touches."""
    groups = caps["group"].values.tolist()
    table = Table(box=None, pad_edge=False)
    table.add_column("layer", justify="right", no_wrap=True)
    for group in groups:
        table.add_column(f"{group}\nmedian (5-95%)", justify="right", no_wrap=True)
    table.add_column("mean\ndefault", justify="right", no_wrap=True)
    for percentile in caps["percentile"].values:
        table.add_column(f"p{percentile:g}\ntau", justify="right", no_wrap=True)
        table.add_column(f"\n{' / '.join(groups)}", justify="right", no_wrap=True)
    for layer in caps["layer"].values.tolist():
        if not every and not any(layer in chosen for chosen in ranges):
            continue
        here = caps.sel(layer=layer)
        cells = [str(layer)]
        for group in groups:
            low, middle, high = (_number(here["projection"].sel(group=group, quantile=q)) for q in (0.05, 0.5, 0.95))
            cells.append(f"{middle} ({low} to {high})")
        cells.append(f"p{float(here['default_percentile']):.0f}")
        for percentile in caps["percentile"].values:
            cells += [
                _number(here["threshold"].sel(percentile=percentile)),
                _touched(here["touched"].sel(percentile=percentile)),
            ]
        table.add_row(*cells)
    print(
        "projections on the axis (towards the Assistant is up), thresholds tau, and the share below tau of each group:"
    )
    _show(table)


def print_experiments(caps: xr.Dataset, ranges: Sequence[range]) -> None:
    """Each range with the share of rollouts that lies beyond the threshold in one of its layers or more."""
    table = Table(box=None, pad_edge=False)
    table.add_column("experiment", no_wrap=True)
    table.add_column("layers", justify="right", no_wrap=True)
    for percentile in caps["percentile"].values:
        table.add_column(f"-p{percentile / 100:g}", justify="right", no_wrap=True)
    for chosen in ranges:
        here = caps["touched_anywhere"].sel(range=range_id(chosen))
        cells = [_touched(here.sel(percentile=percentile)) for percentile in caps["percentile"].values]
        table.add_row(f"layers_{range_id(chosen)}", written(chosen), *cells)
    print(f"share of {' / '.join(caps['group'].values)} that is below tau in at least one layer of the range:")
    _show(table)


def _touched(share_G: xr.DataArray) -> str:
    shares = dict(zip(share_G["group"].values.tolist(), share_G.values.tolist(), strict=True))
    mark = "*" if shares.get("default", 0) >= NOT_HARMLESS else " "
    return " / ".join(f"{share:.0%}" for share in shares.values()) + mark


def _number(value: xr.DataArray) -> str:
    return np.format_float_positional(float(value), precision=4, fractional=False, unique=False, trim="-")


def _show(table: Table) -> None:
    console = Console()
    Console(width=None if console.is_terminal else 200).print(table)
