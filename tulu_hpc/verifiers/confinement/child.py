"""The process in which a model's program runs: `python -I -S -B child.py`, started by `programs.execute`.

On stdin come 4 bytes of length, a job as JSON, and then what the program itself shall read. The process confines itself
and runs the program: no other processes or threads, no network, no writing, reading of the standard library only,
bounded memory and CPU time. With tests it writes their results to the descriptor `report`; else the program's own
stdout is the result.
"""

from __future__ import annotations

import json
import os
import struct
import sys
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import filters  # type: ignore[import-not-found]
import limits  # type: ignore[import-not-found]

sys.path.pop(0)

_READABLE = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/share/zoneinfo", "/dev/null", "/dev/urandom")


def _exactly(count: int) -> bytes:
    parts = b""
    while len(parts) < count:
        part = os.read(0, count - len(parts))
        if not part:
            os._exit(0)  # the parent went
        parts += part
    return parts


def confine(memory_mib: int, cpu_seconds: int) -> None:
    """All limits, in the order that each still allows the next."""
    limits.limit_resources(AS=memory_mib << 20, CPU=cpu_seconds, FSIZE=0, NOFILE=32, CORE=0, MEMLOCK=0)
    limits.limit_reading([*sorted({sys.base_prefix, sys.prefix}), *_READABLE])
    limits.drop_capabilities()
    filters.install(())


def run_tests(program: Any, tests: list[str]) -> dict[str, Any]:
    """Run the program, then each test in its namespace; what fails is named."""
    space: dict[str, Any] = {"__name__": "solution", "__builtins__": __builtins__}
    try:
        exec(program, space)
    except BaseException as error:  # SystemExit too: a program that leaves has defined nothing to test
        return {"passed": 0, "error": _text(error)}
    passed, first = 0, ""
    for test in tests:
        try:
            exec(compile(test, "<test>", "exec"), space)
            passed += 1
        except BaseException as error:
            first = first or f"{test[:80]}: {_text(error)}"
    return {"passed": passed, "error": first}


def _text(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:200]
    except Exception:  # a program may raise what cannot be printed
        return type(error).__name__


def main() -> None:
    (size,) = struct.unpack(">I", _exactly(4))
    job = json.loads(_exactly(size))
    limits.die_with_parent(job["parent"])
    confine(job["memory_mib"], job["cpu_seconds"])
    try:
        program = compile(job["program"], "<program>", "exec")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        program, failure = None, _text(error)
    if job["tests"] is None:
        if program is None:
            sys.exit(failure)
        exec(program, {"__name__": "__main__", "__builtins__": __builtins__})
        return
    result = {"passed": 0, "error": failure} if program is None else run_tests(program, job["tests"])
    os.write(job["report"], json.dumps({**result, "token": job["token"]}).encode())
    os._exit(0)  # without the program's exit handlers


if __name__ == "__main__":
    main()
