"""Plans of finished conversations, as `generate.responses` names them."""

import json
from pathlib import Path

import pytest

from personaspace.cluster.job import plan_rollouts
from personaspace.extract.config import GenerateConfig, PersonasConfig
from personaspace.extract.imported import plan_finished
from personaspace.store.errors import InputError
from tests.store.formats.test_transcripts import TALK, write

NOTHING = PersonasConfig()


def test_a_domain_is_a_role_and_a_scenario_a_question(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be kind."}
    write(tmp_path / "a.json", domain="therapy", scenario="therapy.burnout", topic="Tired.", model="llama")
    write(tmp_path / "b.json", domain="coding", topic="Slow.", conversation=[system, *TALK])
    write(tmp_path / "c.json", domain="therapy", scenario="therapy.burnout", topic="Tired.", sample=1)
    plan = plan_finished(GenerateConfig(responses=str(tmp_path)), NOTHING)
    assert [(role.id, role.kind, role.prompts) for role in plan.roles] == [
        ("scenario.coding", "scenario", ("Be kind.",)),
        ("scenario.therapy", "scenario", ("",)),
    ]
    assert [(question.id, question.category) for question in plan.questions] == [
        ("b", "coding"),
        ("therapy.burnout", "therapy"),
    ]
    assert [(row.row, row.role_id, row.question, row.sample) for row in plan.rows] == [
        (0, 0, 0, 0),
        (1, 1, 1, 0),
        (2, 1, 1, 1),
    ]
    assert plan.rows[1].messages == tuple(TALK[:3])
    assert (plan.rows[1].response, plan.rows[1].turns, plan.rows[1].origin) == ("Well.", 2, {"written_by": "llama"})
    assert len({row.rollout_id for row in plan.rows}) == 3
    assert plan.rows_per_role() == [1, 2]


def test_only_the_first_turns(tmp_path: Path) -> None:
    file = write(tmp_path / "a.json")
    [row] = plan_finished(GenerateConfig(responses=str(file), first_turns=1), NOTHING).rows
    assert (row.messages, row.response, row.turns) == ((TALK[0],), "Hello.", 1)


def test_a_scenario_has_one_topic(tmp_path: Path) -> None:
    write(tmp_path / "a.json", scenario="x", topic="One.")
    write(tmp_path / "b.json", scenario="x", topic="Two.", sample=1)
    with pytest.raises(InputError, match=r"b\.json: 'x' has another domain or topic in another file\."):
        plan_finished(GenerateConfig(responses=str(tmp_path)), NOTHING)


def test_settings_without_effect_are_refused(tmp_path: Path) -> None:
    file = str(write(tmp_path / "a.json"))
    with pytest.raises(InputError, match=r"^personas\.turns: has no effect together with generate\.responses"):
        plan_finished(GenerateConfig(responses=file), PersonasConfig(turns=3))
    with pytest.raises(InputError, match=r"^generate\.capture: nothing is generated with generate\.responses"):
        plan_finished(GenerateConfig(responses=file, capture=True), NOTHING)
    with pytest.raises(InputError, match=r"^generate\.responses: .* is no folder and no transcript; give a folder"):
        plan_finished(GenerateConfig(responses=str(tmp_path / "b.json")), NOTHING)
    with pytest.raises(InputError, match=r"^generate\.first_turns: cuts imported transcripts, and generate\.responses"):
        plan_rollouts(NOTHING, GenerateConfig(first_turns=2), "tiny")
    line = {"prompt_index": 0, "question_index": 0, "question": "Hi.", "label": "pos", "conversation": TALK[:2]}
    (tmp_path / "ghost.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(InputError, match=r"holds \['ghost'\]; `default` and at least one role needed\."):
        plan_finished(GenerateConfig(responses=str(tmp_path)), NOTHING)
    with pytest.raises(InputError, match=r"^generate\.first_turns: has no effect on the ROLE\.jsonl files in"):
        plan_finished(GenerateConfig(responses=str(tmp_path), first_turns=2), NOTHING)
