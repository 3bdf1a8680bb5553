"""Which rollouts have which flaw: pure functions over a table of stored rollouts.

Shape suffixes: N rollouts of the table, S spans of all of them, R roles.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from personaspace.analysis.quality.phrases import load_phrases, said_aloud
from personaspace.analysis.quality.repetition import LOOPING_SHARE, repeated_share

COLUMNS = ["row", "role_id", "prompt", "question", "messages", "response", "spans", "finish_reason"]
"""Columns of the rollouts that are looked at."""
QUARANTINED = "quarantined"
"""Finish reason of a rollout that nobody sampled."""
_SCRIPTS = (
    *(
        rf"\p{{{name}}}"
        for name in (
            "Latin", "Cyrillic", "Greek", "Arabic", "Hebrew", "Devanagari", "Bengali", "Tamil", "Thai", "Hangul",
            "Armenian", "Georgian", "Ethiopic", "Khmer", "Telugu", "Gujarati", "Kannada", "Malayalam", "Sinhala",
        )
    ),
    # Japanese mixes these, so they count as one.
    r"[\p{Han}\p{Hiragana}\p{Katakana}]",
)  # fmt: skip
_BEYOND_LATIN = r"[^\x00-\x{24F}\x{1E00}-\x{1EFF}\x{2000}-\x{206F}]"


def detect(rollouts: pa.Table, plays_role_R: NDArray[np.bool_]) -> dict[str, NDArray[np.bool_]]:
    """Flaws that a rollout shows by itself, each ``(N,)``; `duplicate` takes all of them: see `repeats`.

    ``rollouts`` has `COLUMNS`. ``plays_role_R`` says of each role id whether to speak as an AI is a flaw.
    """
    responses, messages, spans, finish_reasons = (
        rollouts[name].combine_chunks() for name in ("response", "messages", "spans", "finish_reason")
    )
    empty = pc.equal(pc.utf8_trim_whitespace(responses), "").to_numpy(zero_copy_only=False)
    said = said_aloud(responses)
    phrases = load_phrases()
    return {
        "empty": empty,
        "truncated": pc.equal(finish_reasons, "length").to_numpy(zero_copy_only=False),
        "only_thought": _only_thought(spans),
        "looping": repeated_share(responses) >= LOOPING_SHARE,
        "refused": phrases["refused"].find(said),
        "broke_role": phrases["broke_role"].find(said) & plays_role_R[rollouts["role_id"].to_numpy()],
        "other_script": _other_script(responses, messages),
    }


def fingerprints(responses: Sequence[str]) -> NDArray[np.uint64]:
    """64 bits of each response, without white space around it; 0 for an empty one."""
    stripped = (response.strip().encode("utf-8", "replace") for response in responses)
    made = (hashlib.blake2b(text, digest_size=8).digest() if text else bytes(8) for text in stripped)
    return np.frombuffer(b"".join(made), dtype=np.uint64)


def repeats(fingerprint_N: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which responses an earlier rollout has given, too. Empty ones are none: they are `empty`."""
    again_N = np.ones(len(fingerprint_N), dtype=bool)
    again_N[np.unique(fingerprint_N, return_index=True)[1]] = False
    again_N &= fingerprint_N != 0
    return again_N


def _only_thought(spans: pa.Array) -> NDArray[np.bool_]:
    """Rollouts whose last turn has a thought and no answer."""
    flat, rollout_S = pc.list_flatten(spans), pc.list_parent_indices(spans).to_numpy()
    turn_S = pc.struct_field(flat, "turn").to_numpy()
    last_N = np.full(len(spans), -1)
    np.maximum.at(last_N, rollout_S, turn_S)

    def has(part: str) -> NDArray[np.bool_]:
        is_part_S = pc.equal(pc.struct_field(flat, "part"), part).to_numpy(zero_copy_only=False)
        there_N = np.zeros(len(spans), dtype=bool)
        there_N[rollout_S[is_part_S & (turn_S == last_N[rollout_S])]] = True
        return there_N

    return has("think") & ~has("answer")


def _other_script(responses: pa.Array, messages: pa.Array) -> NDArray[np.bool_]:
    """Responses most letters of which are of scripts that the conversation before does not use."""
    found_N = np.zeros(len(responses), dtype=bool)
    # Nearly all conversations are Latin throughout; only the others are worth a closer look.
    turns = pc.struct_field(pc.list_flatten(messages), "content")
    candidate_N = _contains(responses, _BEYOND_LATIN)
    candidate_N[pc.list_parent_indices(messages).to_numpy()[_contains(turns, _BEYOND_LATIN)]] = True
    rows = np.flatnonzero(candidate_N)
    if not len(rows):
        return found_N
    said = responses.take(pa.array(rows))
    before = messages.take(pa.array(rows)).to_pylist()
    heard = pa.array([" ".join(turn["content"] for turn in turns) for turns in before], type=pa.string())
    letters = pc.count_substring_regex(said, pattern=r"\p{L}").to_numpy()
    unused = np.zeros(len(rows), dtype=np.int64)
    for script in _SCRIPTS:
        counted = pc.count_substring_regex(said, pattern=script).to_numpy()
        unused += np.where(_contains(heard, script), 0, counted)
    found_N[rows] = 2 * unused > np.maximum(letters, 1)
    return found_N


def _contains(texts: pa.Array, pattern: str) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = pc.match_substring_regex(texts, pattern=pattern).to_numpy(zero_copy_only=False)
    return found.copy()
