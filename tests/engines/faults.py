"""Faults between a trainer and its vLLM servers: a proxy that breaks what passes through it, and a schedule of them.

The servers are real. A proxy stands for the network and everything in it; it also kills and stops the server behind it,
or the trainer, at the moment when a request is under way.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil

from tests.engines import vllm_server as real
from tulu_hpc.rollout.http import Address
from tulu_hpc.rollout.server import GENERATE, Server

# Faults of a request for a sample.
BREAK_OFF = "connection dropped before the request"
LOSE = "connection dropped when the answer was there"
TRUNCATE = "answer cut in the middle"
GARBAGE = "answer that is not JSON"
SHAPES = "answer with fewer log-probs than tokens"
UNFINISHED = "answer without a finish reason"
ERROR = "status 500"
BUSY = "status 503"
LATE = "answer after the deadline"
OLD = "answer to another request"
KILL = "server killed while it generates"
STOP = "engine core stopped for some seconds while it generates"
# Faults of an update of the weights.
KILL_IN_UPDATE = "server killed in an update"
KILL_TRAINER = "trainer killed in an update"
BREAK_UPDATE = "connection dropped in an update"
REFUSE_UPDATE = "status 500 in an update"

NETWORK = (BREAK_OFF, LOSE, TRUNCATE, GARBAGE, SHAPES, UNFINISHED, ERROR, BUSY, LATE, OLD)
DEADLY = (KILL, STOP, KILL_IN_UPDATE)
IN_UPDATE = (KILL_IN_UPDATE, KILL_TRAINER, BREAK_UPDATE, REFUSE_UPDATE)
_CONTROL = ("/pause", "/start_weight_update", "/update_weights", "/finish_weight_update", "/resume")


class Host:
    """A server with what supervises it elsewhere: killed or stopped, it is there again after a while."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.up = True
        self.failure: BaseException | None = None

    def kill(self, victim: str) -> None:
        """kill -9 of its API server or its engine core."""
        self.up = False
        _process(self.server, victim).kill()

    def restart(self) -> None:
        """What a job scheduler does."""
        try:
            self.server.restart()
            asyncio.run(self.server.wait_ready(300))
            self.up = True
        except BaseException as error:  # in a thread: told to the test at its end
            self.failure = error

    def stop(self, seconds: float) -> None:
        """SIGSTOP of its engine core, and SIGCONT."""
        self.up = False
        core = _process(self.server, "engine core")
        core.suspend()
        time.sleep(seconds)
        core.resume()
        self.up = True


def _process(server: Server, which: str) -> psutil.Process:
    found = real.processes(server)
    return found[1] if which == "api server" else max(found[2:], key=lambda process: process.memory_info().rss)


class Schedule:
    """Which request meets which fault: in a random order, a random number of requests apart, so that all happen.

    Both servers may be dead at once.

    Args:
        samples: requests for one that are to be expected; 0: each fault at the first request that it can meet.
        control: requests of updates that are to be expected.
    """

    def __init__(self, faults: Sequence[str], seed: int, *, samples: int = 0, control: int = 0) -> None:
        self.random = random.Random(seed)
        faults = list(faults)
        self.random.shuffle(faults)
        self._queues = {
            GENERATE: [fault for fault in faults if fault not in IN_UPDATE],
            "update": [fault for fault in faults if fault in IN_UPDATE],
        }
        lengths = {name: max(1, len(queue)) for name, queue in self._queues.items()}
        # Half of the control requests only: a server that is dead is sent none.
        self._most = {GENERATE: 0.9 * samples / lengths[GENERATE], "update": 0.5 * control / lengths["update"]}
        self._wait = {name: self._gap(name) for name in self._queues}
        self._path = "/update_weights"
        self.trainer: Callable[[], int | None] = lambda: None
        self.fired: list[str] = []
        self._lock = threading.Lock()

    def _gap(self, name: str) -> int:
        return self.random.randint(1, max(1, int(self._most[name])))

    @property
    def left(self) -> int:
        return sum(map(len, self._queues.values()))

    def take(self, path: str, host: Host, kept: bool) -> str | None:
        """The fault of this request, or None; `kept`: there is an old answer to give."""
        name = GENERATE if path == GENERATE else "update" if path in _CONTROL else ""
        with self._lock:
            queue = self._queues.get(name)
            if not queue:
                return None
            self._wait[name] -= 1
            fault = queue[0]
            if self._wait[name] > 0 or (name == "update" and path != self._path):
                return None
            if (fault in DEADLY and not host.up) or (fault == OLD and not kept):
                return None
            if fault in DEADLY:
                host.up = False  # before another request is looked at
            self.fired.append(f"{fault}: {path} of {host.server.address}")
            queue.pop(0)
            self._wait[name] = self._gap(name)
            following = queue[0] if queue else ""
            self._path = (
                self.random.choice(_CONTROL) if following in (BREAK_UPDATE, REFUSE_UPDATE) else "/update_weights"
            )
            return fault


