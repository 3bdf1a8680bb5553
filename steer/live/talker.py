"""A model that several people talk with at once, each with interventions of their own; their answers are streamed.

One thread holds the model. It goes on with every answer by one token in turn, each with a cache of its own, so that an
answer is the same whoever else is talking. That is for a few people; for thousands of rollouts there are runs.
"""

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import DynamicCache

from personaspace.extract.anatomy import dissect, states_of
from personaspace.extract.chat import ChatFormat, Message
from personaspace.extract.checkpoint import resolve
from personaspace.extract.config import ModelConfig
from personaspace.extract.generate.ending import stop_ids
from personaspace.extract.generate.noise import noisy
from personaspace.extract.generate.transformers_engine import load_causal_lm
from personaspace.extract.hooks import LayerHook, changed
from personaspace.extract.precision import machine_dtype
from personaspace.steer.interventions import Intervention, layer_hooks
from personaspace.steer.live.gauge import Gauge
from personaspace.store.errors import InputError, PersonaspaceError

HALF_A_CHARACTER = "\ufffd"
"""What tokens decode to that end within a character."""


class BusyError(PersonaspaceError):
    """As many answers wait as may."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """What somebody wants answered, and how."""

    messages: tuple[Message, ...]
    """[{role, content}], ending with the user's turn."""
    interventions: tuple[Intervention, ...] = ()
    max_tokens: int = 512
    fit: bool = False
    """Where the context holds fewer than ``max_tokens``, answer in as many as it holds."""
    temperature: float = 0.7
    """0: always the most probable token."""
    top_p: float = 0.9
    seed: int = 0
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are no part of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A finished one."""

    text: str
    finish_reason: Literal["stop", "length", "cancelled"]
    prompt_tokens: int
    response_tokens: int
    projections: Mapping[int, float]
    """Layer -> mean over the answer's tokens of <h, v> behind the interventions; empty for an answer without tokens."""


Event = str | Answer | Exception
"""A piece of text; then the whole answer, or why there is none."""


