"""The built-in scenarios, a team's own, and what is said of files that can't be used."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from personaspace.extract.catalogue_check import find_faults
from personaspace.extract.catalogue_files import DOMAINS
from personaspace.extract.config import AuditorConfig, EndpointConfig, PersonasConfig
from personaspace.extract.personas import PersonaPlan, plan_personas
from personaspace.extract.scenarios import holds_scenarios, load_scenarios, player_messages
from personaspace.store.errors import InputError

ONE = {"id": "sea.one", "domain": "sea", "topic": "The sea.", "user": "You are Ann.", "turns": ["Who?", "Why?"]}


def write(file: Path, *entries: Any, **document: Any) -> str:
    file.write_text(yaml.safe_dump({"version": 1, "scenarios": list(entries), **document}))
    return str(file)


def plan(source: str, **personas: Any) -> PersonaPlan:
    config = PersonasConfig(**{"roles": (), "scenarios": (source,), "turns": 2, **personas})
    return plan_personas(config, model_name="Llama", generation="g")


def test_the_built_in_scenarios_are_complete_and_all_different() -> None:
    scenarios = load_scenarios(["builtin"])
    assert Counter(scenario.domain for scenario in scenarios) == dict.fromkeys(DOMAINS, 10)
    assert all(scenario.id.startswith(f"{scenario.domain}.") for scenario in scenarios)
    assert all(6 <= len(scenario.turns) <= 10 and scenario.user.startswith("You are ") for scenario in scenarios)
    assert find_faults([], [], scenarios) == []
    assert len(plan("builtin", turns=8).rows) == 40


def test_only_some_scenarios_or_domains() -> None:
    chosen = plan("builtin", only_scenarios=("therapy", "coding.game_physics"), samples=3)
    assert [role.id for role in chosen.roles] == ["scenario.coding", "scenario.therapy"]
    assert [question.id for question in chosen.questions][:2] == ["coding.game_physics", "therapy.new_city"]
    assert chosen.rows_per_role() == [3, 30]
    with pytest.raises(InputError, match=r"personas\.only_scenarios: 'theraphy' is no scenario and no domain\."):
        plan("builtin", only_scenarios=("theraphy",))


def test_ids_hang_on_all_that_decides_a_conversation_and_on_nothing_else(tmp_path: Path) -> None:
    other = {**ONE, "id": "sea.two", "turns": ["When?", "Where?"]}
    source = write(tmp_path / "sea.yaml", ONE, other)
    ids = [row.rollout_id for row in plan(source).rows]
    assert [row.rollout_id for row in plan(write(tmp_path / "other.yaml", other, ONE)).rows] == ids[::-1]
    by_model = AuditorConfig(played_by="model")
    by_endpoint = AuditorConfig(played_by="endpoint", endpoint=EndpointConfig(model="eve"))
    variants: list[dict[str, Any]] = [
        {"turns": 1},
        {"auditor": by_model},
        {"auditor": replace(by_model, temperature=0.1)},
        {"auditor": by_endpoint},
        {"auditor": replace(by_endpoint, endpoint=EndpointConfig(model="adam"))},
        {"auditor": replace(by_endpoint, max_tokens=9)},
    ]
    firsts = [ids[0], *(plan(source, **variant).rows[0].rollout_id for variant in variants)]
    assert len(set(firsts)) == len(firsts)
    there = EndpointConfig(
        model="eve", base_url="http://there/v1", api_key_env="OTHER", concurrency=1, timeout=1.0, retries=0
    )
    assert plan(source, auditor=replace(by_endpoint, endpoint=there)).rows[0].rollout_id == firsts[4]
    sampled = plan(source, samples=2)
    assert [row.rollout_id for row in sampled.rows][::2] == ids
    assert len({row.rollout_id for row in sampled.rows}) == 4
    changed = write(tmp_path / "changed.yaml", {**ONE, "turns": ["Who?", "Why not?"]})
    assert plan(changed).rows[0].rollout_id != ids[0]
    # What is played does not rest on the script behind its opening.
    assert plan(changed, auditor=by_model).rows[0].rollout_id == plan(source, auditor=by_model).rows[0].rollout_id


def test_system_prompts_are_the_prompts_of_their_domain(tmp_path: Path) -> None:
    named = {**ONE, "id": "sea.two", "system": "You are {model_name}."}
    planned = plan(write(tmp_path / "sea.yaml", ONE, named, {**named, "id": "sea.three"}))
    assert planned.roles[0].prompts == ("", "You are {model_name}.")
    assert [row.prompt for row in planned.rows] == [0, 1, 1]
    assert planned.rows[1].messages[0] == {"role": "system", "content": "You are Llama."}
    assert [row.turns for row in planned.rows] == [2, 2, 2]


def test_the_player_sees_itself_as_the_one_who_answers() -> None:
    messages = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user", "assistant")]
    seen = player_messages("You are Ann.", messages)
    assert [turn["role"] for turn in seen] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert [turn["content"] for turn in seen[2:]] == ["user", "assistant", "user", "assistant"]
    assert "You are Ann." in seen[0]["content"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"turns": []}, "scenarios[0].turns is []; give a list of at least one text."),
        ({"turns": ["Who?", " "]}, "scenarios[0].turns[1] is empty; the user has to say something in every turn."),
        ({"turns": ["Who?", 7]}, "scenarios[0].turns is ['Who?', 7]; give a list of at least one text."),
        ({"topic": None}, "scenarios[0].topic is None; expected a text."),
        ({"domain": ""}, "scenarios[0]: has no `domain`; give it one, or one to the whole file."),
        ({"domain": "the sea"}, "scenarios[0].domain: role name 'the sea' can't be a file name"),
        ({"id": "../sea"}, "scenarios[0]: role name '../sea' can't be a file name"),
        ({"users": "Ann"}, "it needs ['id', 'topic', 'turns'], and may have ['domain', 'system', 'user']."),
    ],
)
def test_bad_entries_are_named(tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    source = write(tmp_path / "sea.yaml", {**ONE, **entry})
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        load_scenarios([source])
    assert str(caught.value).startswith(f"{source}: scenarios[0]")


def test_bad_files_are_named(tmp_path: Path) -> None:
    ways = "`builtin`, a YAML file, a folder of YAML files, or a JSONL file."
    with pytest.raises(InputError, match=rf"^personas\.scenarios: nowhere\.yaml does not exist; give {ways}$"):
        load_scenarios(["nowhere.yaml"])
    roles = tmp_path / "roles.yaml"
    roles.write_text("roles: []\n")
    with pytest.raises(InputError, match=r"roles\.yaml has no list under `scenarios:`\.$"):
        load_scenarios([str(roles)])
    assert not holds_scenarios(str(roles))
    source = write(tmp_path / "sea.yaml", ONE)
    assert holds_scenarios(source)
    with pytest.raises(InputError, match=r"personas\.scenarios: id sea\.one appears more than once, in .*sea\.yaml"):
        load_scenarios([source, source])


def test_settings_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "sea.yaml", {**ONE, "user": ""})
    with pytest.raises(InputError, match=r"personas\.turns: 3, but scenario 'sea\.one' has 2 turns of its user"):
        plan(source, turns=3)
    with pytest.raises(InputError, match=r"scenario 'sea\.one' does not say who its user is, and personas\.auditor"):
        plan(source, auditor=AuditorConfig(played_by="model"))
    with pytest.raises(InputError, match=r"personas\.auditor\.endpoint\.model: is missing; name the model that plays"):
        plan(source, auditor=AuditorConfig(played_by="endpoint"))
    roles = tmp_path / "roles.yaml"
    entries = [{"id": name, "kind": "scenario", "prompts": ["Be."]} for name in ("default", "ghost")]
    roles.write_text(yaml.safe_dump({"version": 1, "roles": entries}))
    with pytest.raises(InputError, match="role 'default' has the kind 'scenario', which is kept for conversations"):
        plan(source, roles=(str(roles),))
    questions = tmp_path / "questions.yaml"
    questions.write_text(yaml.safe_dump({"version": 1, "questions": [{"id": "sea.one", "text": "Who?"}]}))
    with pytest.raises(InputError, match=r"personas\.scenarios: 'sea\.one' is also the id of a question"):
        plan(source, roles=("builtin",), questions=(str(questions),))


def test_personas_that_the_model_is_talked_into() -> None:
    scenarios = load_scenarios(["adoption"])
    assert len(scenarios) == 20
    assert {scenario.domain for scenario in scenarios} == {"adoption"}
    assert all(scenario.system and len(scenario.turns) == 3 for scenario in scenarios)
    assert len({scenario.system for scenario in scenarios}) == 20
    assert len(plan("adoption", turns=3).rows) == 20


def test_drift_has_ten_turns() -> None:
    assert len(plan("builtin", only_scenarios=("therapy", "philosophy"), turns=10).rows) == 20


def test_prompts_of_a_jsonl_file(tmp_path: Path) -> None:
    file = tmp_path / "attacks.jsonl"
    file.write_text(
        '{"category": "Tax Fraud", "system": "You are Eve.", "prompt": "Say hi."}\n\n'
        '{"turns": ["One?", "Two?"], "id": "mine"}\n'
    )
    first, second = load_scenarios([str(file)])
    assert (first.id, first.domain, first.system) == ("attacks.00001", "tax_fraud", "You are Eve.")
    assert (first.topic, first.turns) == ("Say hi.", ("Say hi.",))
    assert (second.id, second.domain, second.turns) == ("mine", "attacks", ("One?", "Two?"))
    assert len(plan(str(file), turns=1).rows) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"system": "a"}', r"attacks\.jsonl:1: needs either `prompt`, a text, or `turns`, .*; it has \['system'\]"),
        ('{"prompt": "a", "turns": ["b"]}', r"needs either `prompt`"),
        ('{"prompt": 3}', r"attacks\.jsonl:1\.turns is \[3\]"),
        ('{"prompt": "a", "answer": "b"}', r"attacks\.jsonl:1 has \["),
        ("[1]", r"it has \[1\]"),
        ("{", r"attacks\.jsonl:1: not valid JSON"),
        ('{"prompt": " "}', r"turns\[0\] is empty"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "attacks.jsonl").write_text(line)
    with pytest.raises(InputError, match=message):
        load_scenarios([str(tmp_path / "attacks.jsonl")])
