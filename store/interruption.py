"""An orderly end of a command that is interrupted."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from personaspace.store.errors import PersonaspaceError


class Interrupted(PersonaspaceError):
    """Ctrl-C or SIGTERM. The run can be resumed."""

    exit_code = 130


@contextmanager
def orderly_end() -> Iterator[None]:
    """Turn SIGTERM (`ray job stop`, a scheduler's warning) and Ctrl-C into one Interrupted error."""

    def stop(number: int, _: FrameType | None) -> None:
        # `timeout` and some schedulers send it twice, and the end must not end in the middle. SIGKILL is left.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt(signal.Signals(number).name)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise Interrupted("Interrupted. What is committed is safe; the same command resumes.") from interrupt
    finally:
        signal.signal(signal.SIGTERM, previous)
