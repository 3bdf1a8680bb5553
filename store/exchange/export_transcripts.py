"""Conversations of several turns as transcript files of the reference project: one JSON for each."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from personaspace.store.errors import InputError
from personaspace.store.formats.directions import some
from personaspace.store.formats.files import replacing_parts
from personaspace.store.formats.role_names import SCENARIO
from personaspace.store.formats.transcripts import SCRIPTED
from personaspace.store.manifest import Manifest
from personaspace.store.objects import Folder
from personaspace.store.records import ROLLOUTS, committed_slots
from personaspace.store.rollouts import read_rollouts

COLUMNS = ["rollout_id", "role", "role_id", "question", "sample", "messages", "response", "sampling", "dropped"]


def write_transcripts(
    folder: Folder,
    manifest: Manifest,
    destination: Path,
    *,
    roles: Sequence[str],
    sample: int | None,
    overwrite: bool,
    say: Callable[[str], None],
) -> None:
    """Write DOMAIN/CONVERSATION.json for each conversation that is generated and not dropped.

    The files have the reference's keys (model, auditor_model, domain, persona, topic, turns, conversation, ...), and
    ours besides: scenario, sample, rollout_id. ``turns`` counts the messages of both sides. A system prompt is the
    conversation's first message. Raises InputError if there are none, or none of ``roles``.
    """
    table: list[Any] = list(manifest.tables["roles"])
    domains = {number: str(role["id"]) for number, role in enumerate(table) if role.get("kind") == SCENARIO}
    unknown = [role for role in roles if role not in domains.values()]
    if unknown or not domains:
        has = f"it has those of {some(domains.values())}" if domains else "it has none"
        raise InputError(
            f"{folder.url}: no conversations of several turns{f' of {unknown[0]!r}' if unknown else ''}; {has}."
        )
    chosen = {number for number, name in domains.items() if not roles or name in roles}
    written = dropped = 0
    with replacing_parts(
        destination, [_part(domains[number]) for number in sorted(chosen)], overwrite=overwrite
    ) as new:
        for unit in sorted(unit for array, unit, _ in committed_slots(folder) if array == ROLLOUTS):
            for entry in read_rollouts(folder, [unit], COLUMNS).to_pylist():
                if entry["role_id"] not in chosen or sample not in (None, entry["sample"]):
                    continue
                if entry["dropped"] is not None:
                    dropped += 1
                    continue
                transcript = _transcript(entry, manifest)
                file = new / _part(entry["role"]) / f"{transcript['conversation_id']}.json"
                file.parent.mkdir(exist_ok=True)
                file.write_text(json.dumps(transcript, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
                written += 1
        if not written:
            raise InputError(
                f"{folder.url}: no usable conversations: {dropped} are dropped, the others not generated yet. Generate "
                "first, or choose others."
            )
    say(f"{folder.url}: {written} conversations; left out: {dropped} dropped")


def _transcript(entry: Mapping[str, Any], manifest: Manifest) -> dict[str, Any]:
    question: Any = manifest.tables["questions"][entry["question"]]
    told = json.loads(entry["sampling"])
    # An imported conversation is not the run's model's.
    model = told.get("written_by") or str(manifest.identity["model"]["name"])
    user = told.get("user", {})
    auditor = {"script": SCRIPTED, "model": model}.get(user.get("played_by", "script"), user.get("model", ""))
    conversation = [
        *({"role": turn["role"], "content": turn["content"]} for turn in entry["messages"]),
        {"role": "assistant", "content": entry["response"]},
    ]
    return {
        "model": model,
        "auditor_model": auditor,
        "domain": question["category"],
        "persona_id": entry["question"],
        "persona": user.get("persona", ""),
        "topic_id": entry["question"],
        "topic": question["text"],
        "turns": sum(turn["role"] != "system" for turn in conversation),
        "conversation": conversation,
        "conversation_id": f"{question['id']}_s{entry['sample']}_{entry['rollout_id']}",
        "scenario": question["id"],
        "sample": entry["sample"],
        "rollout_id": entry["rollout_id"],
    }


def _part(role: str) -> str:
    """Folder of a domain's transcripts."""
    return role.removeprefix(f"{SCENARIO}.")
