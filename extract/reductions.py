"""How a rollout's states are averaged over tokens: which tokens go into which array.

Pure functions of a rollout's spans. Every average is kept as (sum, count) until it is stored.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from personaspace.extract.config import Site
from personaspace.extract.packing import Segment
from personaspace.store.errors import InputError
from personaspace.store.rollouts import Span
from personaspace.store.schema import ArraySpec, span_parts

ALLOWED = "`mean`, `last_prompt`, `first_K` (such as `first_8`), `turns` and `parts`"
RAGGED: Mapping[str, tuple[str, ...]] = {"turns": ("whole",), "parts": ("think", "answer")}
"""Reductions with a row for each span in place of each rollout -> the parts of turns that are their spans."""
SITES: Mapping[Site, str] = {
    "resid_post": "the residual stream after each block",
    "resid_pre": "the residual stream before each block",
    "attn_out": "what each block's attention adds to the residual stream",
    "mlp_out": "what each block's MLP adds to the residual stream",
}
_FIRST = re.compile(r"first_([1-9][0-9]*)")


@dataclass(frozen=True, kw_only=True, slots=True)
class ArrayPlace:
    """Where an array's values lie among all that is summed."""

    spec: ArraySpec
    site: int
    segments: slice


@dataclass(frozen=True, kw_only=True, slots=True)
class Readout:
    """Everything that is read from a model in one pass: at each site, each reduction."""

    sites: tuple[Site, ...]
    reductions: tuple[str, ...]
    """Those with a row for each rollout: `mean`, `last_prompt`, `first_K`."""
    parts: tuple[str, ...]
    """Parts of assistant turns that get a row each: `whole`, `think`, `answer`."""

    @classmethod
    def of_arrays(cls, specs: Sequence[ArraySpec]) -> "Readout":
        """What is needed for these arrays of a run."""
        return cls(
            sites=tuple(dict.fromkeys(_parse(spec)[0] for spec in specs)),
            reductions=tuple(dict.fromkeys(_parse(spec)[1] for spec in specs if not spec.spans)),
            parts=span_parts(specs),
        )

    def places(self, specs: Sequence[ArraySpec]) -> list[ArrayPlace]:
        """Where each array is found in a rollout's sums ``(sites, layers, segments, hidden)``."""
        places = []
        for spec in specs:
            site, name = _parse(spec)
            first = len(self.reductions) if spec.spans else self.reductions.index(name)
            segments = slice(first, None if spec.spans else first + 1)
            places.append(ArrayPlace(spec=spec, site=self.sites.index(site), segments=segments))
        return places

    def spans(self, spans: Sequence[Span]) -> tuple[Span, ...]:
        """The spans of a rollout that get a row each, in order."""
        return tuple(span for span in spans if span.part in self.parts)

    def segments(self, spans: Sequence[Span]) -> tuple[Segment, ...]:
        """Tokens of a rollout that are summed: for each reduction, then for each span with a row of its own."""
        response = [span for span in spans if span.part == "whole"][-1]
        by_rollout = [_segment(name, response) for name in self.reductions]
        return (*by_rollout, *((span.start, span.stop) for span in self.spans(spans)))


def plan_arrays(
    sites: Sequence[Site], reductions: Sequence[str], layers: tuple[int, ...] | None
) -> tuple[ArraySpec, ...]:
    """The arrays that hold every reduction at every site. Raises InputError for an unknown or doubled name."""
    for name in reductions:
        if name not in ("mean", "last_prompt", *RAGGED) and not _FIRST.fullmatch(name):
            raise InputError(f"extract.reductions: {name!r}; allowed are {ALLOWED}.")
    for site in sites:
        if site not in SITES:
            raise InputError(f"extract.sites: {site!r}; allowed are {', '.join(SITES)}.")
    for key, names in (("sites", sites), ("reductions", reductions)):
        if not names or len(set(names)) < len(names):
            raise InputError(f"extract.{key}: {list(names)}; give at least one, and each once.")
    parts = tuple(part for name in RAGGED if name in reductions for part in RAGGED[name])
    by_rollout = [
        ArraySpec(name=f"{site}_{name}", description=f"{_describe(name)} of {SITES[site]}", layers=layers)
        for site in sites
        for name in reductions
        if name not in RAGGED
    ]
    by_span = [
        ArraySpec(
            name=f"{site}_mean",
            description=f"Mean over the tokens of each span of {SITES[site]}",
            layers=layers,
            spans=parts,
        )
        for site in sites
        if parts
    ]
    return (*by_rollout, *by_span)


def _parse(spec: ArraySpec) -> tuple[Site, str]:
    """Site and reduction in an array's name."""
    for site in get_args(Site):
        if spec.name.startswith(f"{site}_"):
            return site, spec.name.removeprefix(f"{site}_")
    raise InputError(f"array {spec.name}: no site of {', '.join(SITES)} in its name; it was not extracted here.")


def token_range(reduction: str) -> tuple[int, int | None]:
    """Tokens that `mean`, `last_prompt` or `first_K` sums, counted from the response's first: ``[first, stop)``.

    None: up to its last.
    """
    if reduction == "last_prompt":
        return -1, 0
    first = _FIRST.fullmatch(reduction)
    return 0, int(first[1]) if first else None


def _segment(name: str, response: Span) -> Segment:
    first, stop = token_range(name)
    return response.start + first, response.stop if stop is None else min(response.start + stop, response.stop)


def _describe(name: str) -> str:
    first = _FIRST.fullmatch(name)
    if first is not None:
        return f"Mean over the first {first[1]} response tokens (all, if there are fewer)"
    return {"mean": "Mean over the response tokens", "last_prompt": "Last token of the prompt"}[name]
