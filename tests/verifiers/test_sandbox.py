"""The pool against real worker processes and verifiers that misbehave.

Not proven: a verifier's child that makes itself a session leader (setsid) outlives its worker.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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


def test_forked_child_dies_with_its_worker(pool, tmp_path):
    note = tmp_path / "pids"
    assert pool.verify(*task("fork", truth=str(note))).score == 0.0
    pids = [int(pid) for pid in note.read_text().split()]
    assert len(pids) == 2
    wait_for_end(pids)


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
