"""What a run has to do, before anything is resolved: rollouts, tokens, windows, values and objects. Pure functions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from personaspace.extract.config import Attention, ExtractConfig, GenerateConfig
from personaspace.extract.packing import chooses_packed, windows
from personaspace.extract.personas import PersonaPlan
from personaspace.extract.reductions import plan_arrays
from personaspace.extract.shape import ModelShape
from personaspace.store.config import StoreConfig
from personaspace.store.layout import Layout, choose_layer_group, choose_unit_rows
from personaspace.store.schema import COORDINATES, SPAN_COORDINATES, span_parts

MEDIAN_RESPONSE = 400
"""Tokens of a chat model's answer to an open question, if it may end it: the median. An assumption, like the next."""
RESPONSE_SPREAD = 1.0
"""Standard deviation of the logarithm of such lengths."""
PLAYED_TURN = 50
"""Tokens of a user's turn in a conversation, where a model plays the user: an assumption."""
TEMPLATE_TOKENS = 15
"""Tokens that a chat template adds to a prompt of two messages: a typical value."""
CHARACTERS_PER_TOKEN = 4.9
"""Of prompts and answers in English, measured on the 84 reference rollouts of SmolLM2 (4.86 and 5.1)."""
PADDING = {"padded": 0.03, "packed": 0.0}
"""Share of a micro-batch's tokens that are padding (docs/architecture.md: 1% to 4% in windows of 2,000 rollouts)."""
BYTES_PER_VALUE = {"lossless": 3.72, "16": 2.89, "12": 2.48, "10": 2.24}
"""Of a stored activation by `store.precision`, measured: docs/benchmarks.md."""
PART_BYTES = 16_800
"""Of a unit's Parquet part of rollouts, whatever it holds; like the next, measured on the 84 reference rollouts."""
BYTES_PER_TOKEN = 2.44
"""Of such a part, for each token: ids and text, compressed."""
SMALL_BYTES = 700
"""Of a commit record or a unit of one coordinate: a typical value."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """A run's work, counted."""

    roles: int
    """Personas, `default` among them."""
    layout: Layout
    """Of the store that the run will have."""
    run_layers: int
    """Layers that are run: up to the last one that is stored."""
    stored_values: int
    """Activations in the store."""
    shards: int
    """Objects that hold them."""
    objects: int
    """All objects of the run: shards, rollouts, coordinates, and their records; without metadata, fit and report."""
    sites: int
    """Places in each block that are read."""
    segments: int
    """Sums taken of each rollout, at each site and layer."""
    windows: int
    """Groups of units that are committed together."""
    window_rows: int
    """Rollouts in a full window."""
    batches: int
    """Groups of rollouts decoded together on the cluster; a group of conversations counts once for each turn."""
    batch_rows: int
    """Rollouts in a full one."""
    prompt_tokens: float
    """Mean tokens of a prompt."""
    response_tokens: float
    """Mean tokens of a response."""
    max_new_tokens: int
    """Longest response; 0 where responses are imported."""
    micro_batch_tokens: int
    """Tokens of a micro-batch, padding included."""
    padding: float
    """Share of them that is padding."""
    store_bytes: int
    """Estimated bytes of the run's folder."""

    @property
    def rollouts(self) -> int:
        return self.layout.rows

    @property
    def rollout_tokens(self) -> float:
        """Mean tokens of a rollout."""
        return self.prompt_tokens + self.response_tokens

    @property
    def tokens(self) -> float:
        """Of all rollouts."""
        return self.rollouts * self.rollout_tokens

    @property
    def longest(self) -> int:
        """Tokens of a long rollout."""
        return math.ceil(self.prompt_tokens * 1.5 + (self.max_new_tokens or self.response_tokens * 3))

    @property
    def window_batches(self) -> float:
        """Micro-batches of a full window."""
        ran = self.window_rows * self.rollout_tokens / (1 - self.padding)
        return max(1.0, ran / self.micro_batch_tokens)


