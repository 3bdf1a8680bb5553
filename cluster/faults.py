"""Failures in workers: told once, with the rollouts they concern and the worker's own traceback."""

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import ray.exceptions

from personaspace.store.errors import PersonaspaceError, WorkerError


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


def unwrap(error: ray.exceptions.RayError) -> PersonaspaceError:
    """In the driver: the user's error inside what Ray raises, or a WorkerError for an actor that died."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, PersonaspaceError) and not isinstance(cause, ray.exceptions.RayError):
            return cause
        cause = getattr(cause, "cause", None) or cause.__cause__
    if isinstance(error, ray.exceptions.RayActorError):
        return WorkerError(f"A worker process died: {error}\nThe run can be resumed with the same command.")
    return WorkerError(str(error))
