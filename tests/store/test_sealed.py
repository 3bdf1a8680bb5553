"""Sealed documents: every flipped bit, cut or edit is found."""

import hashlib
import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from personaspace.store.errors import IntegrityError
from personaspace.store.sealed import seal, unseal

SMALL = {"epoch": 3, "host": "a", "objects": [{"key": "k", "sha256": "0" * 64}], "text": 'say "sha256": "x"'}
KEYS = st.text(max_size=5).filter(lambda key: key != "sha256")
TREES = st.dictionaries(
    KEYS,
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.just("sha256"), inner, max_size=3),
        max_leaves=6,
    ),
    max_size=4,
)


@given(TREES)
@settings(deadline=None)
def test_round_trip(document: dict[str, Any]) -> None:
    data = seal(document)
    assert unseal(data, "here") == document
    assert seal(unseal(data, "here")) == data
    assert list(json.loads(data)) == [*document, "sha256"]


def test_every_flipped_bit_is_found() -> None:
    data = seal(SMALL)
    for bit in range(len(data) * 8):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(IntegrityError, match="don't match their own checksum"):
            unseal(bytes(damaged), "here")


@given(TREES, st.data())
@settings(max_examples=200, deadline=None)
def test_any_damage_is_found(document: dict[str, Any], data: st.DataObject) -> None:
    sealed = seal(document)
    start = data.draw(st.integers(0, len(sealed)))
    stop = data.draw(st.integers(start, len(sealed)))
    damaged = sealed[:start] + data.draw(st.binary(max_size=8)) + sealed[stop:]
    if damaged != sealed:
        with pytest.raises(IntegrityError, match="don't match their own checksum"):
            unseal(damaged, "here")


def test_every_cut_is_found() -> None:
    data = seal(SMALL)
    for damaged in (*(data[:length] for length in range(len(data))), data + b"\n", data * 2):
        with pytest.raises(IntegrityError, match="don't match their own checksum"):
            unseal(damaged, "here")


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b"\xff\xfe", b'{"sha256": "', b"0" * 64])
def test_what_is_not_sealed_is_one_clear_error(content: bytes) -> None:
    message = (
        f"runs/demo/run.json: {len(content)} bytes that don't match their own checksum: damaged, or edited by hand. "
        "`personaspace store verify` shows all damage, `personaspace store repair` mends it."
    )
    with pytest.raises(IntegrityError, match=f"^{re.escape(message)}$") as error:
        unseal(content, "runs/demo/run.json")
    assert error.value.exit_code == 4


def test_the_checksum_can_be_computed_by_anybody() -> None:
    """SHA-256 of the document with zeros in place of its digits."""
    data = seal(SMALL)
    digits = json.loads(data)["sha256"]
    assert data.count(digits.encode()) == 1
    assert hashlib.sha256(data.replace(digits.encode(), b"0" * 64)).hexdigest() == digits
