"""Files are read only if they are there, and appear whole or not at all: written under another name, then renamed."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from personaspace.store.errors import InputError


@contextmanager
def replacing(file: Path, *, overwrite: bool) -> Iterator[Path]:
    """A path beside ``file`` to write to; renamed to ``file`` if the block ends well, removed if it doesn't.

    Raises InputError at once if ``file`` exists (unless ``overwrite``) or its folder can't be made.
    """
    refuse_existing(file, overwrite=overwrite)
    make_folder(file.parent)
    temporary = file.parent / f".{uuid.uuid4().hex}.tmp"
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, file)
        sync(file.parent)
    finally:
        temporary.unlink(missing_ok=True)


def require_file(file: Path) -> Path:
    """``file`` if there is one. Raises InputError otherwise."""
    if not file.is_file():
        raise InputError(f"{file}: {'is a folder' if file.is_dir() else 'does not exist'}; name an existing file.")
    return file


@contextmanager
def naming(where: object) -> Iterator[None]:
    """Puts ``where`` before the message of an InputError that checks without knowledge of files raise."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def refuse_existing(file: Path, *, overwrite: bool) -> None:
    """Raises InputError if ``file`` is a folder, or exists and may not be replaced."""
    if file.is_dir():
        raise InputError(f"{file}: is a folder; name the file to write.")
    if file.exists() and not overwrite:
        raise InputError(f"{file}: exists already; choose another name, or allow it to be overwritten.")


def make_folder(folder: Path) -> None:
    """Makes ``folder`` and its parents. Raises InputError if something else has that name."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"{folder}: is not a folder; choose another place for the files.") from error


def sync(path: Path) -> None:
    """Flushes a file or folder to the disk, so that a power cut can't undo the order of writes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
