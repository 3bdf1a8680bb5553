"""The plan that crosses the roles, traits and questions of a catalogue into rows.

Its order (roles one after another, then the poles of traits, each with its prompts, questions and samples, then
conversations of several turns) decides the rows of the arrays.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from personaspace.extract.catalogue import Question, Role, select
from personaspace.extract.catalogue_files import load_questions, load_roles, load_traits
from personaspace.extract.config import PersonasConfig
from personaspace.extract.scenarios import Script, choose_scenarios, load_scenarios, plan_scenarios
from personaspace.store.errors import InputError
from personaspace.store.formats import assistant_axis
from personaspace.store.formats.role_names import DEFAULT_ROLE, SCENARIO
from personaspace.store.plan import rollout_id, steered_id


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedRollout:
    """One row of the run: indices into the plan's tables, and the conversation to continue."""

    row: int
    role_id: int
    prompt: int
    question: int
    sample: int
    rollout_id: str
    messages: tuple[dict[str, str], ...]
    """[{role, content}], ending with the user's turn. Empty for a rollout of the run that the config lacks."""
    response: str | None = None
    """The finished response, where it is imported."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """Who wrote an imported conversation, as far as is known."""
    script: Script | None = None
    """How a conversation of several turns goes on after ``messages``."""
    plain_id: str | None = None
    """Of a steered rollout: the id that it has without steering."""

    @property
    def noise_id(self) -> str:
        """What its seed comes from: steered or not, the noise is the same, so that both can be compared one by one."""
        return self.plain_id or self.rollout_id

    @property
    def turns(self) -> int:
        """Of the assistant, as far as the config knows."""
        if self.script is not None:
            return self.script.turns
        return 1 + sum(message["role"] == "assistant" for message in self.messages)


@dataclass(frozen=True, kw_only=True, slots=True)
class PersonaPlan:
    """Roles, questions and the rows made of them, in the order of the rollout axis."""

    roles: tuple[Role, ...]
    questions: tuple[Question, ...]
    rows: tuple[PlannedRollout, ...]

    def rows_per_role(self) -> list[int]:
        """Rows of each persona, to which units are fitted; of each domain where there are conversations alone."""
        counts = Counter(row.role_id for row in self.rows)
        personas = [role_id for role_id, role in enumerate(self.roles) if role.kind != SCENARIO]
        return [counts[role_id] for role_id in personas or range(len(self.roles))]


def plan_personas(config: PersonasConfig, *, model_name: str, generation: str) -> PersonaPlan:
    """Load roles and questions and cross them.

    ``model_name`` fills `{model_name}` in prompts; ``generation`` describes the sampling and enters every
    rollout id. Raises InputError naming the file and the entry at fault.
    """
    roles = _roles(config)
    questions = load_questions(config.questions)[: config.max_questions] if roles else []
    if roles and not questions:
        raise InputError(f"personas.questions: no questions in {' or '.join(config.questions)}; give at least one.")
    rows: list[PlannedRollout] = []
    for role_id, role in enumerate(roles):
        samples = config.default_samples if role.id == DEFAULT_ROLE else config.samples
        prompts = [prompt.replace("{model_name}", model_name) for prompt in role.prompts[: config.prompts]]
        for prompt, question, sample in _pairs(config.pairing, len(prompts), len(questions), samples):
            messages = _messages(prompts[prompt], questions[question].text)
            rows.append(
                PlannedRollout(
                    row=len(rows),
                    role_id=role_id,
                    prompt=prompt,
                    question=question,
                    sample=sample,
                    rollout_id=rollout_id(role.id, messages, generation, sample),
                    messages=messages,
                )
            )
    if config.scenarios:
        _add_conversations(config, roles, questions, rows, model_name=model_name, generation=generation)
    return PersonaPlan(roles=tuple(roles), questions=tuple(questions), rows=tuple(rows))


def steered(plan: PersonaPlan, steering: str) -> PersonaPlan:
    """The same plan for a model that is changed while it runs, in the way that ``steering`` describes."""
    rows = tuple(
        replace(row, rollout_id=steered_id(row.rollout_id, steering), plain_id=row.rollout_id) for row in plan.rows
    )
    return replace(plan, rows=rows)


def plan_imported(folder: Path) -> PersonaPlan:
    """The plan of finished assistant-axis responses: rows in the order of their files, `default` first.

    Raises InputError naming FILE:LINE for responses to negative trait prompts, which are no roles, for doubled
    responses, and where one index stands for two questions or prompts.
    """
    responses = assistant_axis.read_responses(folder)
    names = sorted({response.role for response in responses}, key=lambda name: (name != DEFAULT_ROLE, name))
    texts: dict[int, str] = {}
    prompts: dict[str, dict[int, str]] = {name: {} for name in names}
    seen: dict[str, str] = {}
    ids = []
    for response in responses:
        *messages, answer = response.conversation
        system = messages[0]["content"] if messages and messages[0]["role"] == "system" else ""
        ids.append(rollout_id(response.role, messages, f"imported {answer['content']}", 0))
        if response.label == "neg":
            raise InputError(f"{response.where}: label is 'neg'; only roles ('pos', 'default') can be imported.")
        if texts.setdefault(response.question, response.question_text) != response.question_text:
            raise InputError(f"{response.where}: question_index {response.question} has another question before.")
        if prompts[response.role].setdefault(response.prompt, system) != system:
            raise InputError(f"{response.where}: prompt_index {response.prompt} has another system prompt before.")
        if seen.setdefault(ids[-1], response.where) != response.where:
            raise InputError(f"{response.where}: the same response as {seen[ids[-1]]}; remove one of the two.")
    questions = sorted(texts)
    ordered = sorted(zip(ids, responses, strict=True), key=lambda pair: names.index(pair[1].role))
    return PersonaPlan(
        roles=tuple(
            Role(id=name, kind="unknown", description="", prompts=tuple(dict(sorted(prompts[name].items())).values()))
            for name in names
        ),
        questions=tuple(Question(id=f"aa{number}", category="unknown", text=texts[number]) for number in questions),
        rows=tuple(
            PlannedRollout(
                row=row,
                role_id=names.index(response.role),
                prompt=sorted(prompts[response.role]).index(response.prompt),
                question=questions.index(response.question),
                sample=0,
                rollout_id=permanent_id,
                messages=response.conversation[:-1],
                response=response.conversation[-1]["content"],
            )
            for row, (permanent_id, response) in enumerate(ordered)
        ),
    )


def _add_conversations(
    config: PersonasConfig,
    roles: list[Role],
    questions: list[Question],
    rows: list[PlannedRollout],
    *,
    model_name: str,
    generation: str,
) -> None:
    """Append the config's conversations to the plan: domain by domain, scenario by scenario, sample by sample."""
    scenarios = choose_scenarios(load_scenarios(config.scenarios), config.only_scenarios)
    domains, asked, talks = plan_scenarios(scenarios, turns=config.turns, auditor=config.auditor, model_name=model_name)
    taken = {question.id for question in questions}
    for question in asked:
        if question.id in taken:
            raise InputError(
                f"personas.scenarios: {question.id!r} is also the id of a question; give the scenario another."
            )
    for talk in talks:
        for sample in range(config.samples):
            role = domains[talk.role_id]
            settings = f"{generation} {talk.settings}"
            rows.append(
                PlannedRollout(
                    row=len(rows),
                    role_id=len(roles) + talk.role_id,
                    prompt=talk.prompt,
                    question=len(questions) + talk.question,
                    sample=sample,
                    rollout_id=rollout_id(role.id, talk.messages, settings, sample),
                    messages=talk.messages,
                    script=talk.script,
                )
            )
    roles += domains
    questions += asked


