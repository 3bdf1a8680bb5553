"""Which rollouts of a run are judged."""

from dataclasses import replace
from pathlib import Path

import pytest

from personaspace.extract.judging.config import JudgeConfig
from personaspace.extract.judging.work import assign
from personaspace.store.errors import InputError
from personaspace.store.manifest import require_manifest
from tests.extract.judging.runs import make_run


def test_only_roles_are_judged(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    manifest = require_manifest(folder)
    names = [role["id"] for role in manifest.tables["roles"]]
    assert assign(folder, manifest, JudgeConfig()).rows == 20
    poet = names.index("poet")
    table = [
        {**role, "kind": "scenario"} if place == poet else role for place, role in enumerate(manifest.tables["roles"])
    ]
    talks = replace(manifest, tables={**manifest.tables, "roles": table})
    assert assign(folder, talks, JudgeConfig()).rows == 16
    for name in ("default", "poet"):
        with pytest.raises(InputError, match=rf"^judge\.roles: the run has no role '{name}'\. It has hacker"):
            assign(folder, talks, JudgeConfig(roles=(name,)))
    assert assign(folder, talks, JudgeConfig(), everyone=True).rows == 24
    assert assign(folder, talks, JudgeConfig(roles=("default",)), everyone=True).rows == 4
