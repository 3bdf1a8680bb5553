"""Failures in workers: told once, with the rollouts they concern, and sorted by what can be done about them."""

import re
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import ray.exceptions

from personaspace.store.errors import PersonaspaceError, WorkerError

NODE_DIED = "its node died"
QUARANTINED = "quarantined: it ended its worker every time it was run"
"""Why a rollout is dropped that was found guilty on trial."""


_LOSSES = (
    ray.exceptions.RayActorError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.WorkerCrashedError,
)


@contextmanager
def explain(what: str, rollout_ids: Sequence[str]) -> Iterator[None]:
    """In a worker: turn any error into a WorkerError that names the rollouts. Errors for the user pass as they are."""
    try:
        yield
    except PersonaspaceError:
        raise
    except Exception as error:
        shown = ", ".join(rollout_ids[:4]) + (f", ... ({len(rollout_ids)} in all)" if len(rollout_ids) > 4 else "")
        raise WorkerError(f"{what} failed on rollouts {shown}\n{traceback.format_exc()}") from error


def user_error(error: BaseException) -> PersonaspaceError | None:
    """In the driver: the error for the user inside what Ray raises; None if a process, a node or an object was lost.

    Whatever else a worker raised comes as a WorkerError with its traceback.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, PersonaspaceError) and not isinstance(cause, ray.exceptions.RayError):
            return cause
        if isinstance(cause, _LOSSES):
            return None
        cause = getattr(cause, "cause", None) or cause.__cause__
    return WorkerError(str(error)) if isinstance(error, ray.exceptions.RayTaskError) else None


def describe_loss(error: BaseException) -> str:
    """One line on what Ray says of a lost process."""
    text = " ".join(str(error).split())
    pid, host = (re.search(rf"\b{name}: (\S+)", text) for name in ("pid", "ip"))
    where = f" (pid {pid[1]} on {host[1]})" if pid and host else ""
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return f"a node ran out of memory, and Ray killed a worker: {text}"
    if "node has died" in text or "node was terminated" in text:
        return NODE_DIED
    if isinstance(error, ray.exceptions.ActorDiedError | ray.exceptions.ActorUnavailableError):
        return f"a worker process died{where}"
    return f"{type(error).__name__}: {text[:300]}"
