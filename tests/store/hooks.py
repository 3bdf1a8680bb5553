"""A folder in which a test can interfere: any storage, with a call before each of its operations."""

from collections.abc import Callable
from typing import Any, cast

from personaspace.store.objects import Folder

WRITES = ("put_new", "replace", "compare_and_swap", "delete")
OPERATIONS = ("get", "get_range", "get_tail", "exists", "list", *WRITES)


class HookedFolder:
    """Forwards to a folder; calls ``before(operation, key)`` first."""

    def __init__(self, folder: Folder, before: Callable[[str, str], None]) -> None:
        self._folder = folder
        self._before = before

    def __getattr__(self, name: str) -> Any:
        forwarded = getattr(self._folder, name)
        if name not in OPERATIONS:
            return forwarded

        def operation(key: str = "", *arguments: Any) -> Any:
            self._before(name, key)
            return forwarded(key, *arguments)

        return operation


def hooked(folder: Folder, before: Callable[[str, str], None]) -> Folder:
    return cast(Folder, HookedFolder(folder, before))
