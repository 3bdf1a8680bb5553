"""Several people talk with one model: each gets what they would get alone, streamed, changed as they asked."""

import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from personaspace.extract.chat import ChatFormat
from personaspace.extract.checkpoint import resolve
from personaspace.extract.config import GenerateConfig, ModelConfig
from personaspace.extract.generate.transformers_engine import TransformersEngine, load_causal_lm
from personaspace.steer.interventions import Intervention, layer_hooks, steered
from personaspace.steer.live.gauge import Gauge
from personaspace.steer.live.talker import Answer, Ask, BusyError, Event, Talker, Ticket
from personaspace.store.errors import InputError
from tests.models import reciting_checkpoint, tiny_checkpoint

AXIS_D = np.random.default_rng(0).normal(size=32).astype(np.float32)
GAUGE = Gauge(layer=3, axis_D=AXIS_D, role_mean=0.0, default_mean=2.0, low=0.5, high=1.5)
QUESTIONS = ("Who are you?", "What should I do about a friend?", "Tell me of the sea, the night, the stars.", "Why?")


def ask(question: str = QUESTIONS[0], **settings: Any) -> Ask:
    return Ask(messages=({"role": "user", "content": question},), **{"max_tokens": 12, "seed": 7, **settings})


class Listener:
    """What one who asked hears."""

    def __init__(self, talker: Talker, asked: Ask) -> None:
        self.heard: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.ticket: Ticket = talker.ask(asked, self.heard.put)

    def answer(self) -> Answer:
        """The whole one; its pieces have to make its text."""
        pieces = []
        while isinstance(event := self.heard.get(timeout=60), str):
            pieces.append(event)
        assert isinstance(event, Answer), event
        assert "".join(pieces) == event.text
        self.pieces = pieces
        return event


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def talker(folder: Path) -> Iterator[Talker]:
    with Talker(ModelConfig(id=str(folder), dtype="float32"), [GAUGE], device="cpu") as talker:
        yield talker


def engine(folder: Path) -> tuple[TransformersEngine, ChatFormat]:
    config = ModelConfig(id=str(folder), dtype="float32")
    chat = ChatFormat(resolve(config), config)
    return TransformersEngine(load_causal_lm(resolve(config), dtype="float32"), chat), chat


def test_answers_are_those_of_the_engine_whoever_else_talks(folder: Path, talker: Talker) -> None:
    sampler, chat = engine(folder)
    push = Intervention(method="add", layer=1, vector_D=AXIS_D, value=30.0)
    prompts = [chat.encode_prompt([{"role": "user", "content": question}]) for question in QUESTIONS]
    config = GenerateConfig(max_new_tokens=12)
    plain = sampler.generate(prompts, [7] * 4, config)
    sampler.intervene(resolve(ModelConfig(id=str(folder))), layer_hooks([push]))
    pushed = sampler.generate(prompts, [7] * 4, config)
    listeners = [
        Listener(talker, ask(question, interventions=interventions))
        for interventions in ((), (push,))
        for question in QUESTIONS
    ]
    found = [listener.answer() for listener in listeners]
    assert [one.text for one in found] == [response.text for response in (*plain, *pushed)]
    assert [one.finish_reason for one in found] == [response.finish_reason for response in (*plain, *pushed)]
    assert [one.prompt_tokens for one in found[:4]] == [len(prompt) for prompt in prompts]
    assert any(len(listener.pieces) > 3 for listener in listeners), "answers come in pieces"


def test_projections_are_means_over_the_answer(folder: Path, talker: Talker) -> None:
    push = Intervention(method="add", layer=2, vector_D=AXIS_D, value=9.0)
    answer = Listener(talker, ask(interventions=(push,))).answer()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = talker.chat.encode_prompt([{"role": "user", "content": QUESTIONS[0]}])
    sampler, _ = engine(folder)
    sampler.intervene(resolve(ModelConfig(id=str(folder))), layer_hooks([push]))
    [response] = sampler.generate([prompt], [7], GenerateConfig(max_new_tokens=12))
    kept: list[torch.Tensor] = []
    handle = model.model.layers[3].register_forward_hook(lambda _, __, output: kept.append(output[0]))
    with torch.inference_mode(), steered(model, [push]):
        model(torch.tensor([[*prompt, *response.token_ids]]))
    handle.remove()
    states_TD = kept[0].reshape(-1, 32)[len(prompt) :].double().numpy()
    expected = float((states_TD @ (AXIS_D / np.linalg.norm(AXIS_D)).astype(np.float64)).mean())
    assert answer.projections[3] == pytest.approx(expected, abs=1e-4)
    assert GAUGE.position(1.0) == 0.5


