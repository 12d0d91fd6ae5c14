"""`python -m tulu_hpc_vllm.serve PARENT ARGUMENTS...`: an OpenAI server of vLLM that ends with whoever started it.

This process only watches: the server is a child in a process group of its own, and the whole group is killed when the
server ends, when process PARENT is gone, or on SIGTERM or SIGINT. Were this process itself killed, the kernel kills the
server (and with it, by the plugin, the engine core and the workers).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time

from tulu_hpc_vllm.lifetime import die_with_parent

POLL_SECONDS = 0.5  # how late the death of the parent may be seen
GRACE_SECONDS = 10.0  # between SIGTERM and SIGKILL


class _Stop(Exception):
    pass


def _raise_stop(number: int, frame: object) -> None:
    raise _Stop


def main() -> int:
    parent, arguments = int(sys.argv[1]), sys.argv[2:]
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _raise_stop)
    server = subprocess.Popen(
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments],
        stdin=subprocess.DEVNULL,
        process_group=0,
        preexec_fn=die_with_parent,  # safe: this process has one thread
        env={**os.environ, "TULU_HPC_VLLM_SUPERVISED": "1"},
    )
    try:
        watch(server, parent)
        if server.poll() is None:
            end_politely(server)
    except _Stop:
        end_politely(server)
    finally:
        kill_group(server)
    return server.wait()


def watch(server: subprocess.Popen[bytes], parent: int) -> None:
    """Return when the server has ended or the parent is gone."""
    poll = select.poll()
    poll.register(os.pidfd_open(server.pid), select.POLLIN)
    while os.getppid() == parent:
        if poll.poll(POLL_SECONDS * 1000):
            return


def end_politely(server: subprocess.Popen[bytes]) -> None:
    """SIGTERM, and time to release the GPU."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    server.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(GRACE_SECONDS)


def kill_group(server: subprocess.Popen[bytes]) -> None:
    """SIGKILL to every process that is left of the server: vLLM leaves its engine core behind when it is killed."""
    for _ in range(2):  # the second time for a process that was being started during the first
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main())
