"""``run.json``: what a run is (identity, hashed), and how it was carried out (execution, free to change)."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from personaspace.store.errors import IdentityError, InputError, IntegrityError
from personaspace.store.layout import Layout
from personaspace.store.objects import LocalFolder

MANIFEST = "run.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Content of ``run.json``."""

    schema_version: int = SCHEMA_VERSION
    identity: Mapping[str, Any]
    """All that decides the numbers: model, personas, generation, extraction, layout, precision."""
    layout: Layout
    tables: Mapping[str, list[Mapping[str, Any]]]
    """`roles` and `questions` with their permanent ids; coordinates are indices into them."""
    plan: Mapping[str, Any]
    """Rows per role, and the order in which units are worked on."""
    execution: Mapping[str, Any]
    """How the latest session runs: cluster, analysis, full model path. May differ between resumes."""
    sessions: list[Mapping[str, Any]] = field(default_factory=list)
    """One entry a driver: epoch, host, start, package versions, git commit."""

    @property
    def identity_hash(self) -> str:
        canonical = json.dumps(self.identity, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def encode(self) -> bytes:
        return (json.dumps({**asdict(self), "identity_hash": self.identity_hash}, indent=1) + "\n").encode()

    @classmethod
    def decode(cls, data: bytes, where: str) -> "Manifest":
        try:
            raw = json.loads(data)
            version = raw["schema_version"]
            if version != SCHEMA_VERSION:
                raise IntegrityError(f"{where}: schema_version {version} is not readable, this is {SCHEMA_VERSION}.")
            stored_hash = raw.pop("identity_hash")
            manifest = cls(**{**raw, "layout": Layout(**raw["layout"])})
        except (ValueError, TypeError, KeyError) as error:
            raise IntegrityError(f"{where}: not a run manifest ({error!r}).") from error
        if manifest.identity_hash != stored_hash:
            raise IntegrityError(f"{where}: identity_hash {stored_hash} does not match the identity; file was edited.")
        return manifest


def read_manifest(folder: LocalFolder) -> Manifest | None:
    """The run's manifest, or None where there is no run."""
    try:
        return Manifest.decode(folder.get(MANIFEST), str(folder.path / MANIFEST))
    except FileNotFoundError:
        return None


def require_manifest(folder: LocalFolder) -> Manifest:
    """The run's manifest. Raises InputError where there is no run."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise InputError(f"{folder.path}: no run here (no run.json). Give the folder of a run, such as runs/demo.")
    return manifest


def check_identity(folder: LocalFolder, planned: Manifest) -> Manifest | None:
    """The existing manifest if it has the planned identity; None if there is no run; else IdentityError with a diff."""
    existing = read_manifest(folder)
    if existing is None or existing.identity_hash == planned.identity_hash:
        return existing
    lines = "\n".join(f"  {line}" for line in identity_diff(existing.identity, planned.identity))
    raise IdentityError(
        f"{folder.path}: this run exists with another identity. Stored -> asked for:\n{lines}\n"
        "Use another --store.run for the new settings, or the stored settings to resume. Nothing was changed."
    )


def write_session(folder: LocalFolder, manifest: Manifest, planned: Manifest, session: Mapping[str, Any]) -> None:
    """Note a new session and its execution half in ``run.json``. Only the lease holder calls this."""
    updated = replace(manifest, execution=planned.execution, sessions=[*manifest.sessions, session])
    folder.replace(MANIFEST, updated.encode())


def identity_diff(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Lines ``key: stored -> asked`` for every leaf that differs."""
    flat_stored, flat_asked = dict(_leaves(stored)), dict(_leaves(asked))
    lines = []
    for key in sorted(flat_stored.keys() | flat_asked.keys()):
        # Compared as JSON, since that is what the hash sees: 1 and 1.0 differ.
        before, after = (json.dumps(flat[key]) if key in flat else "(absent)" for flat in (flat_stored, flat_asked))
        if before != after:
            lines.append(f"{key}: {before} -> {after}")
    return lines


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
