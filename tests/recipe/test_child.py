"""Children of the recipe driver: output, signals, and that none outlives a killed driver."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tulu_hpc.stages.child import run_child

# A parent that prints its child's pid and waits: the shape of torchrun and its workers, each in a session of its own.
PARENT = """
import subprocess, sys, signal
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"], start_new_session=True)
print("worker", worker.pid, flush=True)
signal.sigwait({signal.SIGTERM})
worker.kill()
worker.wait()
sys.exit(7)
"""

DRIVER = """
import os, sys
from pathlib import Path
from tulu_hpc.stages.child import run_child
result = run_child([sys.executable, "-c", sys.argv[1]], environment=os.environ, log=Path(sys.argv[2]))
print("ended", result.returncode, result.stopped_by, flush=True)
"""


def _run(code: str, log: Path) -> tuple[object, list[str]]:
    lines: list[str] = []
    result = run_child([sys.executable, "-c", code], environment=os.environ, log=log, echo=lines.append)
    return result, lines


def _driver(log: Path) -> tuple[subprocess.Popen[str], int]:
    """A driver that runs PARENT, and the pid of PARENT's worker."""
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, PARENT, str(log)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert driver.stdout is not None
    word, pid = driver.stdout.readline().split()
    assert word == "worker"
    return driver, int(pid)


def _gone(pid: int, seconds: float = 20.0) -> bool:
    """Whether the process ends in time; one that nobody has buried yet counts as ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def test_output_goes_to_terminal_and_log(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "x.log"
    result, lines = _run("import sys; print('one'); print('two', file=sys.stderr); sys.exit(3)", log)
    assert result.returncode == 3 and result.stopped_by is None  # type: ignore[attr-defined]
    assert sorted(lines) == ["one", "two"] == sorted(result.last_lines)  # type: ignore[attr-defined]
    text = log.read_text()
    assert text.startswith("# ") and "one\n" in text and "two\n" in text


def test_log_keeps_earlier_attempts(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    _run("print('first')", log)
    _run("print('second')", log)
    assert log.read_text().index("first\n") < log.read_text().index("second\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_is_passed_on_and_waited_for(tmp_path: Path, number: int) -> None:
    driver, worker = _driver(tmp_path / "x.log")
    driver.send_signal(number)
    output, _ = driver.communicate(timeout=30)
    assert f"ended 7 {int(number)}" in output
    assert _gone(worker)


def test_nothing_outlives_a_killed_driver(tmp_path: Path) -> None:
    driver, worker = _driver(tmp_path / "x.log")
    parent = psutil.Process(worker).ppid()
    driver.kill()
    driver.wait()
    assert _gone(parent) and _gone(worker)


def test_second_signal_kills_a_child_that_does_not_listen(tmp_path: Path) -> None:
    deaf = (
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('worker', 1, flush=True); time.sleep(120)"
    )
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, deaf, str(tmp_path / "x.log")], stdout=subprocess.PIPE, text=True
    )
    assert driver.stdout is not None
    driver.stdout.readline()
    driver.send_signal(signal.SIGTERM)
    time.sleep(0.3)  # two signals at once are one to the kernel
    driver.send_signal(signal.SIGTERM)
    output, _ = driver.communicate(timeout=30)
    assert f"ended {-signal.SIGKILL} {int(signal.SIGTERM)}" in output


def test_handlers_are_restored(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    _run("pass", tmp_path / "x.log")
    assert signal.getsignal(signal.SIGTERM) is before