def count_work(
    plan: PersonaPlan,
    shape: ModelShape,
    generate: GenerateConfig,
    extract: ExtractConfig,
    store: StoreConfig,
    attention: Attention,
    *,
    prompt_tokens: float | None = None,
    response_tokens: float | None = None,
) -> Workload:
    """Count what a run of ``plan`` does. Means of prompts and responses, in tokens, are estimated where not given."""
    rows = plan.rows_per_role()
    layout = Layout(
        segments=(len(plan.rows),),
        layers=shape.layers,
        hidden=shape.hidden,
        unit_rows=store.unit_rows or choose_unit_rows(rows),
        layer_group=min(shape.layers, store.layer_group or choose_layer_group(shape.layers)),
    )
    arrays = plan_arrays(extract.sites, extract.reductions, extract.layers)
    parts = len(span_parts(arrays))
    groups = list(arrays[0].wanted_groups(layout))
    layers = sum(len(layout.group_layers(group)) for group in groups)
    places = sum(parts if spec.spans else 1 for spec in arrays)
    shards = layout.units * len(groups) * len(arrays)
    # Of each unit: rollouts and coordinates, each with a record; and a record for each shard.
    others = layout.units * (2 + len(COORDINATES) + 1 + (len(SPAN_COORDINATES) + 1 if parts else 0)) + shards
    values = layout.rows * layers * shape.hidden * places
    window = windows(range(layout.units), layout.unit_rows, extract.window_rows)
    batch = windows(range(layout.units), layout.unit_rows, generate.batch_rows)
    imported = generate.responses is not None
    response = response_tokens
    if response is None:
        response = _imported_tokens(plan) if imported else expected_response(generate.max_new_tokens)
    prompt = _prompt_tokens(plan, response) if prompt_tokens is None else prompt_tokens
    # A conversation is decoded turn by turn. Each turn is counted at the length of the last: rather too much.
    turns = sum(row.turns if row.script else 1 for row in plan.rows) / len(plan.rows)
    text_bytes = layout.rows * (prompt + response) * BYTES_PER_TOKEN + layout.units * PART_BYTES
    return Workload(
        roles=len(plan.roles),
        layout=layout,
        run_layers=layout.group_layers(max(groups)).stop,
        stored_values=values,
        shards=shards,
        objects=shards + others,
        sites=len(extract.sites),
        segments=places // len(extract.sites),
        windows=len(window),
        window_rows=min(layout.rows, len(window[0]) * layout.unit_rows),
        # Of a server nobody knows how fast it is.
        batches=0 if imported or generate.engine == "openai" else math.ceil(len(batch) * turns),
        batch_rows=min(layout.rows, len(batch[0]) * layout.unit_rows),
        prompt_tokens=prompt,
        response_tokens=response,
        max_new_tokens=0 if imported else generate.max_new_tokens,
        micro_batch_tokens=extract.micro_batch_tokens,
        padding=PADDING["packed" if chooses_packed(extract.packing, attention) else "padded"],
        store_bytes=round(values * BYTES_PER_VALUE[store.precision] + text_bytes + SMALL_BYTES * others),
    )


def expected_response(longest: int) -> float:
    """Mean tokens of a sampled response that is cut at ``longest``: of lognormal lengths, the mean of the smaller."""
    mean = math.log(MEDIAN_RESPONSE)
    cut = (math.log(longest) - mean) / RESPONSE_SPREAD
    ended = math.exp(mean + RESPONSE_SPREAD**2 / 2) * _normal(cut - RESPONSE_SPREAD)
    return ended + longest * (1 - _normal(cut))


def _normal(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def _prompt_tokens(plan: PersonaPlan, response: float) -> float:
    """Mean tokens before the last response; in a conversation, with ``response`` tokens in each earlier turn."""
    mean = _mean([sum(len(message["content"]) for message in row.messages) for row in plan.rows]) + TEMPLATE_TOKENS
    scripts = [row.script for row in plan.rows if row.script is not None]
    if scripts:
        said = sum(len(text) for script in scripts for text in script.said[1:]) / CHARACTERS_PER_TOKEN
        played = sum(PLAYED_TURN * (script.turns - len(script.said)) for script in scripts)
        answered = sum((script.turns - 1) * (response + TEMPLATE_TOKENS) for script in scripts)
        mean += (said + played + answered) / len(plan.rows)
    return mean


def _imported_tokens(plan: PersonaPlan) -> float:
    return _mean([len(row.response or "") for row in plan.rows])


def _mean(characters: Sequence[int]) -> float:
    return sum(characters) / len(characters) / CHARACTERS_PER_TOKEN
