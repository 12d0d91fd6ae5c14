"""A verifier worker: `python -m tulu_hpc.verifiers.worker`, started and killed by `sandbox.VerifierPool`.

Frames on stdin and stdout are a 4-byte big-endian length and JSON. The worker first sends `{"ready": true}`; then each
request `{"rules": ..., "tasks": [[record, completion], ...]}` is answered by one frame per task, in order:
`{"index": i, "score": ..., "reason": ..., "metrics": {...}}` or `{"index": i, "error": ...}`. Around slow imports of a
verifier stand `{"preparing": true}` and `{"preparing": false}`: they do not count as time of the verdict.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import struct
from typing import Any, BinaryIO

from tulu_hpc.verifiers import judge
from tulu_hpc.verifiers.confinement import filters, limits
from tulu_hpc.verifiers.registry import GRANTS, Prepare, preparations, verify

HEADER = struct.Struct(">I")
REASON_CHARACTERS = 500


def read_frame(stream: BinaryIO) -> Any:
    """The next frame, or None at the end of the stream."""
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    (size,) = HEADER.unpack(header)
    body = stream.read(size)
    return json.loads(body) if len(body) == size else None


def encode_frame(message: Any) -> bytes:
    body = json.dumps(message).encode()
    return HEADER.pack(len(body)) + body


def _answer(index: int, record: dict[str, Any], completion: str, rules: str) -> dict[str, Any]:
    try:
        verdict = verify(record, completion, rules)
    except Exception as error:  # the border of foreign code: whatever it raises costs this one verdict
        return {"index": index, "error": f"{type(error).__name__}: {error}"[:REASON_CHARACTERS]}
    return {
        "index": index,
        "score": float(verdict.score),
        "reason": verdict.reason[:REASON_CHARACTERS],
        "metrics": dict(verdict.metrics),
    }


def _prepare(record: dict[str, Any], rules: str, done: set[Prepare], sink: BinaryIO) -> None:
    """Call what the record's verifiers want prepared; a failure shows again in the verdict."""
    missing = [prepare for prepare in preparations(record, rules) if prepare not in done]
    if not missing:
        return
    _send(sink, {"preparing": True})
    for prepare in missing:
        with contextlib.suppress(Exception):
            prepare()
        done.add(prepare)
    _send(sink, {"preparing": False})


def _send(sink: BinaryIO, message: Any) -> None:
    sink.write(encode_frame(message))
    sink.flush()


def _confine(memory_mib: int, grants: list[str]) -> None:
    """Bound the address space, so that a verdict runs out of memory alone; on Linux also give up root's powers and all
    but the granted system calls. Threads stay: numeric libraries start them."""
    limits.limit_resources(CORE=0, **({"AS": memory_mib << 20} if memory_mib else {}))
    if filters.supported():
        limits.drop_capabilities()
        filters.install([*grants, "threads"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--memory-mib", type=int, default=0)
    parser.add_argument("--module", action="append", default=[])
    parser.add_argument("--judge", default="")
    parser.add_argument("--grant", action="append", default=[], choices=GRANTS)
    arguments = parser.parse_args()
    limits.die_with_parent(arguments.parent)
    # Frames go through private copies: what a verifier prints or reads must not reach the pipes.
    source = os.fdopen(os.dup(0), "rb")
    sink = os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "r+b") as null:
        os.dup2(null.fileno(), 0)
        os.dup2(null.fileno(), 1)
    for module in ["tulu_hpc.verifiers", *arguments.module]:
        importlib.import_module(module)
    if arguments.judge:
        judge.configure(judge.JudgeSettings(**json.loads(arguments.judge)))
    _confine(arguments.memory_mib, arguments.grant)
    _send(sink, {"ready": True})
    prepared: set[Prepare] = set()
    while (request := read_frame(source)) is not None:
        for index, (record, completion) in enumerate(request["tasks"]):
            _prepare(record, request["rules"], prepared, sink)
            _send(sink, _answer(index, record, completion, request["rules"]))


if __name__ == "__main__":
    main()
