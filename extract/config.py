"""The parts of the config that say which model, which personas, how to generate and how to extract."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

Dtype = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which chat model, in which precision (all identity, except where the folder lies)."""

    id: str
    """Hugging Face id, or path of a local checkpoint folder (`~` allowed)."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face id; the resolved commit is what the run records."""
    dtype: Dtype = "bfloat16"
    """Precision of weights and hidden states. Pooling is float32 always."""
    chat_template: str = "builtin"
    """`builtin` (the tokenizer's own), `plain` (User:/Assistant: lines, for base models), or a Jinja file."""
    date_string: str = "26 Jul 2024"
    """Date for chat templates that print today's date, so that prompts don't change overnight."""
    trust_remote_code: bool = False
    """Run Python code that the checkpoint ships. Only for checkpoints you have read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PersonasConfig:
    """Which roles are asked which questions (identity)."""

    roles: str = "builtin"
    """`builtin`, a YAML file in the format of configs/personas/roles.yaml, or a folder of assistant-axis JSON files."""
    questions: str = "builtin"
    """`builtin`, a YAML file in the format of configs/personas/questions.yaml, or an assistant-axis JSONL file."""
    only: tuple[str, ...] = ()
    """Role ids to use; empty: all of them. `default` is always used."""
    prompts: Annotated[int, Ge(1)] = 5
    """System prompts (phrasings) used of each role."""
    max_questions: Annotated[int, Ge(1)] | None = None
    """Use the first N questions; default: all."""
    pairing: Literal["cross", "cycle"] = "cross"
    """`cross`: every prompt with every question. `cycle`: each question once, prompts taking turns."""
    samples: Annotated[int, Ge(1)] = 1
    """Rollouts per prompt and question."""
    default_samples: Annotated[int, Ge(1)] = 1
    """The same for `default`, whose mean carries the noise of the whole axis: give it more when roles are few."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateConfig:
    """How responses are sampled, or where finished ones come from (identity, unless noted)."""

    responses: str | None = None
    """Folder of assistant-axis response files (ROLE.jsonl) to import instead of generating."""
    max_new_tokens: Annotated[int, Ge(1)] = 512
    """Longest response in tokens."""
    temperature: Annotated[float, Gt(0)] = 0.7
    """Softmax temperature."""
    top_p: Annotated[float, Gt(0), Le(1)] = 0.9
    """Nucleus: the smallest set of tokens that holds this probability."""
    seed: int = 0
    """Seed of the run; each rollout derives its own from this and its id."""
    batch_rows: Annotated[int, Ge(1)] = 64
    """Rollouts decoded together, rounded to whole units."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractConfig:
    """What is read from the model, and how rollouts are packed for it (identity: packing moves bfloat16 results by
    up to 5e-3)."""

    layers: tuple[int, ...] | None = None
    """Layers to store, 0-based, with all others of their layer groups. Default: all. A run may grow by layers."""

    micro_batch_tokens: Annotated[int, Ge(16)] = 8192
    """Padded tokens per micro-batch. A longer rollout runs alone."""
    window_rows: Annotated[int, Ge(1)] = 2048
    """Rollouts that are sorted by length and committed together, rounded to whole units."""
