"""What caps are chosen by: percentiles, whose rollouts, and ranges of layers as people write them or for a sweep.

A range is a Python `range`: its stop is no part of it, as in the ids of the reference project (`layers_46:54-p0.25`
caps blocks 46 to 53). People write `46-53`. Paper: arXiv 2601.10387, section 5.
"""

import re
from collections.abc import Collection, Sequence
from typing import Literal

from personaspace.store.errors import InputError
from personaspace.store.layout import ranges as in_words

Over = Literal["all", "roles", "default"]
"""Whose rollouts the percentiles are of."""
PERCENTILES = (1.0, 25.0, 50.0, 75.0)
"""Those of the paper (section 5.1.1)."""
PAPER_RANGES = (("Qwen 3 32B", 64, range(46, 54)), ("Llama 3.3 70B", 80, range(56, 72)))
"""(model, its number of blocks, the range that the paper found best for it) (section 5.2)."""


def parse_range(text: str, where: str = "caps --layers") -> range:
    """The layers of `46-53` (both ends are in) or `46`. Raises InputError, naming ``where``, for anything else."""
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if found is None or int(found[2] or found[1]) < int(found[1]):
        raise InputError(f"{where}: {text!r}; give first and last layer, such as 46-53, or one layer.")
    return range(int(found[1]), int(found[2] or found[1]) + 1)


def check_ranges(asked: Sequence[range], layers: Collection[int]) -> None:
    """Raises InputError for a range with layers that are not among ``layers``, or that is given twice."""
    for number, chosen in enumerate(asked):
        absent = [layer for layer in chosen if layer not in layers]
        if absent or not chosen:
            raise InputError(
                f"caps --layers: {written(chosen)}; the fit has no layer {absent[0] if absent else chosen.start}, only "
                f"{in_words(sorted(layers))}."
            )
        if chosen in asked[:number]:
            raise InputError(f"caps --layers: {written(chosen)} is given twice; give each range once.")


def suggested_ranges(depth: int) -> tuple[range, ...]:
    """The paper's two ranges at the same relative depth and width of a model of ``depth`` blocks, at least one wide."""
    found = []
    for _, blocks, best in PAPER_RANGES:
        width = max(1, round(depth * len(best) / blocks))
        start = min(round(depth * best.start / blocks), depth - width)
        found.append(range(start, start + width))
    return tuple(dict.fromkeys(found))


def sweep_ranges(depth: int) -> tuple[range, ...]:
    """Windows of the second half of a model of ``depth`` blocks, narrow ones first.

    Those of the reference project's sweep over Qwen 3 32B (4, 8 and 16 of 64 blocks, every second one from 32 on, up
    to 60), at the same relative depths and widths.
    """
    step, first, end = max(1, round(depth / 32)), depth // 2, round(depth * 60 / 64)
    widths = dict.fromkeys(max(1, round(depth / parts)) for parts in (16, 8, 4))
    return tuple(
        range(start, start + width) for width in widths for start in range(first, end - width + 1, step) if width
    )


def range_id(layers: range) -> str:
    """`46:54`: how the ids of experiments write a range; the stop is no part of it."""
    return f"{layers.start}:{layers.stop}"


def written(layers: range) -> str:
    """`46-53`: how people write it."""
    return f"{layers.start}-{layers.stop - 1}" if len(layers) > 1 else f"{layers.start}"
