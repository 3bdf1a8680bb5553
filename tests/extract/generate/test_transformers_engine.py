"""Generation: the same text whatever the batch, cut where the turn ends, with the config's settings and no others."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from personaspace.extract.chat import ChatFormat
from personaspace.extract.checkpoint import resolve
from personaspace.extract.config import GenerateConfig, ModelConfig
from personaspace.extract.generate.engine import Response
from personaspace.extract.generate.noise import rollout_seed
from personaspace.extract.generate.transformers_engine import TransformersEngine, load_causal_lm
from tests.models import reciting_checkpoint, tiny_checkpoint

CONFIG = GenerateConfig(max_new_tokens=24)
QUESTIONS = (
    "Who are you?",
    "What should I do about a friend?",
    "Tell me of the sea, the night, the stars.",
    "Why?",
)
PROMPTS = [[{"role": "user", "content": QUESTIONS[i % 4]}] for i in range(12)]
SEEDS = [rollout_seed(0, str(row)) for row in range(len(PROMPTS))]


def load(folder: Path, chat_template: str = "builtin") -> tuple[TransformersEngine, ChatFormat]:
    config = ModelConfig(id=str(folder), chat_template=chat_template)
    checkpoint = resolve(config)
    chat = ChatFormat(checkpoint, config)
    return TransformersEngine(load_causal_lm(checkpoint, dtype="float32"), chat), chat


def generate(
    engine: TransformersEngine, chat: ChatFormat, rows: list[int], config: GenerateConfig = CONFIG
) -> list[Response]:
    return engine.generate([chat.encode_prompt(PROMPTS[row]) for row in rows], [SEEDS[row] for row in rows], config)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_text_does_not_depend_on_the_batch(tmp_path: Path, family: str) -> None:
    engine, chat = load(tiny_checkpoint(tmp_path, family, layers=2))
    rows = list(range(len(PROMPTS)))
    together = generate(engine, chat, rows)
    assert len({response.text for response in together}) == len(rows)
    assert [generate(engine, chat, [row])[0] for row in rows] == together
    for batch in ([11, 4, 7], rows[::-1], rows[3:10]):
        assert generate(engine, chat, batch) == [together[row] for row in batch]


def test_sampling_follows_the_models_distribution(tmp_path: Path) -> None:
    """Left padding and the cache must not disturb the logits: the most probable token wins at a low temperature."""
    engine, chat = load(tiny_checkpoint(tmp_path, layers=2))
    cold = generate(engine, chat, [0, 1, 2], GenerateConfig(max_new_tokens=6, temperature=1e-4))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for row, response in enumerate(cold):
        ids = chat.encode_prompt(PROMPTS[row])
        for token in response.token_ids:
            with torch.inference_mode():
                assert int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(token)


def test_seeds_and_settings_matter(tmp_path: Path) -> None:
    engine, chat = load(tiny_checkpoint(tmp_path, layers=1))
    prompt = chat.encode_prompt(PROMPTS[0])
    first, second, again = engine.generate([prompt] * 3, [1, 2, 1], CONFIG)
    assert first == again != second


def test_end_of_turn_is_cut_off(tmp_path: Path) -> None:
    engine, chat = load(reciting_checkpoint(tmp_path, "\n", "I see the old house.<|im_end|>"))
    for response in generate(engine, chat, [0, 1]):
        assert response == Response(
            token_ids=chat.encode_text("I see the old house."), text="I see the old house.", finish_reason="stop"
        )


def test_rows_that_end_early_leave_the_others_alone(tmp_path: Path) -> None:
    """A random model ends its turn here and there; whatever comes after the end is not part of the response."""
    engine, chat = load(tiny_checkpoint(tmp_path, layers=1))
    responses = generate(engine, chat, list(range(12)), GenerateConfig(max_new_tokens=160, temperature=3.0, top_p=1.0))
    assert {response.finish_reason for response in responses} == {"stop", "length"}
    for response in responses:
        assert chat.tokenizer.eos_token_id not in response.token_ids
        assert (len(response.token_ids) == 160) == (response.finish_reason == "length")
        assert response.text == chat.decode(response.token_ids)


def test_max_new_tokens(tmp_path: Path) -> None:
    engine, chat = load(reciting_checkpoint(tmp_path, "\n", "I see the old house.<|im_end|>"))
    [response] = generate(engine, chat, [0], GenerateConfig(max_new_tokens=3))
    assert response.token_ids == chat.encode_text("I see the old house.")[:3]
    assert response.finish_reason == "length"


def test_plain_stop_string_is_cut(tmp_path: Path) -> None:
    engine, chat = load(reciting_checkpoint(tmp_path, ":", " I see the old house.\nUser:", None), "plain")
    [response] = generate(engine, chat, [0])
    assert response == Response(
        token_ids=chat.encode_text(" I see the old house."), text=" I see the old house.", finish_reason="stop"
    )


def test_token_that_holds_a_part_of_the_stop_string_goes_too(tmp_path: Path) -> None:
    engine, chat = load(reciting_checkpoint(tmp_path, ":", " I see the old house.\nUser:", None), "plain")
    chat.stop_strings = ["ouse."]
    [response] = generate(engine, chat, [0])
    whole = chat.encode_text(" I see the old house.")
    assert " I see the old house.".startswith(response.text + " h")
    assert response.token_ids == whole[: len(response.token_ids)]
    assert response.finish_reason == "stop"


def test_sampling_defaults_of_the_checkpoint_do_not_slip_in(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", layers=1)
    opinionated = tmp_path / "opinionated"
    shutil.copytree(folder, opinionated)
    defaults = {"do_sample": True, "top_k": 1, "temperature": 0.1, "repetition_penalty": 3.0, "min_new_tokens": 20}
    (opinionated / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, **defaults}))
    rows = list(range(6))
    assert generate(*load(opinionated), rows) == generate(*load(folder), rows)


def test_every_end_of_turn_token_of_the_generation_config_counts(tmp_path: Path) -> None:
    folder = reciting_checkpoint(tmp_path, "\n", "I see the old house.<|im_end|>")
    _, chat = load(folder)
    ids = chat.encode_text("I see the old house.")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, ids[3]]}))
    [response] = generate(*load(folder), [0])
    assert (response.token_ids, response.finish_reason) == (ids[:3], "stop")