def test_greedy_and_seeds(talker: Talker) -> None:
    cold = [Listener(talker, ask(temperature=0, seed=seed)).answer().text for seed in (1, 2)]
    warm = [Listener(talker, ask(temperature=1.5, seed=seed)).answer().text for seed in (1, 2, 1)]
    assert cold[0] == cold[1]
    assert warm[0] == warm[2] != warm[1]


def test_stop_texts_are_never_told(tmp_path: Path) -> None:
    """Nor their beginnings, until it is clear that they go on otherwise."""
    folder = reciting_checkpoint(tmp_path, "\n", "I see the old house.<|im_end|>")
    with Talker(ModelConfig(id=str(folder), dtype="float32"), device="cpu") as talker:
        for stop, text in (("old h", "I see the "), ("the young", "I see the old house."), ("I see", "")):
            listener = Listener(talker, ask(max_tokens=40, temperature=0, stop=(stop,)))
            assert listener.answer().text == text
            assert all(stop not in piece for piece in listener.pieces)
        whole = Listener(talker, ask(max_tokens=40, temperature=0)).answer()
        assert (whole.text, whole.finish_reason, whole.projections) == ("I see the old house.", "stop", {})


def test_who_leaves_makes_room(talker: Talker) -> None:
    gone = Listener(talker, ask(max_tokens=200, temperature=2.0))
    assert isinstance(gone.heard.get(timeout=60), str)
    gone.ticket.cancel()
    while isinstance(event := gone.heard.get(timeout=60), str):
        pass
    assert isinstance(event, Answer)
    assert event.finish_reason == "cancelled"
    deadline = time.monotonic() + 10
    while talker.load != (0, 0):
        assert time.monotonic() < deadline


def test_too_many_are_turned_away_and_the_rest_is_served(folder: Path) -> None:
    config = ModelConfig(id=str(folder), dtype="float32")
    with Talker(config, device="cpu", at_once=1, waiting=2) as talker:
        started = threading.Event()
        talker.ask(ask(max_tokens=200, temperature=2.0), lambda _: started.set())
        assert started.wait(60)
        waiting = [Listener(talker, ask()) for _ in range(2)]
        with pytest.raises(BusyError, match="1 answers are being made, and 2 wait"):
            talker.ask(ask(), print)
        assert len({listener.answer().text for listener in waiting}) == 1


def test_closing_tells_those_who_wait(folder: Path) -> None:
    talker = Talker(ModelConfig(id=str(folder), dtype="float32"), device="cpu", at_once=1)
    listeners = [Listener(talker, ask(max_tokens=200, temperature=2.0)) for _ in range(3)]
    talker.close()
    assert {listener.answer().finish_reason for listener in listeners} == {"cancelled"}
    with pytest.raises(BusyError, match="shutting down"):
        talker.ask(ask(), print)


def test_what_fails_fails_alone(talker: Talker) -> None:
    bad = Intervention(method="add", layer=1, vector_D=np.ones(5, dtype=np.float32), value=1.0)
    broken, fine = Listener(talker, ask(interventions=(bad,))), Listener(talker, ask())
    assert isinstance(broken.heard.get(timeout=60), RuntimeError)
    assert fine.answer().text


def test_what_the_context_does_not_hold_is_refused(talker: Talker) -> None:
    with pytest.raises(InputError, match="the model's context holds 256"):
        talker.ask(ask("Why? " * 300), print)
    with pytest.raises(InputError, match="the model's context holds 256"):
        talker.ask(ask(max_tokens=4000), print)


def test_an_axis_of_another_model_is_refused(folder: Path) -> None:
    gauge = Gauge(layer=9, axis_D=AXIS_D, role_mean=0.0, default_mean=1.0, low=0.0, high=1.0)
    with pytest.raises(InputError, match="has 6 layers of 32 dimensions; the axis is of layer 9"):
        Talker(ModelConfig(id=str(folder), dtype="float32"), [gauge], device="cpu")
