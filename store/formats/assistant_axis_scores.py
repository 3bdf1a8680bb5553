"""Keys and scores of the assistant-axis project: how well a judge thinks that a response plays its role.

One ROLE.json per role: {"pos_p0_q17": 3, ...}. 0: refuses; 1: says that it can't be the role, but helps; 2: shows some
of the role; 3: plays it fully. The same keys name the activations of a role.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from personaspace.store.errors import InputError
from personaspace.store.formats.files import replacing, require_file
from personaspace.store.formats.json_text import parse_json
from personaspace.store.formats.role_names import check_role_name, role_files

LABELS = ("pos", "neg", "default")
"""Polarity of the system prompt that a response answers to."""
_KEY = re.compile(r"(pos|neg|default)_p(0|[1-9][0-9]{0,8})_q(0|[1-9][0-9]{0,8})")


def response_key(label: str, prompt: int, question: int) -> str:
    """Key of a response within its role, such as `pos_p0_q17`. Raises InputError for a label or index it can't hold."""
    key = f"{label}_p{prompt}_q{question}"
    parse_key(key, "response")
    return key


def parse_key(key: str, where: str) -> tuple[str, int, int]:
    """(label, prompt, question) of a key. Raises InputError naming ``where``."""
    found = _KEY.fullmatch(key)
    if not found:
        raise InputError(
            f"{where}: key {key!r} is not of the form LABEL_pPROMPT_qQUESTION, such as `pos_p0_q17`, "
            f"with label {', '.join(LABELS)} and indices from 0 up."
        )
    return found[1], int(found[2]), int(found[3])


def read_scores(file: Path) -> dict[str, int]:
    """Scores of one role by key, in file order. Raises InputError naming file and key."""
    entry = parse_json(require_file(file).read_bytes(), f"{file}: not valid JSON")
    if not isinstance(entry, dict):
        raise InputError(f'{file}: holds a JSON {type(entry).__name__}; expected {{"pos_p0_q17": 3, ...}}.')
    return _checked(entry, str(file))


def iter_scores(folder: Path) -> Iterator[tuple[str, dict[str, int]]]:
    """(role, scores by key) of every ROLE.json in ``folder``, one role at a time, by name of the role."""
    for role, file in role_files(folder, ".json"):
        yield role, read_scores(file)


def write_scores(folder: Path, role: str, scores: Mapping[str, int], *, overwrite: bool = False) -> Path:
    """Writes FOLDER/ROLE.json; returns the file. Raises InputError for a key or score that the format can't hold."""
    file = folder / f"{check_role_name(role, str(folder))}.json"
    text = json.dumps(_checked(scores, str(file)), indent=2)
    with replacing(file, overwrite=overwrite) as temporary:
        temporary.write_text(text + "\n", encoding="ascii")
    return file


def _checked(scores: Mapping[str, object], where: str) -> dict[str, int]:
    checked: dict[str, int] = {}
    for key, score in scores.items():
        parse_key(key, where)
        if not isinstance(score, int) or isinstance(score, bool) or not 0 <= score <= 3:
            raise InputError(f"{where}: score of {key} is {score!r}; it must be 0, 1, 2 or 3.")
        checked[key] = score
    return checked
