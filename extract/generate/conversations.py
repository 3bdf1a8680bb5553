"""Conversations of several turns: a batch of them goes on turn by turn, all of them together.

Each turn is one batch for the engine, with a seed of its own for every conversation. So, as for single responses: in
float32 a conversation's text does not depend on the others; in bfloat16 it does, and batches are fixed by the plan.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from personaspace.extract.chat import ChatFormat, Message
from personaspace.extract.config import AuditorConfig, GenerateConfig
from personaspace.extract.dialogue import Dialogue, Fate, end_dialogue, go_on, open_dialogue
from personaspace.extract.generate.engine import Captured, Engine, FinishReason, Response
from personaspace.extract.generate.noise import rollout_seed
from personaspace.extract.personas import PlannedRollout
from personaspace.extract.pooling import Pooled
from personaspace.extract.scenarios import player_messages
from personaspace.extract.spans import Conversation
from personaspace.extract.turns import THINK_MARKERS, UnstableBoundaryError


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What the user of a conversation has to go by."""

    planned: PlannedRollout
    turn: int
    """Of the user: 1 is the first after the opening."""
    messages: tuple[Message, ...]
    """What was said aloud so far; the assistant's turn comes last."""
    seed: int
    """Of this turn, 63 bits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Said:
    """The user's turn, or why there is none."""

    text: str
    refused: str = ""


Sample = Callable[[Sequence[Sequence[int]], Sequence[int], GenerateConfig], list[Captured]]
"""As `Engine.generate`, with what was captured of each response, if anything was."""


class User(Protocol):
    """Whoever the model talks with."""

    def speak(self, asked: Sequence[Asked]) -> list[Said]:
        """The user's next turn in each of these conversations, in order."""


class Script:
    """A user who says what the scenario has for each turn."""

    def speak(self, asked: Sequence[Asked]) -> list[Said]:
        """The turns of the scripts."""
        return [Said(text=one.planned.script.said[one.turn]) for one in asked if one.planned.script is not None]


