"""lm-evaluation-harness on local tasks: our class gives its numbers where nothing is changed, others where it is."""

import json
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
import torch
import yaml
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from personaspace.steer.config import SteerConfig
from personaspace.steer.harness import SteeredLM, check_tasks, compare_capability
from personaspace.store.errors import InputError
from personaspace.store.formats.torch_files import write_axis
from tests.models import tiny_checkpoint

TASKS = ("tiny_choice", "tiny_words")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, an axis, and two tasks: one scores choices, one generates."""
    place = tmp_path_factory.mktemp("harness")
    tiny_checkpoint(place / "model")
    write_axis(place / "axis.pt", np.random.default_rng(0).normal(size=(6, 32)).astype(np.float32))
    words = ["sea", "night", "stars", "river", "house", "ghost", "friend", "past"]
    rows = [
        {
            "question": f"What is {word}?",
            "choices": [word, words[(place_ + 3) % 8], "a plain thing"],
            "answer": place_ % 3,
        }
        for place_, word in enumerate(words)
    ]
    (place / "tasks").mkdir()
    (place / "tasks" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared: dict[str, Any] = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(place / "tasks" / "rows.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    choice = {"task": TASKS[0], "output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "answer"}
    choice["metric_list"] = [{"metric": "acc"}, {"metric": "acc_norm"}]  # type: ignore[assignment]
    said = {"task": TASKS[1], "output_type": "generate_until", "doc_to_target": "{{question}}"}
    said["generation_kwargs"] = {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False}  # type: ignore[assignment]
    said["metric_list"] = [{"metric": "exact_match"}, {"metric": "chrf"}]  # type: ignore[assignment]
    for task in (choice, said):
        (place / "tasks" / f"{task['task']}.yaml").write_text(yaml.safe_dump({**shared, **task}))
    return place


def evaluate(place: Path, lm: Any) -> dict[str, Any]:
    manager = local_tasks(place)
    results = lm_eval.simple_evaluate(lm, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)
    samples = {task: [sample["resps"] for sample in of] for task, of in results["samples"].items()}
    return {"results": results["results"], "samples": samples}


def local_tasks(place: Path) -> TaskManager:
    # The harness takes long to read its own thousands.
    return TaskManager(include_path=str(place / "tasks"), include_defaults=False)


def load(place: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(place / "model")


def test_nothing_changed_is_the_harness_own_class(place: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = load(place)
    theirs = evaluate(place, HFLM(model, tokenizer=tokenizer, device="cpu", batch_size=4))
    ours = evaluate(place, SteeredLM(model, tokenizer=tokenizer, device="cpu", batch_size=4))
    assert ours == theirs
    idle = SteeredLM(
        model,
        tokenizer=tokenizer,
        device="cpu",
        batch_size=4,
        steer_source=str(place / "axis.pt"),
        steer_threshold="-1e9",
        steer_layers="1-4",
    )
    assert evaluate(place, idle) == theirs, "a cap that nothing touches"
    idle.release()


def test_a_change_changes_every_kind_of_task_and_ends(place: Path) -> None:
    model, tokenizer = load(place)
    plain = evaluate(place, SteeredLM(model, tokenizer=tokenizer, device="cpu"))
    steer = {"steer_source": str(place / "axis.pt"), "steer_method": "add", "steer_unit": "residual"}
    lm = SteeredLM(model, tokenizer=tokenizer, device="cpu", steer_coefficient=40, steer_layers=3, **steer)
    pushed = evaluate(place, lm)
    lm.release()
    assert all(pushed["samples"][task] != plain["samples"][task] for task in TASKS)
    assert evaluate(place, SteeredLM(model, tokenizer=tokenizer, device="cpu")) == plain


def test_by_name_as_the_harness_command_does(place: Path) -> None:
    results = lm_eval.simple_evaluate(
        "personaspace",
        model_args=f"pretrained={place / 'model'},dtype=float32,steer_source={place / 'axis.pt'},steer_method=ablate",
        device="cpu",
        tasks=[TASKS[0]],
        task_manager=local_tasks(place),
        bootstrap_iters=0,
    )
    assert "acc,none" in results["results"][TASKS[0]]


@pytest.mark.slow
def test_both_side_by_side(place: Path) -> None:
    model, tokenizer = load(place)
    steer = SteerConfig(source=str(place / "axis.pt"), method="ablate")
    found = compare_capability(
        model, tokenizer, steer, TASKS, include_path=str(place / "tasks"), limit=4, bootstrap_iters=0
    )
    assert list(found) == ["plain", "steered"]
    assert all(set(of) == set(TASKS) for of in found.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steer_sauce": "x"}, "steer_sauce: unknown; there are steer_source, steer_method"),
        ({"steer_source": "axis.pt", "steer_method": "blast"}, "steer_method: Input should be 'add', 'ablate'"),
        ({"steer_coefficient": 1.0}, "steer.coefficient: has no effect without steer.source"),
        ({"steer_source": "axis.pt", "steer_method": "ablate", "steer_positions": "response"}, "Use all."),
    ],
)
def test_refusals(place: Path, arguments: dict[str, Any], message: str) -> None:
    model, tokenizer = load(place)
    if "steer_source" in arguments:
        arguments = {**arguments, "steer_source": str(place / arguments["steer_source"])}
    with pytest.raises(InputError, match=message):
        SteeredLM(model, tokenizer=tokenizer, device="cpu", **arguments)


@pytest.mark.slow
def test_unknown_tasks_are_named(place: Path) -> None:
    check_tasks(TASKS, place / "tasks")
    with pytest.raises(InputError, match="--tasks: tiny_chess is no task of the harness"):
        check_tasks(["tiny_chess"], place / "tasks")
