"""JSON from files that others wrote: every way to be broken is one kind of error."""

import json
from collections import Counter
from typing import Any

from personaspace.store.errors import InputError


def parse_json(raw: bytes, refusal: str) -> Any:
    """The value of UTF-8 JSON. Raises InputError that begins with ``refusal``, also for a key that is given twice."""
    try:
        text = raw.decode("utf-8")
        found = json.loads(text, object_pairs_hook=_without_doubles)
        if "\\ud" in text.lower():
            # An escape for half of a character, as cutting texts leaves it, is no text: nothing could encode it again.
            json.dumps(found, ensure_ascii=False).encode("utf-8")
        return found
    except ValueError as error:
        raise InputError(f"{refusal}: {error}") from error
    except RecursionError as error:
        raise InputError(f"{refusal}: nested too deeply") from error


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"key {Counter(key for key, _ in pairs).most_common(1)[0][0]!r} is given twice")
    return found
