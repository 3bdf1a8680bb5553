"""The part of the config that says who judges the rollouts, and within which limits."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

TokenLimit = Literal["max_tokens", "max_completion_tokens"]
JudgeEngine = Literal["endpoint", "local"]


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgeConfig:
    """Which model judges, how it is asked, and what it may cost. All of it is execution; a judge with another model,
    other instructions or other sampling gets another name, and its scores lie beside those of others."""

    model: str | None = None
    """Name of the judge's model, as the endpoint knows it. Default: the run is not judged."""
    engine: JudgeEngine = "endpoint"
    """`endpoint`: an OpenAI-compatible server. `local`: `model` is a Hugging Face id or a folder, and actors on the
    run's own cluster answer."""
    base_url: str | None = None
    """Of the endpoint, such as http://localhost:8000/v1. Default: the OPENAI_BASE_URL variable, else OpenAI."""
    api_key_env: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the key. The key itself is written nowhere."""
    name: str | None = None
    """Name of this judge's scores. Default: the model and eight digits of a hash over all that decides its scores."""
    instructions: str = "builtin"
    """`builtin` (how far a role is played), `speaker` (who is speaking), `harm` (what became of a request), or a YAML
    file like configs/personas/judge.yaml."""
    roles: tuple[str, ...] = ()
    """Ids of the roles to judge; empty: all of them. `default` and conversations are judged by categories only
    (`speaker`, `harm`)."""
    sample: Annotated[int, Ge(1)] | None = None
    """Judge only so many rollouts, spread evenly over the roles. Default: all."""
    temperature: Annotated[float, Ge(0), Le(2)] | None = 0.0
    """Softmax temperature of the judge. None (`null`): not sent, for models that refuse it."""
    max_tokens: Annotated[int, Ge(1)] = 200
    """Longest answer of the judge, in tokens. A model that thinks before it answers needs more."""
    token_limit: TokenLimit = "max_tokens"
    """Name under which that limit is sent; OpenAI's newer models want `max_completion_tokens`."""
    extra_body: str = "{}"
    """JSON object with further fields of the request, such as {"reasoning_effort": "low"}."""
    answers_as: str | None = None
    """Name under which the endpoint answers, where that is not `model`. Dated versions of `model` are taken anyway."""
    concurrency: Annotated[int, Ge(1)] = 16
    """Requests under way at once."""
    requests_per_minute: Annotated[float, Gt(0)] | None = None
    """Requests begun in a minute, at most. Default: no limit but the endpoint's own."""
    timeout: Annotated[float, Gt(0)] = 60.0
    """Seconds that one request may take."""
    attempts: Annotated[int, Ge(1)] = 10
    """Times that a request is sent while the endpoint fails (429, 5xx, time-outs, lost connections)."""
    first_pause: Annotated[float, Gt(0)] = 0.5
    """Seconds before the second attempt, on average; doubled from one to the next, up to a minute."""
    asks: Annotated[int, Ge(1)] = 3
    """Times that a rollout is asked about before an answer that can't be read is recorded as none."""
    stop_after: Annotated[int, Ge(1)] = 50
    """Rollouts in a row without a score after which judging stops: the endpoint or the model is no good."""
    budget: Annotated[float, Gt(0)] | None = None
    """USD that this judge may cost on this run, all sessions together. Needs both prices."""
    price_in: Annotated[float, Ge(0)] | None = None
    """USD per million tokens of the prompt."""
    price_out: Annotated[float, Ge(0)] | None = None
    """USD per million tokens of the answer."""
