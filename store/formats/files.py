"""Files are read only if they are there, and appear whole or not at all: written under another name, then renamed."""

import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from personaspace.store.errors import InputError

MARK_BYTES = 4096
"""Of a file, within which it says who wrote it."""


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


@contextmanager
def replacing_parts(folder: Path, parts: Sequence[str], *, overwrite: bool) -> Iterator[Path]:
    """A new folder to write ``parts`` (files or folders) to; if the block ends well, they become those of ``folder``.

    Parts that ``folder`` has and that weren't written are gone then; its other files are left alone. Raises InputError
    at once if ``folder`` is not empty (unless ``overwrite``) or can't be made.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not overwrite):
        raise InputError(f"{folder}: exists and is not empty; choose another folder, or allow it to be overwritten.")
    make_folder(folder.parent)
    temporary = folder.parent / f".{uuid.uuid4().hex}.tmp"
    temporary.mkdir()
    try:
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            sync(path)
        if not folder.exists() or not any(folder.iterdir()):
            os.replace(temporary, folder)
        else:
            old = temporary / ".old"
            old.mkdir()
            for part in parts:
                for source, target in ((folder / part, old / part), (temporary / part, folder / part)):
                    if source.exists():
                        os.replace(source, target)
            sync(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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


def refuse_existing(file: Path, *, overwrite: bool, mark: str | None = None) -> None:
    """Raises InputError if ``file`` is a folder, or exists and may not be replaced.

    A file that has ``mark`` near its beginning was written by the command itself, and may be.
    """
    if file.is_dir():
        raise InputError(f"{file}: is a folder; name the file to write.")
    if file.exists() and not overwrite and not (mark is not None and _is_marked(file, mark)):
        raise InputError(f"{file}: exists already; choose another name, or allow it to be overwritten.")


def _is_marked(file: Path, mark: str) -> bool:
    with file.open("rb") as stream:
        return mark.encode() in stream.read(MARK_BYTES)


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
