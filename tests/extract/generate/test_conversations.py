"""Conversations of several turns with real tiny models: their seeds, their company, and how they break off."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from personaspace.extract.chat import ChatFormat
from personaspace.extract.checkpoint import resolve
from personaspace.extract.config import AuditorConfig, GenerateConfig, ModelConfig, PersonasConfig
from personaspace.extract.generate.auditor import choose_user
from personaspace.extract.generate.conversations import (
    Asked,
    Said,
    Script,
    Talk,
    User,
    hold_conversations,
    turn_seed,
    without_reasoning,
)
from personaspace.extract.generate.engine import Response
from personaspace.extract.generate.noise import rollout_seed
from personaspace.extract.generate.transformers_engine import TransformersEngine, load_causal_lm
from personaspace.extract.personas import PlannedRollout, plan_personas
from personaspace.extract.rollouts import held_rollout
from personaspace.extract.scenarios import BEGIN, player_messages
from tests.models import tiny_checkpoint

CONFIG = GenerateConfig(max_new_tokens=10, seed=3)
SCENARIOS = """
domain: sea
scenarios:
  - {id: sea.one, topic: The sea., user: You are Ann., turns: ["Who are you?", "And then?", "The sea?", "Stay."]}
  - {id: sea.two, topic: The night., user: You are Bo., system: Be a ghost., turns: ["Why?", "Where?", "When?", "Who?"]}
  - {id: sea.three, topic: Stars., user: You are Cy., turns: ["Where are the stars?", "There?", "Yes?", "No?"]}
"""


class Place:
    """A tiny model, and the conversations of a few scenarios."""

    def __init__(self, folder: Path) -> None:
        checkpoint = resolve(ModelConfig(id=str(tiny_checkpoint(folder / "model", layers=2))))
        self.chat = ChatFormat(checkpoint, ModelConfig(id=checkpoint.source))
        self.engine = TransformersEngine(load_causal_lm(checkpoint, dtype="float32"), self.chat)
        (folder / "sea.yaml").write_text(SCENARIOS)
        self.sources = (str(folder / "sea.yaml"),)

    def rows(self, turns: int = 4, auditor: AuditorConfig | None = None) -> list[PlannedRollout]:
        personas = PersonasConfig(
            roles=(), scenarios=self.sources, turns=turns, samples=2, auditor=auditor or AuditorConfig()
        )
        return list(plan_personas(personas, model_name="x", generation="g").rows)

    def hold(
        self, rows: Sequence[PlannedRollout], user: User | None = None, max_positions: int | None = None
    ) -> list[Talk]:
        prompts = [self.chat.encode_prompt(row.messages) for row in rows]
        firsts = self.engine.generate(prompts, [rollout_seed(CONFIG.seed, row.rollout_id) for row in rows], CONFIG)
        opened = {place: (row, first, None) for place, (row, first) in enumerate(zip(rows, firsts, strict=True))}
        talks = hold_conversations(
            self.engine.generate_captured, self.chat, user or Script(), opened, CONFIG, max_positions=max_positions
        )
        return [talks[place] for place in range(len(rows))]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("conversations"))


def test_scripted_conversations_do_not_depend_on_their_company(place: Place) -> None:
    rows = place.rows()
    together = place.hold(rows)
    assert [place.hold([row])[0] for row in rows] == together
    assert place.hold(rows[::-1]) == together[::-1]
    assert len({talk.response.text for talk in together}) == len(rows)


def test_what_is_said_and_stored(place: Place) -> None:
    [row] = [row for row in place.rows() if row.sample == 1 and row.messages[0]["role"] == "system"]
    [talk] = place.hold([row])
    assert [message["role"] for message in talk.messages] == ["system", *("user", "assistant") * 3, "user"]
    said = [message["content"] for message in talk.messages if message["role"] == "user"]
    assert said == ["Why?", "Where?", "When?", "Who?"]
    assert len(talk.turns) == 4 == len({turn.seed for turn in talk.turns})
    assert talk.turns[0].seed == rollout_seed(CONFIG.seed, row.rollout_id)
    rollout = held_rollout(
        row, "scenario.sea", talk, chat=place.chat, config=CONFIG, auditor=AuditorConfig(), max_positions=None
    )
    assert rollout.dropped is None
    assert rollout.response == talk.response.text
    assert rollout.messages == list(talk.messages)
    wholes = [span for span in rollout.spans if span.part == "whole"]
    assert [span.turn for span in wholes] == [0, 1, 2, 3]
    ids = [*rollout.prompt_token_ids, *rollout.response_token_ids]
    spoken = [message["content"] for message in talk.messages if message["role"] == "assistant"]
    assert [place.chat.decode(ids[span.start : span.stop]) for span in wholes] == [*spoken, rollout.response]
    sampling = json.loads(rollout.sampling)
    assert [turn["seed"] for turn in sampling["turns"]] == [turn.seed for turn in talk.turns]
    assert sampling["user"] == {"played_by": "script"}
    assert talk.earlier_tokens == sum(span.stop - span.start for span in wholes[:-1])


def test_every_turn_is_the_engines_own_answer_to_its_prompt(place: Place) -> None:
    """The second turn again by hand: prompt, sampled tokens and what follows, and the turn's own seed."""
    row = place.rows(turns=2)[0]
    [talk] = place.hold([row])
    first_prompt = place.chat.encode_prompt(row.messages)
    [first] = place.engine.generate([first_prompt], [rollout_seed(CONFIG.seed, row.rollout_id)], CONFIG)
    between = "<|im_end|>\n<|im_start|>user\nAnd then?<|im_end|>\n<|im_start|>assistant\n"
    prompt = [*first_prompt, *first.token_ids, *place.chat.encode_text(between)]
    [second] = place.engine.generate([prompt], [turn_seed(CONFIG.seed, row, 1)], CONFIG)
    assert talk.conversation.prompt == prompt
    assert talk.response == second


