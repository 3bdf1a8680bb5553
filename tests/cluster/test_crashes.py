"""Crashes and interruptions of real runs on real Ray. The long table: python -m tests.cluster.crashes"""

import signal
import time
import uuid
from pathlib import Path

import pytest

from personaspace.store.lease import read_holder
from personaspace.store.local import LocalFolder
from tests.cluster.crashes import Laboratory, Trial, objects, processes_with

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    return Laboratory(tmp_path_factory.mktemp("laboratory"))


def assert_whole(trial: Trial) -> None:
    assert trial.identical
    assert trial.rewritten == 0
    assert trial.recomputed_outside == 0


@pytest.mark.nightly
@pytest.mark.parametrize("share", [0.0, 0.4, 0.8])
def test_killed_driver_resumes_to_identical_arrays(laboratory: Laboratory, share: float) -> None:
    assert_whole(laboratory.kill_driver(f"uniform-{share}", share * laboratory.seconds))


def test_crash_between_publish_and_record_is_adopted(laboratory: Laboratory) -> None:
    trial = laboratory.kill_before_record("aimed", place=100)
    assert_whole(trial)
    assert trial.orphans >= 1
    assert trial.adopted >= 1


@pytest.mark.nightly
def test_killed_generation_resumes_to_the_same_rollouts(tmp_path: Path) -> None:
    laboratory = Laboratory(tmp_path, "generate")
    assert_whole(laboratory.kill_driver("uniform", 0.4 * laboratory.seconds))
    trial = laboratory.kill_before_record("aimed", place=20)
    assert_whole(trial)
    assert trial.orphans >= 1
    assert trial.adopted >= 1


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.nightly)])
def test_interrupt_leaves_a_resumable_run_and_no_stray_process(laboratory: Laboratory, number: signal.Signals) -> None:
    run, mark = f"interrupt-{number.name}", uuid.uuid4().hex
    path = laboratory.copy_base(run)
    process = laboratory.start("extract", run, {"PERSONASPACE_TEST_MARK": mark})
    laboratory.wait_for_first_record(run)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "Interrupted. What is committed is safe; the same command resumes." in output
    assert "Traceback" not in output
    holder = read_holder(LocalFolder(path))
    assert holder is not None
    assert holder.released
    deadline = time.monotonic() + 15
    while processes_with("PERSONASPACE_TEST_MARK", mark) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert processes_with("PERSONASPACE_TEST_MARK", mark) == []
    resumed = laboratory.start("extract", run, stages=3)
    output, _ = resumed.communicate()
    assert resumed.returncode == 0, output
    assert objects(path).keys() == laboratory.expected.keys()


@pytest.mark.nightly
def test_second_driver_is_refused(laboratory: Laboratory) -> None:
    laboratory.copy_base("shared")
    first = laboratory.start("extract", "shared")
    laboratory.wait_for_first_record("shared")
    first.send_signal(signal.SIGSTOP)  # Or it might be done before the second has started.
    second = laboratory.start("extract", "shared")
    output, _ = second.communicate()
    first.send_signal(signal.SIGCONT)
    assert second.returncode == 3, output
    assert f"pid {first.pid}. Wait for it, stop it, or use another run." in output
    first.communicate()
    assert first.returncode == 0
    assert objects(Path(laboratory.folder / "runs" / "shared")) == laboratory.expected
