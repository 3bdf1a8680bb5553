"""``run.json``: what a run is (identity, hashed), what it holds (grows), and how it was carried out (free to change).

It can't be computed again from anything else, so a copy lies beside it.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from personaspace.store.commit import publish
from personaspace.store.errors import IdentityError, InputError, IntegrityError, LeaseError
from personaspace.store.layout import Layout
from personaspace.store.lease import Fence
from personaspace.store.objects import Folder
from personaspace.store.records import StoredObject
from personaspace.store.schema import ArraySpec
from personaspace.store.sealed import seal, unseal

MANIFEST = "run.json"
MANIFEST_COPY = "run.copy.json"
SCHEMA_VERSION = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Content of ``run.json``."""

    identity: Mapping[str, Any]
    """All that decides the numbers of a rollout: model, generation, extraction, layout, precision. Never changes."""
    layout: Layout
    """Grows by segments."""
    arrays: tuple[ArraySpec, ...]
    """Arrays of activations. Grows."""
    spans_per_rollout: int = 0
    """Places for spans of each rollout in the arrays of the group `spans`; 0 where there is none."""
    tables: Mapping[str, list[Mapping[str, Any]]]
    """`roles` and `questions` with their permanent ids; coordinates are indices into them. Grows at the ends."""
    plan: tuple[StoredObject, ...]
    """The Parquet file of each segment's planned rollouts."""
    unit_order: tuple[int, ...]
    """Units in the order of work."""
    metadata: tuple[StoredObject, ...] = ()
    """The objects of the Zarr group that are no data: `zarr.json` of all arrays, and `layer`."""
    execution: Mapping[str, Any]
    """How the latest session runs: its whole config. May differ between resumes."""
    sessions: tuple[Mapping[str, Any], ...] = ()
    """One entry a driver: epoch, user, host, start, package versions, git commit."""
    frozen: Mapping[str, Any] | None = None
    """`content_hash`, `at` (ISO 8601, UTC) and `by`, once nothing may be added or changed any more."""

    @property
    def identity_hash(self) -> str:
        canonical = json.dumps(self.identity, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    @property
    def last_epoch(self) -> int:
        """Highest lease epoch of all sessions."""
        return max((int(session["epoch"]) for session in self.sessions), default=0)

    def encode(self) -> bytes:
        head = {
            "schema_version": SCHEMA_VERSION,
            "identity_hash": self.identity_hash,
            "catalogue_hash": catalogue_hash(self.tables),
        }
        return seal({**head, **asdict(self)})

    @classmethod
    def decode(cls, data: bytes, where: str) -> "Manifest":
        """Raises IntegrityError if the bytes are damaged, edited, or of another version."""
        try:
            version = json.loads(data)["schema_version"]
        except (ValueError, TypeError, KeyError) as error:
            raise IntegrityError(
                f"{where}: not a run manifest ({error!r}). `personaspace store repair` restores it from its copy."
            ) from error
        if version != SCHEMA_VERSION:
            raise IntegrityError(f"{where}: schema_version {version} is not readable, this is {SCHEMA_VERSION}.")
        raw = unseal(data, where)
        try:
            del raw["schema_version"]
            stored_hash = raw.pop("identity_hash")
            raw.pop("catalogue_hash", None)
            layout = {**raw["layout"], "segments": tuple(raw["layout"]["segments"])}
            arrays = [
                {**a, "layers": None if a["layers"] is None else tuple(a["layers"]), "spans": tuple(a["spans"])}
                for a in raw["arrays"]
            ]
            manifest = cls(
                **{
                    **raw,
                    "layout": Layout(**layout),
                    "arrays": tuple(ArraySpec(**array) for array in arrays),
                    "plan": tuple(StoredObject(**stored) for stored in raw["plan"]),
                    "unit_order": tuple(raw["unit_order"]),
                    "metadata": tuple(StoredObject(**stored) for stored in raw["metadata"]),
                    "sessions": tuple(raw["sessions"]),
                }
            )
        except (ValueError, TypeError, KeyError) as error:
            raise IntegrityError(f"{where}: not a run manifest ({error!r}).") from error
        if manifest.identity_hash != stored_hash:
            raise IntegrityError(f"{where}: identity_hash {stored_hash} does not match the identity.")
        return manifest


def catalogue_hash(tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """16 hex digits of a hash over all that roles and questions say; their order makes no difference."""
    entries = sorted(json.dumps(entry, sort_keys=True) for table in tables.values() for entry in table)
    return hashlib.sha256("\n".join(entries).encode()).hexdigest()[:16]


def read_manifest(folder: Folder, key: str = MANIFEST) -> Manifest | None:
    """The run's manifest, or None where there is no run."""
    try:
        return Manifest.decode(folder.get(key), f"{folder.url}/{key}")
    except FileNotFoundError:
        return None


def require_manifest(folder: Folder) -> Manifest:
    """The run's manifest. Raises InputError where there is no run."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise InputError(f"{folder.url}: no run here (no run.json). Give the folder of a run, such as runs/demo.")
    return manifest


def refuse_frozen(folder: Folder, manifest: Manifest | None) -> None:
    """Raise InputError if the run is frozen."""
    if manifest is not None and manifest.frozen is not None:
        raise InputError(
            f"{folder.url}: the run is frozen as {manifest.frozen['content_hash']}; nothing can be added or changed. "
            "Work on a copy: `personaspace store cp RUN NEW_RUN`, which is not frozen."
        )


def write_manifest(fence: Fence, before: Manifest | None, after: Manifest) -> None:
    """Replace ``run.json`` and then its copy. Raises LeaseError if it is no longer ``before``."""
    fence.check()
    data = after.encode()
    where = f"{fence.folder.url}/{MANIFEST}"
    try:
        stored: bytes | None = fence.folder.get(MANIFEST)
    except FileNotFoundError:
        stored = None
    unchanged = before == (None if stored is None else Manifest.decode(stored, where))
    if not unchanged or not fence.folder.compare_and_swap(MANIFEST, stored, data):
        raise LeaseError(f"{where}: was changed by another driver; start again.")
    publish(fence, MANIFEST_COPY, data)


def check_identity(folder: Folder, existing: Manifest, planned: Mapping[str, Any]) -> None:
    """Raise IdentityError with a diff if the run has another identity than the planned one."""
    lines = "\n".join(f"  {line}" for line in identity_diff(existing.identity, planned))
    if lines:
        raise IdentityError(
            f"{folder.url}: this run exists with another identity. Stored -> asked for:\n{lines}\n"
            "Use another --store.run for the new settings, or the stored settings to resume. Nothing was changed."
        )


def identity_diff(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Lines ``key: stored -> asked`` for every leaf that differs."""
    return [f"{key}: {before} -> {after}" for key, before, after in identity_changes(stored, asked)]


def identity_changes(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(key, value in ``stored``, value in ``asked``) of every leaf that differs; values as JSON, or `(absent)`."""
    flat_stored, flat_asked = dict(_leaves(stored)), dict(_leaves(asked))
    changes = []
    for key in sorted(flat_stored.keys() | flat_asked.keys()):
        # Compared as JSON, since that is what the hash sees: 1 and 1.0 differ.
        before, after = (json.dumps(flat[key]) if key in flat else "(absent)" for flat in (flat_stored, flat_asked))
        if before != after:
            changes.append((key, before, after))
    return changes


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
