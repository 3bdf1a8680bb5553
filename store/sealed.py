"""JSON documents that carry their own checksum: every flipped bit of a manifest, lease or record is found.

The last field of a sealed document is ``"sha256"``: SHA-256 over the bytes of the whole document in which the 64
digits of that field are zeros.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from personaspace.store.errors import IntegrityError

_EMPTY = b"0" * 64
_FIELD = b'"sha256": "'


def seal(document: Mapping[str, Any]) -> bytes:
    """Bytes of the document, with its checksum."""
    draft = (json.dumps({**document, "sha256": _EMPTY.decode()}, indent=1) + "\n").encode()
    start = draft.rindex(_FIELD) + len(_FIELD)
    return draft[:start] + hashlib.sha256(draft).hexdigest().encode() + draft[start + 64 :]


def unseal(data: bytes, where: str) -> dict[str, Any]:
    """The document without its checksum. Raises IntegrityError if it was damaged or edited."""
    start = data.rfind(_FIELD) + len(_FIELD)
    if (
        start < len(_FIELD)
        or hashlib.sha256(data[:start] + _EMPTY + data[start + 64 :]).hexdigest().encode() != (data[start : start + 64])
    ):
        raise IntegrityError(
            f"{where}: {len(data)} bytes that don't match their own checksum: damaged, or edited by hand. "
            "`personaspace store verify` shows all damage, `personaspace store repair` mends it."
        )
    document: dict[str, Any] = json.loads(data)
    del document["sha256"]
    return document
