"""What can be wrong with a response: names that report, command line and `analysis.leave_out` share."""

from dataclasses import dataclass
from typing import Literal

FlawName = Literal[
    "empty", "truncated", "only_thought", "looping", "refused", "broke_role", "duplicate", "other_script"
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Flaw:
    """One thing that can be wrong with a response."""

    name: FlawName
    """Short name."""
    heading: str
    """Of its column in a table."""
    told: str
    """What happened, to be put behind "12% of the responses"."""
    advice: str
    """What to change, and what it does to the averages."""
    warn: float
    """Share of a run's responses from which on `generate` warns."""


FLAWS: tuple[Flaw, ...] = (
    Flaw(
        name="empty",
        heading="empty",
        told="are empty or only white space",
        advice="they are dropped; see whether the model ends its turn at once (chat template, base model?)",
        warn=0.02,
    ),
    Flaw(
        name="truncated",
        heading="cut off",
        told="were cut off at {max_new_tokens} tokens",
        advice="only beginnings are averaged; raise generate.max_new_tokens if whole answers matter",
        warn=0.2,
    ),
    Flaw(
        name="only_thought",
        heading="no answer",
        told="hold reasoning and no answer",
        advice="raise generate.max_new_tokens, or set model.thinking to false",
        warn=0.02,
    ),
    Flaw(
        name="looping",
        heading="looping",
        told="repeat themselves in a loop",
        advice="the loop weighs on the average; raise generate.temperature, shorten generate.max_new_tokens, or leave "
        "them out: analysis.leave_out",
        warn=0.05,
    ),
    Flaw(
        name="refused",
        heading="refused",
        told="begin with a refusal",
        advice="look at prompts and questions (`personaspace quality RUN --by question`), or leave them out: "
        "analysis.leave_out",
        warn=0.05,
    ),
    Flaw(
        name="broke_role",
        heading="out of role",
        told="say that they are an AI, in a role that is none",
        advice="judge the rollouts, use a larger model, or leave them out: analysis.leave_out",
        warn=0.05,
    ),
    Flaw(
        name="duplicate",
        heading="duplicate",
        told="are word for word those of an earlier rollout",
        advice="they count twice; raise generate.temperature",
        warn=0.02,
    ),
    Flaw(
        name="other_script",
        heading="other script",
        told="are mostly in a script that their conversation does not use",
        advice="ask for the language in the prompts, or leave them out: analysis.leave_out",
        warn=0.02,
    ),
)
NAMES: tuple[FlawName, ...] = tuple(flaw.name for flaw in FLAWS)
MILD: tuple[FlawName, ...] = ("truncated",)
"""Flaws that leave a sound beginning: they don't make a role bad, and are counted apart."""
