"""The vllm engine, in its own environment (`make test-vllm`): the model's distribution, our seeds, our endings."""

import gc
import importlib.util
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from personaspace.extract.chat import ChatFormat
from personaspace.extract.checkpoint import resolve
from personaspace.extract.config import GenerateConfig, ModelConfig, VllmConfig
from personaspace.extract.generate.engine import Response
from personaspace.extract.generate.noise import nucleus, rollout_seed
from personaspace.extract.generate.transformers_engine import TransformersEngine, load_causal_lm
from personaspace.extract.generate.vllm_engine import VllmEngine, check_vllm
from personaspace.store.errors import InputError
from tests.models import MAX_POSITIONS, reciting_checkpoint, tiny_checkpoint

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None and os.environ.get("PERSONASPACE_REQUIRE_VLLM") != "1",
    reason="vLLM has an environment of its own: make test-vllm",
)
CONFIG = GenerateConfig(engine="vllm", max_new_tokens=24)
SYSTEM = "You are a ghost who lingers in an old house, and you speak softly of the past. " * 3
QUESTIONS = ("Who are you?", "What should I do about a friend?", "Tell me of the sea, the night, the stars.", "Why?")
SEEDS = [rollout_seed(0, str(row)) for row in range(12)]
MANY = [[10 + (row * 31 + place * (7 + row)) % 200 for place in range(150)] for row in range(100)]
"""15,000 tokens that have no beginning in common."""
SMALL = VllmConfig(cache_gib=0.1)
HIDDEN = 128
"""vLLM's kernels for CPUs know no heads narrower than 32."""


class Tiny:
    """A checkpoint with its chat format and prompts."""

    def __init__(self, folder: Path, chat_template: str = "builtin", system: str = "") -> None:
        config = ModelConfig(id=str(folder), chat_template=chat_template, dtype="float32")
        self.checkpoint = resolve(config)
        self.chat = ChatFormat(self.checkpoint, config)
        opening = [{"role": "system", "content": system}] if system else []
        self.prompts = [
            self.chat.encode_prompt([*opening, {"role": "user", "content": f"{QUESTIONS[row % 4]} {row}"}])
            for row in range(len(SEEDS))
        ]
        self.shared = 0.0
        """Share of prompt tokens that vLLM did not have to read again."""

    @contextmanager
    def vllm(self, config: VllmConfig = SMALL, **options: Any) -> Iterator[VllmEngine]:
        """One at a time: vLLM has state of the process."""
        from vllm.distributed import cleanup_dist_env_and_memory

        engine = VllmEngine(self.checkpoint, self.chat, config, **{"dtype": "float32", "threads": 1, **options})
        try:
            yield engine
        finally:
            engine.close()
            del engine
            gc.collect()
            cleanup_dist_env_and_memory()

    def transformers(self) -> TransformersEngine:
        return TransformersEngine(load_causal_lm(self.checkpoint, dtype="float32"), self.chat)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tiny_checkpoint(tmp_path_factory.mktemp("tiny"), layers=2, hidden=HIDDEN), system=SYSTEM)


@pytest.fixture(scope="module")
def sampled(tiny: Tiny) -> dict[str, list[Response]]:
    """Responses to the same prompts and seeds, in several companies."""
    rows = range(len(SEEDS))

    def some(engine: VllmEngine, chosen: list[int], config: GenerateConfig = CONFIG) -> list[Response]:
        return engine.generate([tiny.prompts[row] for row in chosen], [SEEDS[row] for row in chosen], config)

    with tiny.vllm() as engine:
        found = {
            "together": some(engine, list(rows)),
            "again": some(engine, list(rows)),
            "backwards": some(engine, list(rows)[::-1])[::-1],
            "alone": [some(engine, [row])[0] for row in rows],
            "cold": some(engine, list(rows), GenerateConfig(max_new_tokens=12, temperature=0.01)),
            "too long": engine.generate([[1] * MAX_POSITIONS, tiny.prompts[0]], SEEDS[:2], CONFIG),
            "to the end": engine.generate([[1] * (MAX_POSITIONS - 4)], SEEDS[:1], CONFIG),
        }
        tiny.shared = engine.shared_tokens / engine.prompt_tokens
        short = GenerateConfig(max_new_tokens=2)
        found["many"] = engine.generate(MANY, range(len(MANY)), short)
        found["one by one"] = [engine.generate([MANY[row]], [row], short)[0] for row in (0, 99)]
    return found


@needs_vllm
def test_a_seed_gives_the_same_response_in_any_company(sampled: dict[str, list[Response]]) -> None:
    together = sampled["together"]
    assert len({response.text for response in together}) == len(SEEDS)
    for company in ("again", "backwards", "alone"):
        assert sampled[company] == together


@needs_vllm
def test_prompts_of_more_tokens_than_a_step_takes(sampled: dict[str, list[Response]]) -> None:
    """What is over waits; vLLM would read a part of a prompt, which its generators on CPUs can't bear."""
    assert [sampled["many"][row] for row in (0, 99)] == sampled["one by one"]


