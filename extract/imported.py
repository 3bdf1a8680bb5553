"""The plan of conversations that are finished already: response files of roles, or transcripts of several turns."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from personaspace.extract.catalogue import Question, Role
from personaspace.extract.config import GenerateConfig, PersonasConfig
from personaspace.extract.personas import PersonaPlan, PlannedRollout, plan_imported
from personaspace.store.errors import InputError
from personaspace.store.formats.role_names import DEFAULT_ROLE, SCENARIO
from personaspace.store.formats.transcripts import Transcript, first_turns, is_transcripts, read_transcripts
from personaspace.store.plan import rollout_id


def plan_finished(generate: GenerateConfig, personas: PersonasConfig) -> PersonaPlan:
    """The plan of what ``generate.responses`` names.

    Raises InputError where there is nothing of the kind, and for settings that have no effect on it.
    """
    assert generate.responses is not None
    if generate.capture:
        raise InputError("generate.capture: nothing is generated with generate.responses. Remove one of the two.")
    path = Path(generate.responses).expanduser()
    if not path.is_dir() and not (path.is_file() and is_transcripts(path)):
        raise InputError(
            f"generate.responses: {generate.responses} is no folder and no transcript; give a folder that holds "
            "ROLE.jsonl files, or transcripts (.json), or one transcript."
        )
    if personas != PersonasConfig():
        changed = [name for name, value in asdict(personas).items() if value != getattr(PersonasConfig(), name)]
        raise InputError(
            f"personas.{changed[0]}: has no effect together with generate.responses, where roles and questions come "
            "from the files. Remove one of the two."
        )
    if is_transcripts(path):
        return plan_transcripts(read_transcripts(path), turns=generate.first_turns)
    if generate.first_turns is not None:
        raise InputError(f"generate.first_turns: has no effect on the ROLE.jsonl files in {path}. Remove it.")
    plan = plan_imported(path)
    counts = Counter(plan.roles[row.role_id].id for row in plan.rows)
    if DEFAULT_ROLE not in counts or len(counts) < 2:
        raise InputError(f"generate.responses: {path} holds {sorted(counts)}; `default` and at least one role needed.")
    return plan


def plan_transcripts(transcripts: Sequence[Transcript], *, turns: int | None = None) -> PersonaPlan:
    """The plan of finished conversations, as of those that are held: a role for each domain, a question for each name.

    Domains come in the order of the alphabet. ``turns``: only the first so many of the assistant. Raises InputError
    naming the file whose scenario is of another domain than one before.
    """
    ordered = sorted(transcripts, key=lambda transcript: transcript.domain)
    domains = list(dict.fromkeys(transcript.domain for transcript in ordered))
    prompts: dict[str, list[str]] = {domain: [] for domain in domains}
    asked: dict[str, Question] = {}
    rows = []
    for row, transcript in enumerate(ordered):
        question = Question(id=transcript.name, category=transcript.domain, text=transcript.topic)
        if asked.setdefault(question.id, question) != question:
            raise InputError(f"{transcript.where}: {question.id!r} has another domain or topic in another file.")
        *messages, answer = first_turns(transcript.conversation, turns)
        system = messages[0]["content"] if messages and messages[0]["role"] == "system" else ""
        if system not in prompts[transcript.domain]:
            prompts[transcript.domain].append(system)
        role = f"{SCENARIO}.{transcript.domain}"
        rows.append(
            PlannedRollout(
                row=row,
                role_id=domains.index(transcript.domain),
                prompt=prompts[transcript.domain].index(system),
                question=list(asked).index(question.id),
                sample=transcript.sample,
                rollout_id=rollout_id(role, messages, f"imported {answer['content']}", transcript.sample),
                messages=tuple(messages),
                response=answer["content"],
                origin=transcript.origin,
            )
        )
    return PersonaPlan(
        roles=tuple(
            Role(id=f"{SCENARIO}.{domain}", kind=SCENARIO, description="", prompts=tuple(prompts[domain]))
            for domain in domains
        ),
        questions=tuple(asked.values()),
        rows=tuple(rows),
    )
