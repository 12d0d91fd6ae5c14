"""Programs of a model: right ones, wrong ones, and ones that attack. Every case is a real confined process."""

import importlib.util
import random
import sys

import pytest

from tulu_hpc.verifiers import check_record, verify
from tulu_hpc.verifiers.confinement import filters
from tulu_hpc.verifiers.programs import extract_program
from tulu_hpc.verifiers.sandbox import VerifierPool

pytestmark = pytest.mark.skipif(not filters.supported(), reason="needs Linux on x86_64 or aarch64")

TESTS = {"tests": ["assert f(1) == 2", "assert f(2) == 3"]}
DOUBLE = {"cases": [{"input": "2\n", "output": "4\n"}, {"input": "5", "output": "10"}]}


def verdict(program, truth):
    return verify({"dataset": "code", "ground_truth": truth}, program)


@pytest.mark.parametrize(
    ("program", "truth", "score"),
    [
        ("def f(x): return x + 1", TESTS, 1.0),
        ("Sure:\n```python\ndef f(x):\n    return x + 1\n```\nDone.", TESTS, 1.0),
        ("def f(x): return 2", TESTS, 0.0),
        ("def f(x): return 2", {**TESTS, "score": "share"}, 0.5),
        ("    return x + 1", {**TESTS, "prefix": "def f(x):"}, 1.0),
        ("def f(x): return math.floor(x) + 1", {**TESTS, "prefix": "import math"}, 1.0),
        ("def f(", TESTS, 0.0),
        ("n = int(input())\nprint(2 * n)", DOUBLE, 1.0),
        ("import sys\nfor line in sys.stdin: print(int(line) * 2, ' ')", DOUBLE, 1.0),
        ("print(4)", DOUBLE, 0.0),
        ("print(4)", {**DOUBLE, "score": "share"}, 0.5),
        ("if __name__ == '__main__':\n    print(int(input()) * 2)", DOUBLE, 1.0),
        ("import collections, heapq, itertools, re, random, datetime\ndef f(x): return x + 1", TESTS, 1.0),
        ("print('noise' * 1000)\ndef f(x): return x + 1", TESTS, 1.0),
    ],
)
def test_scores(program, truth, score):
    assert verdict(program, truth).score == score


ATTACKS = {
    "import os; os._exit(0)": "exit code 0",
    "import sys; sys.exit(0)": "SystemExit",
    "import os\nwhile True: os.fork()": "BlockingIOError",
    "import os; os.execv('/bin/true', ['true'])": "PermissionError",
    "import subprocess; subprocess.run(['true'])": "Error",
    "import threading; threading.Thread(target=print).start()": "start new thread",
    "x = bytearray(10 << 30)": "MemoryError",
    "x = []\nwhile True: x.append(bytearray(1 << 20))": "MemoryError",
    "import os, signal; os.kill(os.getpid(), signal.SIGKILL)": "killed by SIGKILL",
    "import os; os.kill(os.getppid(), 9)": "PermissionError",
    "import os; os.kill(-1, 9)": "PermissionError",
    "import ctypes; ctypes.string_at(0)": "killed by SIGSEGV",
    "open('/tmp/left-behind', 'w')": "PermissionError",
    "import os; os.mkdir('/tmp/left-behind')": "PermissionError",
    "open('/etc/passwd').read()": "PermissionError",
    "import os; os.listdir('/home')": "PermissionError",
    "open(f'/proc/{__import__(\"os\").getppid()}/environ').read()": "PermissionError",
    "import socket; socket.socket()": "PermissionError",
    "import socket; socket.create_connection(('127.0.0.1', 80))": "PermissionError",
    "import resource as r; r.setrlimit(r.RLIMIT_AS, (1 << 40, 1 << 40))": "ValueError",
    "def f(x): return f(x)": "RecursionError",
    "class E(BaseException):\n    def __str__(self): raise self\nraise E": "E",
}


@pytest.mark.parametrize("program", sorted(ATTACKS))
def test_attacks_fail_and_are_named(program):
    found = verdict(program, {**TESTS, "memory_mib": 256, "seconds": 20})
    assert found.score == 0.0 and ATTACKS[program] in found.reason, found.reason