class Player:
    """The model under study, playing the user as well: told who to be, and shown the conversation from that side."""

    def __init__(
        self,
        engine: Engine,
        chat: ChatFormat,
        generate: GenerateConfig,
        auditor: AuditorConfig,
        *,
        max_positions: int | None,
    ) -> None:
        self._engine, self._chat, self._max_positions = engine, chat, max_positions
        self._config = replace(generate, max_new_tokens=auditor.max_tokens, temperature=auditor.temperature)

    def speak(self, asked: Sequence[Asked]) -> list[Said]:
        """Sampled turns, without what was thought before."""
        prompts = {
            place: self._chat.encode_prompt(player_messages(one.planned.script.user, one.messages))
            for place, one in enumerate(asked)
            if one.planned.script is not None
        }
        said = [Said(text="", refused=self._too_long(len(prompts[place]))) for place in range(len(asked))]
        fitting = [place for place, one in enumerate(said) if not one.refused]
        if fitting:
            seeds = [asked[place].seed for place in fitting]
            responses = self._engine.generate([prompts[place] for place in fitting], seeds, self._config)
            for place, response in zip(fitting, responses, strict=True):
                said[place] = Said(text=without_reasoning(response.text), refused=response.unusable or "")
        return said

    def _too_long(self, tokens: int) -> str:
        """Why a prompt for the player can't be used; empty if it can."""
        longest = self._config.max_new_tokens
        if self._max_positions is None or tokens + longest <= self._max_positions:
            return ""
        return (
            f"to play the user takes a prompt of {tokens} tokens, which leaves no room for {longest} in the model's "
            f"context of {self._max_positions}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """How one turn of the assistant came about."""

    seed: int
    finish_reason: FinishReason
    tokens: Fate
    """What the rollout's prompt holds of it; of the last turn, which is the response, `sampled`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Talk:
    """A conversation that was held."""

    messages: tuple[Message, ...]
    """Up to the last response."""
    conversation: Conversation
    response: Response
    """The last one."""
    pooled: Pooled | None
    """What was captured of it."""
    turns: tuple[Turn, ...]
    dropped: str | None
    """Why it broke off before all turns were taken, or None."""
    earlier_tokens: int
    """Sampled by the model in all turns before the last."""


@dataclass(slots=True)
class _Going:
    """A conversation on its way."""

    planned: PlannedRollout
    dialogue: Dialogue
    responses: list[Response]
    pooled: Pooled | None
    dropped: str | None = None
    seeds: list[int] = field(default_factory=list)


def turn_seed(seed: int, planned: PlannedRollout, turn: int, who: str = "assistant") -> int:
    """Seed of a turn: the rollout's own for the assistant's first one, and one derived from it for each other."""
    return rollout_seed(seed, planned.noise_id if turn == 0 else f"{planned.noise_id}/{turn}/{who}")


def hold_conversations(
    sample: Sample,
    chat: ChatFormat,
    user: User,
    opened: Mapping[int, tuple[PlannedRollout, Response, Pooled | None]],
    config: GenerateConfig,
    *,
    max_positions: int | None,
) -> dict[int, Talk]:
    """Carry on conversations whose first responses are there (place in the batch -> rollout, response, and what was
    captured of it).

    One that can't go on (the user refuses, the template garbles it, the context is full) breaks off, with the reason;
    it does not hold up the others.
    """
    talks = {
        place: _Going(
            planned=planned,
            dialogue=open_dialogue(chat, planned.messages),
            responses=[response],
            pooled=pooled,
            dropped=response.unusable,
            seeds=[turn_seed(config.seed, planned, 0)],
        )
        for place, (planned, response, pooled) in opened.items()
    }
    for turn in range(1, max((going.planned.turns for going in talks.values()), default=1)):
        going = [talk for talk in talks.values() if turn < talk.planned.turns and talk.dropped is None]
        _user_speaks(chat, user, going, turn, config, max_positions)
        going = [talk for talk in going if talk.dropped is None]
        if not going:
            break
        for talk in going:
            talk.seeds.append(turn_seed(config.seed, talk.planned, turn))
        prompts = [talk.dialogue.prompt for talk in going]
        sampled = sample(prompts, [talk.seeds[-1] for talk in going], config)
        for talk, (response, pooled) in zip(going, sampled, strict=True):
            talk.responses.append(response)
            talk.pooled = pooled
            talk.dropped = response.unusable
    return {place: _finish(chat, talk) for place, talk in talks.items()}


def _user_speaks(
    chat: ChatFormat,
    user: User,
    going: Sequence[_Going],
    turn: int,
    config: GenerateConfig,
    max_positions: int | None,
) -> None:
    asked = [
        Asked(
            planned=talk.planned,
            turn=turn,
            messages=tuple(
                {**message, "content": without_reasoning(message["content"])}
                for message in (*talk.dialogue.messages, {"role": "assistant", "content": talk.responses[-1].text})
            ),
            seed=turn_seed(config.seed, talk.planned, turn, "user"),
        )
        for talk in going
    ]
    for talk, said in zip(going, user.speak(asked) if asked else [], strict=True):
        before = f"turn {turn + 1} of {talk.planned.turns}: "
        if said.refused or not said.text.strip():
            talk.dropped = before + (said.refused or "the user said nothing")
            continue
        try:
            dialogue = go_on(chat, talk.dialogue, talk.responses[-1], said.text.strip())
        except UnstableBoundaryError as error:
            talk.dropped = f"{before}{error}"
            continue
        needed = len(dialogue.prompt) + config.max_new_tokens
        if max_positions is not None and needed > max_positions:
            talk.dropped = (
                f"{before}a prompt of {len(dialogue.prompt)} tokens leaves no room for {config.max_new_tokens} in the "
                f"model's context of {max_positions}"
            )
            continue
        talk.dialogue = dialogue


def _finish(chat: ChatFormat, talk: _Going) -> Talk:
    fates: tuple[Fate, ...] = (*talk.dialogue.fates, "sampled")
    return Talk(
        messages=talk.dialogue.messages,
        conversation=end_dialogue(chat, talk.dialogue, talk.responses[-1]),
        response=talk.responses[-1],
        pooled=talk.pooled,
        turns=tuple(
            Turn(seed=seed, finish_reason=response.finish_reason, tokens=fate)
            for seed, response, fate in zip(talk.seeds, talk.responses, fates, strict=True)
        ),
        dropped=talk.dropped,
        earlier_tokens=sum(len(response.token_ids) for response in talk.responses[:-1]),
    )


def without_reasoning(text: str) -> str:
    """What is said aloud of a text that may begin with reasoning."""
    for opening, closing in THINK_MARKERS:
        text = text.rpartition(closing)[2].partition(opening)[0]
    return text.strip()
