"""The parts of the config that say which model, which personas, how to generate and how to extract."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le
from pydantic import BeforeValidator

Dtype = Literal["bfloat16", "float16", "float32"]
DtypeChoice = Literal["auto", "bfloat16", "float16", "float32"]
Attention = Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"]
Packing = Literal["auto", "padded", "packed"]
EngineName = Literal["transformers", "vllm", "openai"]
Site = Literal["resid_post", "resid_pre", "attn_out", "mlp_out"]
Positions = Literal["all", "response"]
"""Which tokens are changed where the residual stream is: all, or those of the response that is sampled or read."""


def _as_tuple(given: object) -> object:
    return (given,) if isinstance(given, str) else tuple(given) if isinstance(given, list) else given


Sources = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
"""One or several, each the name of a file or folder, or `builtin`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which chat model, in which precision (all identity, except where the folder lies)."""

    id: str
    """Hugging Face id, or path of a local checkpoint folder (`~` allowed)."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face id; the resolved commit is what the run records."""
    dtype: DtypeChoice = "auto"
    """Precision of weights and hidden states; pooling is float32 always. `auto`: bfloat16 on GPUs, and on CPUs that
    compute in it (AMX or AVX512-BF16), else float32; a run that exists keeps the precision that it was begun with."""
    chat_template: str = "builtin"
    """`builtin` (the tokenizer's own), `plain` (User:/Assistant: lines, for base models), or a Jinja file."""
    date_string: str = "26 Jul 2024"
    """Date for chat templates that print today's date, so that prompts don't change overnight."""
    thinking: bool | None = None
    """Ask for reasoning, or for none, where the chat template has a switch for it (`enable_thinking`, as Qwen 3 has).
    Default: the template's own."""
    attention: Attention = "auto"
    """Attention kernels of extraction, by transformers' names; `auto` is what transformers takes."""
    trust_remote_code: bool = False
    """Run Python code that the checkpoint ships. Only for checkpoints you have read."""

    @property
    def settled_dtype(self) -> Dtype:
        """`dtype`, once something has said what `auto` stands for. Raises ValueError before that."""
        if self.dtype == "auto":
            raise ValueError(
                "model.dtype: auto is not settled; use cluster.precision.settle_dtype, or give bfloat16 or float32."
            )
        return self.dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class EndpointConfig:
    """A server that speaks OpenAI's protocol (no identity, except the model)."""

    base_url: str | None = None
    """Its address with the version, such as http://HOST:8000/v1."""
    model: str | None = None
    """Name under which it serves the model. Default: the only model that it lists, or the one listed as `model.id`."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable with the key, on the nodes that ask. Servers of your own may need none."""
    concurrency: Annotated[int, Ge(1)] = 64
    """Requests on their way at once."""
    timeout: Annotated[float, Gt(0)] = 600.0
    """Seconds to wait for an answer."""
    retries: Annotated[int, Ge(0)] = 8
    """Times that a request is repeated after 408, 409, 429, 5xx, a timeout or a lost connection, with growing pauses
    (up to 8 s) or as long as the server says (up to 2 min)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditorConfig:
    """Who is the user in conversations of several turns (identity, unless noted)."""

    played_by: Literal["script", "model", "endpoint"] = "script"
    """`script`: the user says what the scenario has for each turn. `model`: the model of the run plays the user, too.
    `endpoint`: another model does, behind any OpenAI-compatible API."""
    temperature: Annotated[float, Gt(0)] = 0.7
    """Of a played user."""
    max_tokens: Annotated[int, Ge(1)] = 256
    """Longest turn of a played user, in tokens."""
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    """Who is asked. Of it only `model` is identity; it has to be named."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PersonasConfig:
    """Which roles are asked which questions, and which conversations are held (identity)."""

    roles: Sources = ("builtin",)
    """Any of `builtin`, YAML files as in configs/personas/roles, folders of them, and folders of assistant-axis JSON
    files. May be `[]` where there are scenarios."""
    questions: Sources = ("builtin",)
    """Any of `builtin`, YAML files in the format of configs/personas/questions.yaml, and assistant-axis JSONL files."""
    traits: Sources = ()
    """The same as for roles, in the format of configs/personas/traits.yaml. Default: no traits."""
    only: tuple[str, ...] = ()
    """Role ids to use; empty: all of them. `default` is always used."""
    only_traits: tuple[str, ...] = ()
    """Trait ids to use; empty: all of them."""
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
    scenarios: Sources = ()
    """Conversations of several turns: any of `builtin`, `adoption` (personas that the model is talked into), YAML files
    as in configs/personas/scenarios, folders of them, and JSONL files of prompts (docs/evaluation.md). Default: none.
    `samples` says how often each is held."""
    only_scenarios: tuple[str, ...] = ()
    """Ids of scenarios, or domains (coding, writing, therapy, philosophy); empty: all."""
    turns: Annotated[int, Ge(1)] = 6
    """Turns of the assistant in each conversation."""
    auditor: AuditorConfig = AuditorConfig()
    """The user in these conversations."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VllmConfig:
    """How vLLM runs (execution: it doesn't decide what is sampled)."""

    python: str | None = None
    """Python of the environment that has vLLM, the same path on every node. Default: the environment of the command."""
    memory: Annotated[float, Gt(0), Le(1)] = 0.9
    """Share of each GPU's memory for weights, cache and everything else of vLLM's."""
    cache_gib: Annotated[float, Gt(0)] | None = None
    """Memory in GiB for keys and values, per rank. Default: what `memory` leaves on a GPU; 2 on CPUs."""
    max_sequences: Annotated[int, Ge(1)] = 256
    """Rollouts decoded at once; `generate.batch_rows` should be a few times that."""
    eager: bool | None = None
    """Run without CUDA graphs and compiled kernels. Default: on CPUs only, where compiling needs a C++ compiler."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateConfig:
    """How responses are sampled, or where finished ones come from (identity, unless noted)."""

    engine: EngineName = "transformers"
    """What samples: `transformers`; `vllm`, for speed (an environment of its own, see docs/generation.md); `openai`, a
    server with a /completions endpoint."""
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    """The server of `engine: openai`."""

    responses: str | None = None
    """What to import instead of generating: a folder of assistant-axis response files (ROLE.jsonl), or transcripts of
    several turns (a JSON file, or a folder of them)."""
    first_turns: Annotated[int, Ge(1)] | None = None
    """Of each imported transcript, use only the first turns of the assistant, so many. Default: all."""
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
    batching: Literal["static", "continuous"] = "static"
    """`static`: a batch is decoded until its last response is finished. `continuous`: a response that is finished makes
    room for the next at once; for GPUs and large batches."""
    capture: bool = False
    """Read the activations while generating, in place of a second pass: `mean`, `last_prompt` and `first_K` only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractConfig:
    """What is read from the model, and how rollouts are packed for it (packing is identity: it moves bfloat16 results
    by up to 5e-3)."""

    sites: tuple[Site, ...] = ("resid_post",)
    """Where the model is read: `resid_post` and `resid_pre` (residual stream after and before each block), `attn_out`
    and `mlp_out` (what a block's attention and MLP add to it). A run may grow by sites."""
    reductions: tuple[str, ...] = ("mean",)
    """How states are averaged over tokens: `mean` (response), `last_prompt` (last token before it), `first_K` (first K
    response tokens, such as first_8), `turns` (each assistant turn), `parts` (what was thought, what was answered). A
    run may grow by reductions."""
    layers: tuple[int, ...] | None = None
    """Layers to store, 0-based, with all others of their layer groups. Default: all. A run may grow by layers."""

    packing: Packing = "auto"
    """`padded`: rollouts of like length side by side. `packed`: one after another without padding, each seeing only
    itself; refused where the model doesn't keep them apart. `auto`: packed with flash attention, else padded."""
    micro_batch_tokens: Annotated[int, Ge(16)] = 8192
    """Tokens per micro-batch, padding included. A longer rollout runs alone."""
    window_rows: Annotated[int, Ge(1)] = 2048
    """Rollouts that are sorted by length and committed together, rounded to whole units."""
    compile: bool = False
    """Compile the blocks with torch.compile: 15% less time on CPUs, after some 20 s per stage at the start. Needs a C++
    compiler (on GPUs Triton), and reads only the sites `resid_post` and `resid_pre`."""
    max_dropped: Annotated[float, Ge(0), Le(1)] = 0.25
    """Largest share of the planned rollouts that may be dropped before the run stops (no identity)."""