def _roles(config: PersonasConfig) -> list[Role]:
    """The chosen roles, and the poles of the chosen traits; none if conversations alone are asked for."""
    if not config.roles and not config.traits and config.scenarios:
        return []
    roles = select(load_roles(config.roles), config.only, "personas.only")
    if DEFAULT_ROLE not in {role.id for role in roles}:
        raise InputError(f"personas.roles: no role `{DEFAULT_ROLE}`; the axis is measured against it, so add one.")
    if len(roles) < 2:
        raise InputError("personas: `default` alone spans no space; use at least one more role.")
    roles += select(load_traits(config.traits), config.only_traits, "personas.only_traits")
    reserved = [role for role in roles if role.kind == SCENARIO]
    if reserved:
        raise InputError(
            f"personas.roles: role {reserved[0].id!r} has the kind {SCENARIO!r}, which is kept for conversations. "
            "Give it another kind."
        )
    return roles


def _pairs(pairing: str, prompts: int, questions: int, samples: int) -> Iterator[tuple[int, int, int]]:
    """(prompt, question, sample) of one role, in row order."""
    if pairing == "cross":
        for prompt in range(prompts):
            for question in range(questions):
                for sample in range(samples):
                    yield prompt, question, sample
    else:
        for question in range(questions):
            for sample in range(samples):
                yield (question + sample) % prompts, question, sample


def _messages(system: str, question: str) -> tuple[dict[str, str], ...]:
    user = {"role": "user", "content": question}
    return ({"role": "system", "content": system}, user) if system else (user,)
