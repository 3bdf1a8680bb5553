"""Who ran this, where, when, and with which software: what run.json keeps of each driver."""

import getpass
import importlib.metadata
import platform
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

_PACKAGES = ("personaspace", "torch", "transformers", "accelerate", "ray", "zarr", "numcodecs", "numpy", "pyarrow")


def session_entry(epoch: int) -> dict[str, Any]:
    """What run.json keeps about one driver: who, where, when, and with which software."""
    return {
        "epoch": epoch,
        "user": getpass.getuser(),
        "host": socket.gethostname(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    """Commit of the source tree that this package runs from, with `+` where it has changes; None if not in git."""
    source = Path(__file__).resolve()

    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", *arguments], cwd=source.parent, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        # An installed copy may lie inside somebody else's repository.
        if git("ls-files", "--error-unmatch", source.name) is None:
            return None
        return git("describe", "--always", "--dirty=+", "--abbrev=40", "--exclude=*")
    except FileNotFoundError:
        return None