class Proxies:
    """One proxy per server, in a thread of their own; `addresses` are what the trainer is told."""

    def __init__(self, hosts: Sequence[Host], schedule: Schedule) -> None:
        self.hosts, self.schedule = list(hosts), schedule
        self.addresses: list[Address] = []
        self._work = ThreadPoolExecutor(4)
        self._jobs: list[Any] = []
        self._kept: dict[int, bytes] = {}
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Proxies:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self.settle()
        self._work.shutdown()

    def settle(self) -> None:
        """Until every server is there again.

        Raises:
            Exception: one is not.
        """
        for job in self._jobs:
            job.result()
        for host in self.hosts:
            if host.failure is not None:
                raise host.failure

    def _run(self) -> None:
        async def listen() -> None:
            for index in range(len(self.hosts)):
                server = await asyncio.start_server(
                    lambda reader, writer, index=index: self._serve(index, reader, writer), "127.0.0.1", 0
                )
                self.addresses.append(Address("127.0.0.1", server.sockets[0].getsockname()[1]))
            self._ready.set()

        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(listen())
        self._loop.run_forever()

    def _away(self, host: Host, action: Callable[..., Any], *arguments: Any) -> None:
        self._jobs.append(self._work.submit(action, *arguments))

    async def _serve(self, index: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host = self.hosts[index]
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            path = head.split(b" ", 2)[1].decode().split("?")[0]
            length = int(head.lower().split(b"content-length:")[1].split()[0])
            message = head + await reader.readexactly(length)
            fault = self.schedule.take(path, host, index in self._kept)
            gone = asyncio.create_task(reader.read(1))  # the client has hung up, so the server is hung up on
            answering = asyncio.create_task(self._answer(index, fault, message))
            await asyncio.wait({gone, answering}, return_when=asyncio.FIRST_COMPLETED)
            if fault == LATE:
                await gone
            gone.cancel()
            if not answering.done():
                answering.cancel()
                return
            answer = answering.result()
            if answer is None:
                writer.transport.abort()
                return
            if path == GENERATE and fault is None and answer.startswith(b"HTTP/1.1 200"):
                self._kept[index] = answer
            writer.write(answer)
            await writer.drain()
        except (OSError, EOFError):
            pass  # one side is gone
        finally:
            writer.close()

    async def _answer(self, index: int, fault: str | None, message: bytes) -> bytes | None:
        """What the client gets; None: a closed connection."""
        host, draw = self.hosts[index], self.schedule.random
        if fault == BREAK_OFF or (fault == BREAK_UPDATE and draw.random() < 0.5):
            return None
        if fault in (ERROR, REFUSE_UPDATE):
            return _message(500, {"error": {"message": "EngineCore encountered an issue"}})
        if fault == BUSY:
            return _message(503, {"error": {"message": "overloaded"}})
        if fault == OLD:
            return self._kept[index]
        killing = {
            KILL: lambda: self._kill(host, draw.choice(("api server", "engine core"))),
            KILL_IN_UPDATE: lambda: self._kill(host, draw.choice(("api server", "engine core"))),
            STOP: lambda: self._away(host, host.stop, draw.choice((1.0, 6.0))),
            KILL_TRAINER: self._kill_trainer,
        }.get(fault or "")
        answer = await _forward(host.server.address, message, killing)
        if fault in (LOSE, BREAK_UPDATE):
            return None
        if fault == TRUNCATE:
            return answer[: answer.find(b"\r\n\r\n") + 100]
        if fault == GARBAGE:
            return _raw(200, b"<html>bad gateway</html>")
        if fault in (SHAPES, UNFINISHED) and answer.startswith(b"HTTP/1.1 200"):
            content = json.loads(answer.split(b"\r\n\r\n", 1)[1])
            if fault == SHAPES:
                content["choices"][0]["logprobs"]["content"].pop()
            else:
                content["choices"][0]["finish_reason"] = None
            return _message(200, content)
        return answer

    def _kill(self, host: Host, victim: str) -> None:
        host.kill(victim)
        self._away(host, host.restart)

    def _kill_trainer(self) -> None:
        pid = self.schedule.trainer()
        if pid is not None:
            os.kill(pid, signal.SIGKILL)


async def _forward(address: Address, message: bytes, sent: Callable[[], None] | None) -> bytes:
    """The whole answer; `sent` is called when the request has been sent."""
    reader, writer = await asyncio.open_connection(address.host, address.port)
    try:
        writer.write(message)
        await writer.drain()
        if sent is not None:
            sent()
        return await reader.read(-1)
    finally:
        writer.transport.abort()


def _raw(status: int, payload: bytes) -> bytes:
    return b"HTTP/1.1 %d x\r\nContent-Length: %d\r\n\r\n" % (status, len(payload)) + payload


def _message(status: int, content: Any) -> bytes:
    return _raw(status, json.dumps(content).encode())