@needs_vllm
def test_the_most_probable_token_wins_when_it_is_cold(tiny: Tiny, sampled: dict[str, list[Response]]) -> None:
    """As in transformers: prompts, positions and the cache are what they should be."""
    cold = GenerateConfig(max_new_tokens=12, temperature=0.01)
    truth = tiny.transformers().generate(tiny.prompts, SEEDS, cold)
    # But for two that are about as probable.
    assert sum(a == b for a, b in zip(sampled["cold"], truth, strict=True)) >= len(SEEDS) - 2


@needs_vllm
def test_tokens_come_from_the_nucleus(tiny: Tiny, sampled: dict[str, list[Response]]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.checkpoint.source, dtype=torch.float32)
    outside = first = tokens = 0
    for prompt, response in zip(tiny.prompts, sampled["together"], strict=True):
        ids = torch.tensor([[*prompt, *response.token_ids]])
        with torch.inference_mode():
            logits = model(ids).logits[0, len(prompt) - 1 : -1] / CONFIG.temperature
        logit, token = nucleus(logits, CONFIG.top_p)
        for place, chosen in enumerate(response.token_ids):
            inside = token[place][logit[place] > -torch.inf].tolist()
            outside += chosen not in inside
            first += chosen == inside[0]
            tokens += 1
    # At the nucleus' edge roundings decide.
    assert outside <= 0.01 * tokens
    assert 0 < first < tokens


@needs_vllm
@pytest.mark.usefixtures("sampled")
def test_prompts_that_begin_alike_share_their_beginning(tiny: Tiny) -> None:
    assert tiny.shared > 0.3


@needs_vllm
def test_what_is_too_long_is_dropped_alone(tiny: Tiny, sampled: dict[str, list[Response]]) -> None:
    long, fitting = sampled["too long"]
    assert (
        long.unusable == f"the prompt's {MAX_POSITIONS} tokens leave no room in the model's context of {MAX_POSITIONS}"
    )
    assert fitting.unusable is None
    assert fitting.token_ids
    [last] = sampled["to the end"]
    assert (len(last.token_ids), last.finish_reason) == (4, "length")


@needs_vllm
def test_memory_that_is_too_small_is_told(tiny: Tiny) -> None:
    with tiny.vllm(VllmConfig(cache_gib=0.0002)) as engine:
        assert engine.longest < MAX_POSITIONS
        prompt = [1] * (engine.longest - 8)
        with pytest.raises(InputError) as error:
            engine.generate([prompt], [0], CONFIG)
        assert str(error.value) == (
            f"cluster.vllm: memory holds rollouts of {engine.longest} tokens, and {engine.longest + 16} may be needed. "
            "Raise cluster.vllm.cache_gib (or, on GPUs, .memory), or spread the model over more GPUs."
        )


@needs_vllm
def test_the_end_of_the_turn_is_cut(tmp_path: Path) -> None:
    """And defaults of the checkpoint do not slip in: with its repetition penalty the model could not recite."""
    folder = reciting_checkpoint(tmp_path / "model", "\n", "I see the old house.<|im_end|>")
    opinionated = Path(shutil.copytree(folder, tmp_path / "opinionated"))
    settings = json.loads((folder / "generation_config.json").read_text())
    settings |= {"repetition_penalty": 9.0, "top_k": 3, "temperature": 9.0, "max_new_tokens": 2}
    (opinionated / "generation_config.json").write_text(json.dumps(settings))
    tiny = Tiny(opinionated)
    said = "I see the old house."
    with tiny.vllm() as engine:
        responses = engine.generate(tiny.prompts, SEEDS, CONFIG)
        whole = Response(token_ids=tiny.chat.encode_text(said), text=said, finish_reason="stop")
        assert responses == [whole] * len(SEEDS)
        [short] = engine.generate(tiny.prompts[:1], SEEDS[:1], GenerateConfig(max_new_tokens=3))
        assert (short.token_ids, short.finish_reason) == (whole.token_ids[:3], "length")


@needs_vllm
def test_a_stop_string_is_cut(tmp_path: Path) -> None:
    tiny = Tiny(reciting_checkpoint(tmp_path, ":", " I see the old house.\nUser:", None), "plain")
    said = " I see the old house."
    with tiny.vllm() as engine:
        [response, *_] = engine.generate(tiny.prompts, SEEDS, CONFIG)
    assert response == Response(token_ids=tiny.chat.encode_text(said), text=said, finish_reason="stop")


@needs_vllm
def test_two_ranks_say_what_one_says(tiny: Tiny, sampled: dict[str, list[Response]]) -> None:
    with tiny.vllm(ranks=2) as engine:
        assert engine.generate(tiny.prompts, SEEDS, CONFIG) == sampled["together"]


def test_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else find(name))
    with pytest.raises(InputError, match=r"^generate\.engine: vllm, which is not installed for \S+\. Build its env"):
        check_vllm()