@pytest.mark.parametrize(
    ("program", "metric"),
    [
        ("while True: pass", "timeout"),
        ("import time; time.sleep(100)", "timeout"),
        ("import re; re.match('(a+)+$', 'a' * 40 + 'b')", "timeout"),
        ("10 ** 10 ** 10", "timeout"),
        ("while True: print('x' * 1000)", "output"),
        ("import os; os.abort()", "killed"),
    ],
)
def test_limits_are_counted(program, metric):
    seconds = 0.6 if metric == "timeout" else 20
    found = verdict(program, {"cases": [{"input": "", "output": "never"}], "seconds": seconds})
    assert found.score == 0.0 and found.metrics[metric] == 1.0
    assert sum(found.metrics[name] for name in ("timeout", "output", "killed")) == 1.0


def test_a_forged_report_is_no_pass():
    report = '{"passed": 2, "token": ""}'
    program = f"import os\nfor d in range(3, 32):\n    try: os.write(d, {report!r}.encode())\n    except OSError: pass"
    assert verdict(program + "\nos._exit(0)", TESTS).score == 0.0


def test_in_a_worker():
    """The worker is confined itself; the bad programs cost nothing but their own verdicts."""
    tasks = [
        ({"dataset": "code", "ground_truth": TESTS}, text) for text in ("def f(x): return x + 1", *sorted(ATTACKS)[:4])
    ]
    with VerifierPool(1, 30.0, grants=["processes"]) as pool:
        scores = [found.score for found in pool.verify_batch([*tasks, tasks[0]])]
        assert pool.stats.lost == 0 and pool.stats.restarts == 0
    assert scores == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    with VerifierPool(1, 30.0) as pool:
        assert "set verifier.grants: [processes]" in pool.verify(*tasks[0]).reason


@pytest.mark.parametrize(
    ("truth", "words"),
    [
        (None, "list of tests"),
        ({}, "either tests or cases"),
        ({**TESTS, **DOUBLE}, "either tests or cases"),
        ("[", "not JSON"),
        (["assert ("], "test 0 is no Python"),
        ([3, "assert 1"], "list of statements"),
        ({"cases": [{"input": 3, "output": ""}]}, "mappings with input and output"),
        ({**TESTS, "seconds": 0}, "seconds"),
        ({**TESTS, "memory_mib": 1}, "memory_mib"),
        ({**TESTS, "score": "most"}, "score"),
        ({**TESTS, "language": "c"}, "hold some of"),
    ],
)
def test_ground_truths_that_cannot_be_used_are_refused(truth, words):
    with pytest.raises(ValueError, match=f"code: .*{words}"):
        check_record({"dataset": "code", "ground_truth": truth})


def test_extraction():
    assert extract_program("a\n```\nx = 1\n```\nb\n```py\ny = 2\n```") == "y = 2"
    assert extract_program("```python\nx = 1") == "x = 1"
    assert extract_program("x = 1") == "x = 1"


def random_function(rng):
    """A program for the sum of squares up to n that may be wrong, and may fail."""
    body = rng.choice(
        [
            "return sum(i * i for i in range(n + 1))",
            "return n * (n + 1) * (2 * n + 1) // 6",
            "return n * (n + 1) * (2 * n + 1) / 6",
            "return sum(i * i for i in range(n))",
            "return None",
            "raise ValueError(n)",
            "return f(n - 1) + n * n if n else 0",
            "return [0, 1, 5, 14][n]",
            "import sys; sys.exit()",
            "assert n < 3\n    return [0, 1, 5][n]",
        ]
    )
    return f"def f(n):\n    {body}\n"


def compare_with_evalplus(count):
    """Verdicts of evalplus's own checker, on the same inputs."""
    from evalplus.eval import PASS, untrusted_check

    rng = random.Random(11)
    passed = 0
    for _ in range(count):
        program, inputs = random_function(rng), [rng.randint(0, 6) for _ in range(3)]
        wanted = [sum(i * i for i in range(n + 1)) for n in inputs]
        status, _ = untrusted_check(
            "humaneval", program, [[n] for n in inputs], "f", wanted, 0.0, [0.01] * 3, min_time_limit=2.0
        )
        ours = verdict(program, [f"assert f({n}) == {value}" for n, value in zip(inputs, wanted, strict=True)]).score
        assert (status == PASS) == (ours == 1.0), program
        passed += int(ours)
    assert 0.1 * count < passed < 0.9 * count
    return count


needs_evalplus = pytest.mark.skipif(
    importlib.util.find_spec("evalplus") is None or sys.platform != "linux", reason="no evalplus"
)


@needs_evalplus
def test_against_evalplus():
    compare_with_evalplus(20)


@needs_evalplus
@pytest.mark.soak
def test_against_evalplus_soak(soak_figures):
    soak_figures(cases=compare_with_evalplus(2000))
