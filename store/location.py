"""From what a user writes to the folder it means: a path or a URL."""

import re
from pathlib import Path

from personaspace.store.errors import InputError
from personaspace.store.local import LocalFolder
from personaspace.store.objects import Folder
from personaspace.store.remote import RemoteFolder, check_url

Location = str | Path | Folder
"""Whatever names a folder: a path, a URL, or the folder itself."""

_RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def open_folder(location: Location) -> Folder:
    """The folder at a local path, a ``file://`` URL, or a URL of an object store. It need not exist.

    Raises InputError for a URL that is unknown or carries credentials.
    """
    if not isinstance(location, str | Path):
        return location
    text = str(location).removeprefix("file://")
    if "://" in text:
        return RemoteFolder(check_url(text))
    return LocalFolder(Path(text).expanduser().absolute())


def is_local(location: str) -> bool:
    """Whether the location is a path on this machine, or on one that it mounts."""
    return "://" not in location.removeprefix("file://")


def run_folder(root: str, run: str) -> Folder:
    """Folder of the run ``run`` in the store ``root``. Raises InputError for a name that is none."""
    return open_folder(root).child(check_run_name(run))


def is_run_name(name: str) -> bool:
    """Whether a folder of this name can be a run."""
    return _RUN.fullmatch(name) is not None


def check_run_name(run: str, what: str = "store.run") -> str:
    """The name of a run, or of ``what``. Raises InputError for one that could leave the store."""
    if not is_run_name(run):
        raise InputError(f"{what}: {run!r} is no name; use letters, digits, '.', '_' and '-', first a letter or digit.")
    return run
