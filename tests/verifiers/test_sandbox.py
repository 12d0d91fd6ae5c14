"""The pool against real worker processes and verifiers that misbehave."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from tulu_hpc.verifiers import check_record
from tulu_hpc.verifiers.registry import GRANTS
from tulu_hpc.verifiers.sandbox import SandboxError, VerifierPool

HOSTILE = ["tests.verifiers.hostile"]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def pool(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    with VerifierPool(1, 1.0, modules=HOSTILE) as opened:
        yield opened


def task(name, completion="a", truth="a"):
    return {"dataset": name, "ground_truth": truth}, completion


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_for_end(pids, seconds=20):
    end = time.monotonic() + seconds
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < end, f"still running: {[pid for pid in pids if alive(pid)]}"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("name", "counter"),
    [
        ("hang", "timeouts"),
        ("stubborn", "timeouts"),
        ("exit", "crashes"),
        ("sys_exit", "crashes"),
        ("raise", "errors"),
        ("recursion", "errors"),
        ("memory", "errors"),
        ("garbage", "garbage"),
        ("giant", "garbage"),
        ("nobody", "errors"),
    ],
)
def test_misbehaviour_costs_one_verdict(pool, name, counter):
    verdicts = pool.verify_batch([task("fine"), task("fine", "b"), task(name), task("fine"), task("fine", "b")])
    assert [verdict.score for verdict in verdicts] == [1.0, 0.0, 0.0, 1.0, 0.0]
    assert verdicts[2].reason
    assert getattr(pool.stats, counter) == 1 and pool.stats.lost == 1 and pool.stats.verdicts == 5
    assert pool.stats.restarts == (0 if counter == "errors" else 1)


def test_catastrophic_regex_is_cut_by_the_clock(pool):
    started = time.monotonic()
    verdicts = pool.verify_batch([task("regex", "a" * 40 + "b"), task("regex", "aaa")])
    assert [verdict.score for verdict in verdicts] == [0.0, 1.0]
    assert pool.stats.timeouts == 1
    assert time.monotonic() - started < 30


def test_printing_does_not_reach_the_protocol(pool):
    assert [verdict.score for verdict in pool.verify_batch([task("print"), task("fine")])] == [1.0, 1.0]
    assert pool.stats.lost == 0


def test_slow_imports_are_not_charged_to_the_first_verdict(pool):
    assert [found.score for found in pool.verify_batch([task("slow_import")] * 3)] == [1.0, 1.0, 1.0]
    assert pool.timeout < 1.5 and pool.stats.lost == 0


@pytest.mark.parametrize("score", [1.5, -0.1, float("nan")])
def test_score_outside_the_range_is_an_error(pool, score):
    assert pool.verify(*task("score", truth=score)).score == 0.0
    assert pool.stats.errors == 1


def test_order_is_kept_over_workers_and_losses(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    tasks = [task("exit") if i % 29 == 7 else task("fine", str(i % 3), "1") for i in range(150)]
    with VerifierPool(3, 5.0, modules=HOSTILE) as pool:
        scores = [verdict.score for verdict in pool.verify_batch(tasks)]
        assert pool.stats.crashes == sum(i % 29 == 7 for i in range(150)) == pool.stats.lost
    assert scores == [float(i % 29 != 7 and i % 3 == 1) for i in range(150)]


def test_large_completions_pass(pool):
    text = "\u20ac" * 3_000_000
    assert pool.verify(*task("fine", text, text)).score == 1.0


def test_surrogates_pass(pool):
    assert pool.verify(*task("fine", "\ud800", "\ud800")).score == 1.0


LINUX = pytest.mark.skipif(sys.platform != "linux", reason="system calls are filtered on Linux")


@LINUX
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fork", "Operation not permitted"),
        ("fork_bomb", "Operation not permitted"),
        ("program", "Operation not permitted"),
        ("write", "Permission denied"),
        ("delete", "Operation not permitted"),
        ("connect", "Operation not permitted"),
        ("kill_parent", "Operation not permitted"),
        ("detach", "Operation not permitted"),
        ("outlive", "Errno 1"),
        ("raise_limit", "not allowed to raise|exceeds"),
        ("fill", "MemoryError"),
    ],
)
def test_what_a_worker_cannot_do(monkeypatch, tmp_path, name, words):
    """As root too: then the tests themselves run as root."""
    monkeypatch.syspath_prepend(str(ROOT))
    file = tmp_path / "file"
    file.write_text("kept")
    truth = "9" if name == "connect" else str(file)
    with VerifierPool(1, 30.0, modules=HOSTILE, memory_mib=512) as pool:
        verdict = pool.verify(*task(name, truth=truth))
        assert verdict.score == 0.0 and re.search(words, verdict.reason), verdict.reason
        assert pool.stats.errors == 1 and pool.stats.restarts == 0
        assert pool.verify(*task("fine")).score == 1.0
    assert file.read_text() == "kept"


@LINUX
def test_a_worker_has_no_powers_but_reading_and_threads(pool):
    assert int(pool.verify(*task("powers")).reason, 16) & ~(1 << 2) == 0
    assert pool.verify(*task("thread")).score == 1.0


@LINUX
def test_a_signal_to_itself_costs_one_verdict(pool):
    assert [v.score for v in pool.verify_batch([task("kill_self"), task("fine")])] == [0.0, 1.0]
    assert pool.stats.crashes == 1


@LINUX
def test_grants(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        tasks = [task("write", truth=str(tmp_path / "a")), task("connect", truth=port), task("program")]
        for index, grant in enumerate(GRANTS):
            with VerifierPool(1, 5.0, modules=HOSTILE, grants=[grant]) as pool:
                scores = [verdict.score for verdict in pool.verify_batch(tasks)]
            assert scores == [float(index == i) for i in range(3)], grant
    assert (tmp_path / "a").read_text() == "written"
    with pytest.raises(ValueError, match="unknown grants"):
        VerifierPool(1, 5.0, grants=["everything"])


def test_a_missing_grant_is_said_before_the_run():
    record = {"dataset": "code", "ground_truth": ["assert f() == 1"]}
    check_record(record)
    check_record(record, grants=["processes"])
    with pytest.raises(ValueError, match=r"'code' needs verifier.grants: \[processes\]"):
        check_record(record, grants=[])


def test_forked_child_dies_with_its_worker(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    with VerifierPool(1, 3.0, modules=HOSTILE, grants=["processes"]) as pool:
        pool.verify(*task("fine"))
        worker = psutil.Process(pool._workers[0].process.pid)
        children = []

        def watch():
            while not children:
                children.extend(worker.children())

        watcher = threading.Thread(target=watch)
        watcher.start()
        assert pool.verify(*task("fork")).score == 0.0
        watcher.join()
        assert children
        wait_for_end([worker.pid, *(child.pid for child in children)])


def test_close_ends_the_workers_and_the_pool_can_be_used_again(pool):
    pool.verify(*task("fine"))
    pids = [worker.process.pid for worker in pool._workers]
    pool.close()
    assert pids and not any(alive(pid) for pid in pids)
    assert pool.verify(*task("fine")).score == 1.0


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux")
@pytest.mark.parametrize("kind", ["fine", "hang"])
def test_no_orphans_when_the_parent_is_killed(kind, tmp_path):
    """An idle worker and one that hangs in a verdict both end with a parent that got SIGKILL."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import sys, threading, time\n"
        "from tulu_hpc.verifiers.sandbox import VerifierPool\n"
        "pool = VerifierPool(1, 1000.0, modules=['tests.verifiers.hostile'])\n"
        "pool.verify({'dataset': 'fine', 'ground_truth': 'a'}, 'a')\n"
        "print(pool._workers[0].process.pid, flush=True)\n"
        f"pool.verify({{'dataset': {kind!r}, 'ground_truth': 'a'}}, 'a')\n"
        "time.sleep(1000)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, env=environment, cwd=ROOT)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    assert alive(worker)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    wait_for_end([worker])


def test_a_worker_that_cannot_start_is_an_error_of_its_own():
    with VerifierPool(1, 1.0, modules=["no_such_module_anywhere"]) as pool, pytest.raises(SandboxError, match="start"):
        pool.verify(*task("gsm8k", "1", "1"))


@pytest.mark.parametrize("arguments", [(0, 1.0), (1, 0.0)])
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match="workers"):
        VerifierPool(*arguments)


def test_rules_reach_the_workers():
    record = {"dataset": "gsm8k", "ground_truth": "-5"}
    with VerifierPool(1, 5.0) as fixed, VerifierPool(1, 5.0, rules="tulu3-compat") as compat:
        assert fixed.verify(record, "It is -5.").score == 1.0
        assert compat.verify(record, "It is -5.").score == 0.0
    with pytest.raises(ValueError, match="rule set"):
        VerifierPool(1, 5.0, rules="other")


def test_the_worker_imports_nothing_heavy():
    code = (
        "import sys, tulu_hpc.verifiers.worker; print([m for m in ('torch', 'numpy', 'pydantic') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).strip() == "[]"
