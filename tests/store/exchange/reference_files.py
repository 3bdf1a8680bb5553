"""Output folders of the reference project, written as it writes them: by torch and json, not by the code under test."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from personaspace.store.exchange.import_run import import_assistant_axis
from personaspace.store.objects import Folder

LAYERS, HIDDEN = 5, 8
QUESTIONS = (5, 17, 40)
PROMPTS: Mapping[str, tuple[int, ...]] = {"default": (0, 1), "ghost": (1, 3), "poet": (0, 2)}
"""Role -> its prompt indices; each is asked every question: 6 responses of each role, 18 in all."""


def key(prompt: int, question: int, label: str = "pos") -> str:
    return f"{label}_p{prompt}_q{question}"


def response(role: str, prompt: int, question: int, /, **changes: Any) -> dict[str, Any]:
    system = f"You are {role}, {prompt}."
    return {
        "system_prompt": system,
        "prompt_index": prompt,
        "question_index": question,
        "question": f"Question {question}?",
        "conversation": [
            {"role": "system", "content": system},
            {"role": "user", "content": f"Question {question}?"},
            {"role": "assistant", "content": f"Answer of {role} to {prompt}, {question}."},
        ],
        "label": "pos",
    } | changes


def responses(role: str) -> list[dict[str, Any]]:
    return [response(role, prompt, question) for prompt in PROMPTS[role] for question in QUESTIONS]


def activations(role: str) -> dict[str, torch.Tensor]:
    """bfloat16, in the order of the responses."""
    noise = torch.Generator().manual_seed(list(PROMPTS).index(role))
    keys = [key(prompt, question) for prompt in PROMPTS[role] for question in QUESTIONS]
    return {name: torch.randn(LAYERS, HIDDEN, generator=noise).to(torch.bfloat16) for name in keys}


def scores(role: str) -> dict[str, int]:
    return {name: number % 4 for number, name in enumerate(activations(role))}


def write_role(folder: Path, role: str, lines: Sequence[Mapping[str, Any]], tensors: Any) -> None:
    for part in ("responses", "activations"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "responses" / f"{role}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    torch.save(tensors, folder / "activations" / f"{role}.pt")


def write_scores(folder: Path, role: str, entry: Mapping[str, int]) -> None:
    (folder / "scores").mkdir(parents=True, exist_ok=True)
    (folder / "scores" / f"{role}.json").write_text(json.dumps(entry, indent=2))


def write_output(folder: Path, roles: Sequence[str] = tuple(PROMPTS)) -> Path:
    """Responses, activations (those of `poet` in another order than its responses) and scores."""
    for role in roles:
        tensors = activations(role)
        ordered = dict(reversed(tensors.items())) if role == "poet" else tensors
        write_role(folder, role, responses(role), ordered)
        write_scores(folder, role, scores(role))
    return folder


def import_all(source: Path, folder: Folder, **changes: Any) -> None:
    """Import into units of four rows: the roles have six, so two units mix roles, and the last one is padded."""
    settings: dict[str, Any] = {"model": "org/model", "unit_rows": 4, "say": lambda _: None}
    import_assistant_axis(source, folder, **(settings | changes))