def test_the_model_plays_its_own_user(place: Place) -> None:
    auditor = AuditorConfig(played_by="model", max_tokens=6)
    rows = place.rows(turns=3, auditor=auditor)
    assert rows[0].script is not None
    assert rows[0].script.user == "You are Ann."
    heard: list[list[int]] = []

    class Listening:
        """The engine, with what it is asked written down."""

        def generate(
            self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], config: GenerateConfig
        ) -> list[Response]:
            heard.extend(list(prompt) for prompt in prompts)
            assert config.max_new_tokens == 6
            return place.engine.generate(prompts, seeds, config)

    user = choose_user(auditor, Listening(), place.chat, CONFIG, max_positions=None)
    talks = place.hold(rows, user)
    asked = [place.chat.tokenizer.decode(prompt) for prompt in heard]
    assert len(asked) == 2 * len([talk for talk in talks if talk.dropped is None])
    assert all(BEGIN in text for text in asked)
    assert "You are Ann." in asked[0]
    assert asked[0].index("<|im_start|>assistant\nWho are you?") < asked[0].rindex("<|im_start|>user\n")
    assert place.hold(rows, choose_user(auditor, place.engine, place.chat, CONFIG, max_positions=None)) == talks
    assert len({talk.messages[-1]["content"] for talk in talks}) == len(talks)


def test_the_user_hears_no_reasoning() -> None:
    assert without_reasoning("<think>Hm.</think>\n\nA ghost.") == "A ghost."
    assert without_reasoning("Hm.</think>A ghost.") == "A ghost."
    assert without_reasoning("<think>Hm, and then") == ""
    assert without_reasoning(" A ghost. ") == "A ghost."


