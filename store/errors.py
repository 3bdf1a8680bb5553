"""Errors that reach the user as one clear message. Each states what is wrong, the value, and what to do."""


class PersonaspaceError(Exception):
    """Base of every error that the command line prints without a traceback; ``exit_code`` is the process's."""

    exit_code = 1


class InputError(PersonaspaceError):
    """A config value, file or argument is not usable. Raised before anything is written."""

    exit_code = 2


class IdentityError(InputError):
    """The run folder holds a run with another identity."""


class LeaseError(PersonaspaceError):
    """Another driver writes this run, or has taken it over."""

    exit_code = 3


class IntegrityError(PersonaspaceError):
    """Stored bytes do not match their record or cannot be decoded."""

    exit_code = 4


class StorageError(PersonaspaceError):
    """The disk or the object store refused or failed: full, read-only, unreachable. What is committed is safe."""

    exit_code = 6


class WorkerError(PersonaspaceError):
    """Work on some rollouts failed; the message names them and carries the worker's traceback."""

    exit_code = 5
