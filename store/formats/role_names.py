"""Names of roles as names of files, in both directions."""

import re
from pathlib import Path

from personaspace.store.errors import InputError

DEFAULT_ROLE = "default"
"""The role that is no role: the model as itself."""
SCENARIO = "scenario"
"""Kind of the roles whose rollouts are conversations of several turns: no personas, and no space is made of them."""

_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def check_role_name(name: object, where: str) -> str:
    """``name`` if it is fit for a file name, and so can't lead out of a folder. Raises InputError naming ``where``."""
    if not isinstance(name, str) or not _SAFE.fullmatch(name):
        raise InputError(
            f"{where}: role name {name!r} can't be a file name; use letters, digits, `.`, `_` and `-`, "
            "and begin with a letter or digit."
        )
    return name


def role_files(folder: Path, suffix: str) -> list[tuple[str, Path]]:
    """(role, file) of every ROLE``suffix`` in ``folder``, by name. Raises InputError if there is none."""
    files = sorted(folder.glob(f"*{suffix}"))
    if not files:
        raise InputError(f"{folder}: holds no ROLE{suffix} files.")
    return [(file.name.removesuffix(suffix), file) for file in files]
