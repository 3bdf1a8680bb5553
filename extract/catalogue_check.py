"""What a catalogue should be, beyond what can be read: complete, and no two of its texts nearly the same."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

from personaspace.extract.catalogue import Question, Role
from personaspace.extract.scenarios import Scenario
from personaspace.store.formats.role_names import DEFAULT_ROLE

NEAR = 0.5
"""Cosine of the TF-IDF vectors of two texts (words and pairs of words) from which they count as nearly the same."""
PLACEHOLDER = re.compile(r"{[^{} ]*}")
KNOWN_PLACEHOLDERS = {"{model_name}"}
JUDGE_PLACEHOLDERS = ("{question}", "{answer}")


@dataclass(frozen=True, slots=True)
class Nearest:
    """The two texts of a kind that are most alike."""

    similarity: float
    """Cosine, 0 to 1."""
    one: str
    """Id of its entry."""
    other: str


def find_faults(roles: Sequence[Role], questions: Sequence[Question], scenarios: Sequence[Scenario] = ()) -> list[str]:
    """What is wrong with a catalogue that can be read: one line each, empty if nothing is. Poles are roles, too."""
    texts = _labelled_texts(roles, questions, scenarios)
    return [
        *_role_faults(roles),
        *_question_faults(questions),
        *_scenario_faults(scenarios),
        *_similarity_faults(texts),
    ]


def most_alike(
    roles: Sequence[Role], questions: Sequence[Question], scenarios: Sequence[Scenario] = ()
) -> dict[str, Nearest]:
    """The two prompts, descriptions, questions, ... that are most alike, where there are two."""
    nearest = {}
    for what, labelled in _labelled_texts(roles, questions, scenarios).items():
        for pair in _pairs(labelled, least=0.0):
            nearest[what] = pair
            break
    return nearest


def _role_faults(roles: Sequence[Role]) -> Iterator[str]:
    for role in roles:
        where = f"{'trait' if role.pole else 'role'} {role.id}"
        if not role.description and not role.judge:
            yield f"{where}: has no description, which a judge goes by."
        for number, prompt in enumerate(role.prompts):
            if not prompt.strip() and role.id != DEFAULT_ROLE:
                yield f"{where}: prompt {number} is empty, so the model would answer as itself."
            if prompt != prompt.strip():
                yield f"{where}: prompt {number} begins or ends with blanks."
            for unknown in sorted(set(PLACEHOLDER.findall(prompt)) - KNOWN_PLACEHOLDERS):
                yield f"{where}: prompt {number} has {unknown}, but only {{model_name}} is substituted."
        if role.judge and not all(placeholder in role.judge for placeholder in JUDGE_PLACEHOLDERS):
            yield f"{where}: the judge's instructions need {' and '.join(JUDGE_PLACEHOLDERS)}."
    for kind, group in (("roles", [r for r in roles if not r.pole]), ("traits", [r for r in roles if r.pole])):
        counts = {len(role.prompts) for role in group}
        if len(counts) > 1:
            fewest = min(group, key=lambda role: len(role.prompts))
            yield (
                f"{kind}: have {min(counts)} to {max(counts)} prompts ({fewest.id} the fewest), and so unequal numbers "
                "of rollouts."
            )


def _question_faults(questions: Sequence[Question]) -> Iterator[str]:
    for question in questions:
        if not question.text.strip():
            yield f"question {question.id}: is empty."
        if found := PLACEHOLDER.findall(question.text):
            yield f"question {question.id}: has {found[0]}, which nothing substitutes."


def _scenario_faults(scenarios: Sequence[Scenario]) -> Iterator[str]:
    for scenario in scenarios:
        if not scenario.user:
            yield f"scenario {scenario.id}: does not say who its user is, so no model can play it."
        for text in (scenario.system, *scenario.turns):
            if unknown := sorted(set(PLACEHOLDER.findall(text)) - KNOWN_PLACEHOLDERS):
                yield f"scenario {scenario.id}: has {unknown[0]}, which nothing substitutes."


def _similarity_faults(texts: Mapping[str, Sequence[tuple[str, str]]]) -> Iterator[str]:
    for what, labelled in texts.items():
        for pair in _pairs(labelled, least=NEAR):
            both = pair.one if pair.one == pair.other else f"{pair.one} and {pair.other}"
            yield f"{what}: two of {both} are nearly the same (similarity {pair.similarity:.2f})."


def _labelled_texts(
    roles: Sequence[Role], questions: Sequence[Question], scenarios: Sequence[Scenario]
) -> dict[str, list[tuple[str, str]]]:
    """(id, text) of all that should differ. The prompts of traits share their frames, so they are left out."""
    return {
        "prompts": [(role.id, prompt) for role in roles if not role.pole for prompt in role.prompts if prompt],
        "descriptions": [(role.id, role.description) for role in roles if role.description],
        "questions": [(question.id, question.text) for question in questions],
        "users": [(scenario.id, scenario.user) for scenario in scenarios],
        "turns": [(scenario.id, turn) for scenario in scenarios for turn in scenario.turns],
    }


def _pairs(labelled: Sequence[tuple[str, str]], *, least: float) -> Iterator[Nearest]:
    """Pairs of texts at least so alike, the most alike first."""
    if len(labelled) < 2:
        return
    names, texts = zip(*labelled, strict=True)
    vectors = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\w+").fit_transform(texts)
    similarity = np.triu((vectors @ vectors.T).toarray(), k=1)
    ones, others = np.nonzero(np.triu(similarity >= least, k=1))
    for place in np.argsort(-similarity[ones, others], kind="stable"):
        one, other = ones[place], others[place]
        yield Nearest(float(similarity[one, other]), names[one], names[other])