class Ticket:
    """An answer that is on its way."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        self.cancelled.set()


class Talker:
    """The model, loaded, and the thread that works for those who ask.

    ``gauges``: layers whose projections are told. At most ``at_once`` answers are made side by side, and ``waiting``
    more wait. Raises InputError if there is no such model.
    """

    def __init__(
        self,
        config: ModelConfig,
        gauges: Sequence[Gauge] = (),
        *,
        device: str | None = None,
        at_once: int = 4,
        waiting: int = 64,
    ) -> None:
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        checkpoint = resolve(config)
        self.name = checkpoint.name
        self.layers, self.hidden = checkpoint.layers, checkpoint.hidden
        self.max_positions = checkpoint.max_positions
        self.chat = ChatFormat(checkpoint, config)
        dtype = machine_dtype(device) if config.dtype == "auto" else config.dtype
        self._model: Any = load_causal_lm(checkpoint, dtype=dtype, device=device)
        self.model_config = self._model.config
        self._device = torch.device(device)
        self._stop_ids = stop_ids(self._model.generation_config.eos_token_id, self.chat.tokenizer.eos_token_id)
        parts = dissect(self._model, checkpoint.layers)
        self._decoder, self._blocks = parts.decoder, parts.blocks
        self._gauges = tuple(gauges)
        self._passed: dict[int, torch.Tensor] = {}
        for gauge in gauges:
            gauge.check_model(checkpoint.name, checkpoint.layers, checkpoint.hidden)
            self._blocks[gauge.layer].register_forward_hook(self._projecting(gauge))
        self._at_once, self._most_waiting = at_once, waiting
        self._changed = threading.Condition()
        self._waiting: deque[_Generation] = deque()
        self._active: list[_Generation] = []
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="talker", daemon=True)
        self._thread.start()

    @property
    def load(self) -> tuple[int, int]:
        """Answers that are being made, and those that wait."""
        with self._changed:
            return len(self._active), len(self._waiting)

    def ask(self, ask: Ask, listen: Callable[[Event], None]) -> Ticket:
        """Have it answered; ``listen`` is called from the talker's thread, and has to return at once.

        Raises InputError for a conversation that can't be, or that the model's context does not hold, BusyError if too
        many wait already.
        """
        generation = _Generation(self, ask, listen)
        with self._changed:
            if self._closed:
                raise BusyError("the model is shutting down.")
            if len(self._waiting) >= self._most_waiting:
                raise BusyError(
                    f"{len(self._active)} answers are being made, and {len(self._waiting)} wait. Ask later."
                )
            self._waiting.append(generation)
            self._changed.notify()
        return generation.ticket

    def close(self) -> None:
        """Answers on their way end as cancelled; returns when the thread has ended."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def __enter__(self) -> "Talker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._active or self._closed):
                    self._changed.wait()
                if self._closed:
                    left = [*self._active, *self._waiting]
                    break
                while self._waiting and len(self._active) < self._at_once:
                    self._active.append(self._waiting.popleft())
                active = list(self._active)
            for generation in active:
                if generation.go_on():
                    with self._changed:
                        self._active.remove(generation)
        for generation in left:
            generation.end("cancelled")

    @torch.inference_mode()
    def forward(
        self, ids: Sequence[int], cache: DynamicCache, hooks: Sequence[LayerHook]
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Behind the last of these tokens: logits ``(V,)``, and the projection at each gauge. In this thread only."""
        ids_BT = torch.tensor([list(ids)], device=self._device)
        with changed(self._decoder, self._blocks, hooks):
            output = self._model(input_ids=ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[0, -1], dict(self._passed)

    def ends(self, token: int) -> bool:
        """Whether it ends a turn."""
        return token in self._stop_ids

    def _projecting(self, gauge: Gauge) -> Callable[..., None]:
        axis_D = torch.from_numpy(gauge.axis_D)
        unit_D = (axis_D / axis_D.norm()).to(self._device)

        def project(_: Any, __: Any, output: Any) -> None:
            self._passed[gauge.layer] = states_of(output)[0, -1].float() @ unit_D

        return project


class _Generation:
    """One answer in the making; everything but its construction happens in the talker's thread."""

    def __init__(self, talker: Talker, ask: Ask, listen: Callable[[Event], None]) -> None:
        self.ticket = Ticket()
        self._talker, self._ask, self._listen = talker, ask, listen
        self._prompt = talker.chat.encode_prompt(ask.messages)
        room = ask.max_tokens if talker.max_positions is None else talker.max_positions - len(self._prompt)
        self._most = min(ask.max_tokens, room) if ask.fit else ask.max_tokens
        if self._most > room or self._most < 1:
            raise InputError(
                f"the conversation has {len(self._prompt)} tokens, and its answer may have {ask.max_tokens}; the "
                f"model's context holds {talker.max_positions}."
            )
        self._hooks = layer_hooks(ask.interventions)
        self._stops = (*talker.chat.stop_strings, *ask.stop)
        self._cache = DynamicCache(config=talker.model_config)
        self._tokens: list[int] = []
        self._told = 0
        self._sums: dict[int, torch.Tensor] = {}
        self._summed = 0

    def go_on(self) -> bool:
        """One token more; whether the answer has ended."""
        if self.ticket.cancelled.is_set():
            return self.end("cancelled")
        try:
            return self._step()
        except Exception as error:  # Whatever it was, the others go on, and the one who asked is told.
            self._listen(error)
            return True

    def end(self, reason: Literal["stop", "length", "cancelled"], text: str | None = None) -> bool:
        """Tell the whole answer; True."""
        whole = self._talker.chat.decode(self._tokens) if text is None else text
        if len(whole) > self._told:
            self._listen(whole[self._told :])
        self._listen(
            Answer(
                text=whole,
                finish_reason=reason,
                prompt_tokens=len(self._prompt),
                response_tokens=len(self._tokens),
                projections={layer: float(total) / self._summed for layer, total in self._sums.items()},
            )
        )
        return True

    def _step(self) -> bool:
        logits_V, passed = self._talker.forward(self._tokens[-1:] or self._prompt, self._cache, self._hooks)
        if self._tokens:
            self._summed += 1
            self._sums = {layer: self._sums.get(layer, 0) + value for layer, value in passed.items()}
        if len(self._tokens) == self._most:
            return self.end("length")
        token = self._sample(logits_V)
        if self._talker.ends(token):
            return self.end("stop")
        self._tokens.append(token)
        text = self._talker.chat.decode(self._tokens)
        cut = min((place for place in map(text.find, self._stops) if place >= 0), default=None)
        if cut is not None:
            return self.end("stop", text[:cut])
        self._tell(text)
        return False

    def _tell(self, text: str) -> None:
        """What can't change any more: no half character, and no beginning of a stop string."""
        safe = len(text.rstrip(HALF_A_CHARACTER))
        for stop in self._stops:
            for length in range(min(len(stop) - 1, safe), 0, -1):
                if text[:safe].endswith(stop[:length]):
                    safe -= length
                    break
        if safe > self._told:
            self._listen(text[self._told : safe])
            self._told = safe

    def _sample(self, logits_V: torch.Tensor) -> int:
        ask = self._ask
        if ask.temperature == 0:
            return int(logits_V.argmax())
        seed_B = torch.tensor([ask.seed], dtype=torch.int64, device=logits_V.device)
        step_B = torch.full_like(seed_B, len(self._tokens))
        return int(noisy(logits_V[None], seed_B, step_B, temperature=ask.temperature, top_p=ask.top_p).argmax())
