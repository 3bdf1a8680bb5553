"""Loops: how much of a response it has said before, measured in words, whatever the tokenizer.

Shape suffixes: N responses, W words of all responses one after another.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

RUN_WORDS = 6
"""Words in a row that have to come again. Shorter runs are common in prose, longer ones miss loops that vary."""
LOOPING_SHARE = 0.2
"""From this share of repeated runs on, a response is looping. See docs/quality.md for what it rests on."""
LEAST_WORDS = 20
"""In fewer words a loop can't be told from a refrain."""
_NO_SPACES = r"([\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}])"
"""Scripts that write no spaces between words: each character counts as a word."""
_BETWEEN_WORDS = r"[^\p{L}\p{M}\p{N}]+"
_ODD = np.uint64(0x9E3779B97F4A7C15)


def repeated_share(texts: pa.Array) -> NDArray[np.float64]:
    """For each text the share of its runs of six words that stand earlier in it, too: ``(N,)``, 0 to 1.

    0 for texts of fewer than `LEAST_WORDS` words. Case and punctuation don't count, so that tables and ruled lines are
    not loops.
    """
    spaced = pc.replace_substring_regex(pc.utf8_lower(texts), pattern=_NO_SPACES, replacement=r" \1 ")
    split = pc.split_pattern_regex(spaced, pattern=_BETWEEN_WORDS)
    words, text_W = pc.list_flatten(split), pc.list_parent_indices(split)
    kept = pc.not_equal(words, "")
    code_W = words.filter(kept).dictionary_encode().indices.to_numpy().astype(np.uint64)
    return _share(code_W, text_W.filter(kept).to_numpy(), len(texts))


def _share(code_W: NDArray[np.uint64], text_W: NDArray[np.int64], texts: int) -> NDArray[np.float64]:
    """Repeated runs of words that are given by number, with the text of each."""
    runs = len(code_W) - RUN_WORDS + 1
    share_N = np.zeros(texts)
    if runs < 1:
        return share_N
    hash_W = np.zeros(runs, dtype=np.uint64)
    for place in range(RUN_WORDS):
        hash_W = _mix(hash_W + code_W[place : place + runs])
    inside_W = text_W[:runs] == text_W[RUN_WORDS - 1 :]
    of_text_W = text_W[:runs][inside_W]
    # Equal hashes count as equal runs: with 64 bits one response in 10^14 is misjudged.
    key_W = _mix(hash_W[inside_W] + of_text_W.astype(np.uint64) * _ODD)
    first = np.unique(key_W, return_index=True)[1]
    count_N = np.bincount(of_text_W, minlength=texts)
    distinct_N = np.bincount(of_text_W[first], minlength=texts)
    long_N = count_N >= LEAST_WORDS - RUN_WORDS + 1
    share_N[long_N] = 1 - distinct_N[long_N] / count_N[long_N]
    return share_N


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64: every bit of the result depends on every bit given."""
    x = x + _ODD
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
