"""What responses say of themselves, by phrases that are kept as data in configs/quality."""

from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml
from numpy.typing import NDArray

_THOUGHT = r"(?s)^\s*(?:<think>.*?(?:</think>|$)|\[THINK\].*?(?:\[/THINK\]|$))\s*"


@dataclass(frozen=True, kw_only=True, slots=True)
class Phrase:
    """One way to say it."""

    pattern: str
    """RE2 regular expression, fragments filled in."""
    matches: tuple[str, ...]
    """Texts that it has to find."""
    spares: tuple[str, ...]
    """Texts that none of its flaw's phrases may find."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Phrases:
    """All ways to say one thing."""

    within: int | None
    """Characters from the beginning in which it has to be said; None: anywhere."""
    phrases: tuple[Phrase, ...]
    """The ways."""

    def find(self, said: pa.Array) -> NDArray[np.bool_]:
        """Which of the texts (of `said_aloud`) say it: ``(N,)``."""
        if self.within is not None:
            said = pc.utf8_slice_codeunits(said, 0, self.within)
        either = "|".join(f"(?:{phrase.pattern})" for phrase in self.phrases)
        found: NDArray[np.bool_] = pc.match_substring_regex(said, pattern=either, ignore_case=True).to_numpy(
            zero_copy_only=False
        )
        return found


def said_aloud(texts: pa.Array) -> pa.Array:
    """The texts without a leading thought, with straight apostrophes."""
    straight = pc.replace_substring_regex(texts, pattern="[\u2018\u2019\u02bc]", replacement="'")
    return pc.replace_substring_regex(straight, pattern=_THOUGHT, replacement="")


@cache
def load_phrases(file: str = "phrases.yaml") -> dict[str, Phrases]:
    """What a file of configs/quality knows phrases for: of phrases.yaml, `refused` and `broke_role`."""
    text = (resources.files("personaspace") / "configs" / "quality" / file).read_text(encoding="utf-8")
    document: dict[str, Any] = yaml.safe_load(text)
    # Folded lines of YAML join with a space, which would be part of the pattern.
    fragments = {name: text.replace(" |", "|") for name, text in document.pop("fragments").items()}

    def phrase(entry: dict[str, Any]) -> Phrase:
        pattern = entry["pattern"]
        for name, text in fragments.items():
            pattern = pattern.replace(f"{{{name}}}", text)
        return Phrase(pattern=pattern, matches=tuple(entry["matches"]), spares=tuple(entry["spares"]))

    return {
        name: Phrases(within=found["within"], phrases=tuple(map(phrase, found["phrases"])))
        for name, found in document.items()
    }
