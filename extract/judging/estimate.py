"""What judging would take, before anything is asked."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from personaspace.extract.judging.config import JudgeConfig
from personaspace.extract.judging.cost import BYTES_PER_TOKEN, MESSAGE_TOKENS, Prices, text_bytes
from personaspace.extract.judging.work import Task

UNITS_READ = 64
"""Units whose prompts are measured; the others count as like them."""
ANSWER_TOKENS = 40
"""Of an answer in the form that the built-in instructions ask for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What judging some rollouts would take."""

    rows: int
    """Rollouts to judge."""
    prompt_tokens: float
    """Of all of them."""
    completion_tokens: float
    """Of all of them, if answers are as long as the built-in instructions ask for."""
    most_completion_tokens: int
    """Of all of them, if every answer is as long as it may be."""
    bytes_per_token: float
    was_counted: bool
    """The bytes per token are those of the run's own responses, under its own tokenizer."""
    usd: float | None
    """None where no prices were given."""
    most_usd: float | None
    example: Task | None
    """The first rollout that would be asked about."""


def estimate(
    missing: Mapping[int, Sequence[int]],
    load: Callable[[int, Sequence[int]], Iterable[Task]],
    config: JudgeConfig,
    prices: Prices | None,
) -> Estimate:
    """What judging ``missing`` (unit -> rows) would take, by the prompts of up to ``UNITS_READ`` units."""
    units = [unit for unit, rows in missing.items() if rows]
    step = max(1, -(-len(units) // UNITS_READ))
    read = prompt_bytes = messages = response_bytes = response_tokens = 0
    example: Task | None = None
    for unit in units[::step]:
        for task in load(unit, missing[unit]):
            example = example or task
            read += 1
            prompt_bytes += text_bytes(task.prompt.messages)
            messages += len(task.prompt.messages)
            if task.response_tokens:
                response_bytes += task.response_bytes
                response_tokens += task.response_tokens
    rows = sum(map(len, missing.values()))
    ratio = response_bytes / response_tokens if response_tokens else BYTES_PER_TOKEN
    share = rows / read if read else 0.0
    prompt_tokens = share * (prompt_bytes / ratio + MESSAGE_TOKENS * messages)
    answer = min(ANSWER_TOKENS, config.max_tokens)
    return Estimate(
        rows=rows,
        prompt_tokens=prompt_tokens,
        completion_tokens=rows * answer,
        most_completion_tokens=rows * config.max_tokens,
        bytes_per_token=ratio,
        was_counted=response_tokens > 0,
        usd=prices.usd(prompt_tokens, rows * answer) if prices else None,
        most_usd=prices.usd(prompt_tokens, rows * config.max_tokens) if prices else None,
        example=example,
    )


def describe_estimate(found: Estimate, config: JudgeConfig) -> str:
    """The estimate for people."""
    counted = "as in the run's own responses under its tokenizer" if found.was_counted else "assumed: none were counted"
    lines = [
        f"to judge: {found.rows:,} rollouts with {config.model}",
        f"prompts: about {found.prompt_tokens:,.0f} tokens ({found.bytes_per_token:.1f} bytes a token, {counted})",
        f"answers: about {found.completion_tokens:,.0f} tokens, at most {found.most_completion_tokens:,}",
    ]
    if found.usd is None:
        lines.append("cost: unknown; judge.price_in and judge.price_out (USD per million tokens) would tell it")
    else:
        lines.append(f"cost: about {found.usd:,.4g} USD, at most about {found.most_usd:,.4g} USD, without retries")
    if config.requests_per_minute is not None:
        lines.append(f"time: at least {found.rows / config.requests_per_minute:,.1f} min at the rate limit")
    return "\n".join(lines)