def test_a_conversation_that_breaks_off_does_not_hold_up_the_others(place: Place) -> None:
    rows = place.rows(turns=4)
    undisturbed = place.hold(rows)

    class Refusing(Script):
        """Refuses the first conversation at its third turn, and has nothing to say in the second one."""

        def speak(self, asked: Sequence[Asked]) -> list[Said]:
            said = super().speak(asked)
            for number, one in enumerate(asked):
                if one.turn == 2 and one.planned is rows[0]:
                    said[number] = Said(text="", refused="the auditor refused: no")
                if one.turn == 1 and one.planned is rows[1]:
                    said[number] = Said(text=" ")
            return said

    talks = place.hold(rows, Refusing())
    assert [talk.dropped for talk in talks[:2]] == [
        "turn 3 of 4: the auditor refused: no",
        "turn 2 of 4: the user said nothing",
    ]
    assert [len(talk.turns) for talk in talks[:3]] == [2, 1, 4]
    assert talks[2:] == undisturbed[2:]
    stored = held_rollout(
        rows[0], "scenario.sea", talks[0], chat=place.chat, config=CONFIG, auditor=AuditorConfig(), max_positions=None
    )
    assert (stored.dropped, stored.spans) == ("turn 3 of 4: the auditor refused: no", [])


def test_a_full_context_ends_a_conversation(place: Place) -> None:
    rows = place.rows(turns=4)
    longest = [len(talk.conversation.prompt) for talk in place.hold(rows)]
    talks = place.hold(rows, max_positions=sorted(longest)[2] + CONFIG.max_new_tokens)
    broken = [talk for talk in talks if talk.dropped is not None]
    assert len(broken) == sum(length > sorted(longest)[2] for length in longest) > 0
    assert all("leaves no room for 10 in the model's context of" in str(talk.dropped) for talk in broken)


def test_a_player_whose_context_is_full_ends_its_conversation_alone(place: Place) -> None:
    """The instructions take up most of a tiny model's 256 tokens."""
    auditor = AuditorConfig(played_by="model", max_tokens=6)
    rows = place.rows(turns=2, auditor=auditor)
    lengths: list[int] = []

    class Measuring(Script):
        """Notes how long a player's prompts are."""

        def speak(self, asked: Sequence[Asked]) -> list[Said]:
            for one in asked:
                assert one.planned.script is not None
                messages = player_messages(one.planned.script.user, one.messages)
                lengths.append(len(place.chat.encode_prompt(messages)))
            return [Said(text="Go on.") for _ in asked]

    place.hold(rows, Measuring())
    limit = sorted(lengths)[len(lengths) // 2] + auditor.max_tokens
    user = choose_user(auditor, place.engine, place.chat, CONFIG, max_positions=limit)
    reasons = [talk.dropped for talk in place.hold(rows, user)]
    assert [reason is not None for reason in reasons] == [length + auditor.max_tokens > limit for length in lengths]
    assert any(reasons)
    assert all(
        reason is None or re.search(r"^turn 2 of 2: to play the user takes a prompt of \d+ tokens", reason)
        for reason in reasons
    )


@pytest.mark.parametrize("spoilt", [0, 2])
def test_a_response_that_cannot_be_used_ends_its_conversation_alone(place: Place, spoilt: int) -> None:
    """As a server gives them: the engine works, and one answer can't be read."""
    rows = place.rows()[:2]
    whole = place.hold(rows)
    turn = 0

    def sample(
        prompts: Sequence[Sequence[int]], seeds: Sequence[int], config: GenerateConfig
    ) -> list[tuple[Response, None]]:
        nonlocal turn
        responses = place.engine.generate(prompts, seeds, config)
        if turn == spoilt:
            responses[0] = replace(responses[0], unusable="no answer")
        turn += 1
        return [(response, None) for response in responses]

    firsts = sample(
        [place.chat.encode_prompt(row.messages) for row in rows], [talk.turns[0].seed for talk in whole], CONFIG
    )
    opened = {number: (row, *first) for number, (row, first) in enumerate(zip(rows, firsts, strict=True))}
    talks = hold_conversations(sample, place.chat, Script(), opened, CONFIG, max_positions=None)
    assert talks[1] == whole[1]
    assert (talks[0].dropped, len(talks[0].turns)) == ("no answer", spoilt + 1)
