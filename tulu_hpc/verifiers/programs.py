"""Programs that a model wrote (`code`): unit tests, or what they print for given input; run in a confined process each.

The process is started by a worker, which therefore needs the grant `processes`. What the program can do there is in
`confinement.child`. A program that hangs, forks, fills the memory, prints without end or kills itself has failed, and
that is a verdict like any other: its metrics say which limit it met.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import selectors
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tulu_hpc.verifiers.confinement import filters
from tulu_hpc.verifiers.registry import Verdict, register

DEFAULT_SECONDS = 3.0
DEFAULT_MEMORY_MIB = 1024
MAX_OUTPUT_BYTES = 1 << 20
_CHILD = Path(__file__).with_name("confinement") / "child.py"
_FENCE = re.compile(r"```[ \t]*(?:python3?|py)?[ \t]*\r?\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class Job:
    """What to do with a program: run its unit `tests`, or give it the input of each of the `cases`, which hold
    (input, expected output)."""

    tests: tuple[str, ...]
    cases: tuple[tuple[str, str], ...]
    prefix: str
    seconds: float
    memory_mib: int
    share: bool


@dataclass(frozen=True)
class Run:
    """How one process ended.

    Attributes:
        output: its stdout, or its report of the tests.
        error: the last line of its stderr.
        limit: what stopped it: "timeout", "output" or "".
        code: exit code, negative for a signal.
    """

    output: bytes
    error: str
    limit: str
    code: int


def parse_job(truth: Any) -> Job:
    """A ground truth: assert statements, or a mapping with `tests` (the same) or `cases`; lists and mappings perhaps as
    JSON.

    Of a mapping, `cases` is a list of `{"input": ..., "output": ...}`; `prefix` is put before the program (say, an
    import, or the head of a function), `seconds` is wall-clock time for all of a verdict, `memory_mib` address space,
    and `score` is "all" (all tests must pass) or "share" (of passed tests).

    Raises:
        ValueError: naming the field.
    """
    if isinstance(truth, str) and not truth.lstrip().startswith(("{", "[")):
        truth = [truth]
    if isinstance(truth, str):
        try:
            truth = json.loads(truth)
        except ValueError as error:
            raise ValueError(f"code: the ground truth is not JSON ({error}): {truth!r:.100}") from None
    given = {"tests": truth} if isinstance(truth, list) else truth
    known = {"tests", "cases", "prefix", "seconds", "memory_mib", "score"}
    if not isinstance(given, Mapping) or not set(given) <= known:
        raise ValueError(
            f"code: the ground truth must be a list of tests or hold some of {sorted(known)}: {truth!r:.100}"
        )
    tests, cases = given.get("tests") or [], given.get("cases") or []
    if not isinstance(tests, list) or not all(isinstance(test, str) and test.strip() for test in tests):
        raise ValueError(f"code: tests must be a list of statements, got {tests!r:.100}")
    if not isinstance(cases, list) or not all(_is_case(case) for case in cases):
        raise ValueError(f"code: cases must be a list of mappings with input and output, got {cases!r:.100}")
    if bool(tests) == bool(cases):
        raise ValueError("code: the ground truth needs either tests or cases")
    for number, test in enumerate(tests):
        try:
            compile(test, "<test>", "exec")
        except SyntaxError as error:
            raise ValueError(f"code: test {number} is no Python ({error.msg}): {test!r:.100}") from None
    prefix, seconds = given.get("prefix", ""), given.get("seconds", DEFAULT_SECONDS)
    memory, score = given.get("memory_mib", DEFAULT_MEMORY_MIB), given.get("score", "all")
    if not isinstance(prefix, str):
        raise ValueError(f"code: prefix must be a text, got {prefix!r:.100}")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= 3600:
        raise ValueError(f"code: seconds must be above 0 and at most 3600, got {seconds!r:.100}")
    if isinstance(memory, bool) or not isinstance(memory, int) or memory < 64:
        raise ValueError(f"code: memory_mib must be a whole number from 64 on, got {memory!r:.100}")
    if score not in ("all", "share"):
        raise ValueError(f"code: score must be 'all' or 'share', got {score!r:.100}")
    pairs = tuple((case["input"], case["output"]) for case in cases)
    return Job(tuple(tests), pairs, prefix, float(seconds), memory, score == "share")


def _is_case(case: Any) -> bool:
    return isinstance(case, Mapping) and all(isinstance(case.get(key), str) for key in ("input", "output"))


def extract_program(completion: str) -> str:
    """The last fenced block, be it closed or not, else the whole answer."""
    found = _FENCE.findall(completion)
    return str(found[-1]) if found else completion


def execute(program: str, job: Job, tests: list[str] | None, given: str, seconds: float, token: str) -> Run:
    """Run a program once in a confined process.

    Args:
        program: Python.
        job: its memory limit.
        tests: statements to run behind it; None to let it read `given` and print.
        given: its stdin.
        seconds: wall clock and CPU time.
        token: stands in the report of the tests, which the program could write as well.

    Raises:
        ValueError: this process may not start others, or the machine has no known system calls to filter.
    """
    if not filters.supported():
        raise ValueError("code: programs run only where their system calls can be filtered: Linux on x86_64 or aarch64")
    read_end, write_end = os.pipe()
    order: dict[str, Any] = {"program": program, "tests": tests, "memory_mib": job.memory_mib, "token": token}
    order |= {"cpu_seconds": int(seconds) + 1, "parent": os.getpid(), "report": write_end}
    body = json.dumps(order).encode()
    incoming = memoryview(struct.pack(">I", len(body)) + body + given.encode("utf-8", "surrogatepass"))
    command = [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(_CHILD)]
    pipe = subprocess.PIPE
    try:
        process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, cwd="/", env={}, pass_fds=[write_end], bufsize=0
        )
    except PermissionError as error:
        os.close(read_end)
        raise ValueError(f"code: the worker may start no process ({error}): set verifier.grants: [processes]") from None
    finally:
        os.close(write_end)
    with os.fdopen(read_end, "rb", buffering=0) as report, process:
        assert process.stdout is not None and process.stderr is not None
        streams = {"stdout": process.stdout.fileno(), "stderr": process.stderr.fileno(), "report": report.fileno()}
        try:
            output, limit = _exchange(process, incoming, streams, time.monotonic() + seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            process.wait()
    lines = output["stderr"].decode("utf-8", "replace").strip().splitlines()
    wanted = output["stdout"] if tests is None else output["report"]
    return Run(bytes(wanted), lines[-1][:200] if lines else "", limit, process.returncode)


def _exchange(
    process: subprocess.Popen[bytes], incoming: memoryview, streams: Mapping[str, int], deadline: float
) -> tuple[dict[str, bytearray], str]:
    """Feed the process and collect what it writes, until all its ends are closed or a limit is met."""
    output = {name: bytearray() for name in streams}
    assert process.stdin is not None
    stdin = process.stdin.fileno()
    os.set_blocking(stdin, False)
    with selectors.DefaultSelector() as selector:
        selector.register(stdin, selectors.EVENT_WRITE)
        for name, descriptor in streams.items():
            selector.register(descriptor, selectors.EVENT_READ, name)
        reading = len(streams)
        while reading:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return output, "timeout"
            for key, _ in selector.select(remaining):
                if key.fd == stdin:
                    try:
                        incoming = incoming[os.write(stdin, incoming) :]
                    except BrokenPipeError:  # it ended without reading all
                        incoming = memoryview(b"")
                    if not incoming:
                        selector.unregister(stdin)
                        process.stdin.close()
                    continue
                part = os.read(key.fd, 1 << 16)
                output[key.data] += part
                if len(output[key.data]) > MAX_OUTPUT_BYTES:
                    return output, "output"
                if not part:
                    selector.unregister(key.fd)
                    reading -= 1
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(max(0.0, deadline - time.monotonic()))
        return output, ""
    return output, "timeout"


def _failure(run: Run) -> str:
    if run.limit:
        return run.limit
    if run.code < 0:
        name = signal.Signals(-run.code).name if -run.code in {int(s) for s in signal.Signals} else str(-run.code)
        return "timeout" if name == "SIGXCPU" else f"killed by {name}"
    return run.error or f"exit code {run.code}"


def _run_tests(program: str, job: Job) -> tuple[int, str]:
    token = secrets.token_hex(16)
    run = execute(program, job, list(job.tests), "", job.seconds, token)
    try:
        report = json.loads(run.output)
        if report["token"] != token or not 0 <= report["passed"] <= len(job.tests):
            return 0, "the program forged the report of its tests"
        return int(report["passed"]), str(report["error"])
    except (ValueError, KeyError, TypeError):
        return 0, _failure(run)


def _run_cases(program: str, job: Job) -> tuple[int, str]:
    deadline = time.monotonic() + job.seconds
    passed, first = 0, ""
    for given, expected in job.cases:
        seconds = deadline - time.monotonic()
        if seconds <= 0:
            return passed, first or "timeout"
        run = execute(program, job, None, given, seconds, "")
        if run.limit or run.code != 0:
            first = first or _failure(run)
        elif _lines(run.output.decode("utf-8", "replace")) == _lines(expected):
            passed += 1
        else:
            first = first or f"printed {run.output[:60]!r}, expected {expected[:60]!r}"
        if first and not job.share:
            break
    return passed, first


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _check(truth: Any) -> None:
    parse_job(truth)


@register("code", check=_check, needs=["processes"])
def verify_code(completion: str, truth: Any, record: Mapping[str, Any]) -> Verdict:
    """All tests pass, or each case's output is as expected (white space at line ends aside); or the share that does."""
    job = parse_job(truth)
    program = f"{job.prefix}\n{extract_program(completion)}" if job.prefix else extract_program(completion)
    passed, failure = (_run_tests if job.tests else _run_cases)(program, job)
    share = passed / len(job.tests or job.cases)
    metrics = {"passed": share, "timeout": float(failure == "timeout"), "output": float(failure == "output")}
    metrics["killed"] = float(failure.startswith("killed"))
    return Verdict(share if job.share else float(share == 1.0), failure or "passed", metrics)
