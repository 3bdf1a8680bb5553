"""Refusals and broken roles: every pattern finds its examples, and no flaw's patterns find what they must spare."""

import re

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from personaspace.analysis.quality.phrases import Phrase, load_phrases, said_aloud

FILES = ("phrases.yaml", "speakers.yaml")
CASES = [(file, name, phrase) for file in FILES for name, of in load_phrases(file).items() for phrase in of.phrases]


def found(name: str, text: str, file: str = FILES[0]) -> bool:
    return bool(load_phrases(file)[name].find(said_aloud(pa.array([text])))[0])


@pytest.mark.parametrize(("file", "name", "phrase"), CASES)
def test_examples(file: str, name: str, phrase: Phrase) -> None:
    assert phrase.matches
    assert phrase.spares
    assert not re.search(r"\{[a-z]", phrase.pattern), "every fragment is filled in"
    for text in phrase.matches:
        said = said_aloud(pa.array([text]))
        # By this pattern, not by another one of the list.
        assert pc.match_substring_regex(said, pattern=phrase.pattern, ignore_case=True)[0].as_py(), text
    for text in phrase.spares:
        assert not found(name, text, file), text


@pytest.mark.parametrize(
    "text",
    [
        "Arr, I can't say I've ever trusted a man who won't drink.",
        "I cannot rest until the debt is paid.",
        "We refuse, all of us, the swarm, to be counted.",
        "I'm so sorry to hear that you're going through a tough time.",
        "I will not go gently. I will not help them build their wall.",
        "I am the wind, and I cannot be held.",
        "As a doctor, I can't stress enough how important sleep is.",
    ],
)
def test_what_personas_say_is_neither(text: str) -> None:
    assert not found("refused", text)
    assert not found("broke_role", text)


def test_a_refusal_is_looked_for_at_the_beginning() -> None:
    refusal = "I'm sorry, but I can't help with that."
    story = "The sea was calm, and the crew slept under a sky of small cold stars. " * 4
    assert found("refused", f"Well. {refusal}")
    assert not found("refused", story + refusal), "somebody in the story says so"
    assert found("broke_role", f"{story} I'm just a language model, of course.")


@pytest.mark.parametrize(("opening", "closing"), [("<think>", "</think>"), ("[THINK]", "[/THINK]")])
def test_what_was_thought_is_not_said(opening: str, closing: str) -> None:
    thought = f"{opening}As an AI, I cannot help with that. Or can I?{closing}\n\n"
    assert not found("refused", f"{thought}Ahoy!")
    assert not found("broke_role", f"{thought}Ahoy!")
    assert found("refused", f"{thought}I'm sorry, but I can't help with that.")
    assert not found("refused", thought.removesuffix(f"{closing}\n\n")), "cut off while thinking"
