"""The vLLM servers of a client: which serve, which gets the next request, and who finds out that one is dead."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from tulu_hpc.rollout.engine import ServersLostError
from tulu_hpc.rollout.http import Address, HttpError
from tulu_hpc.rollout.server import probe

_DEATH = 2  # questions in a row without an answer


@dataclass
class Remote:
    """A server as its client sees it.

    Attributes:
        alive: gets requests.
        version: of its weights; None while they are unknown or half replaced.
        has_generate: whether it has /inference/v1/generate, as far as known.
        in_flight: requests of this client.
        asked: requests of this client, ever.
        reports: changes of `version` that this client was told of afterwards, so that it cannot say when they were.
        why: it is not alive.
        dead: set when it is given up; its requests go elsewhere.
    """

    address: Address
    alive: bool = True
    version: int | None = None
    has_generate: bool = True
    in_flight: int = 0
    asked: int = 0
    reports: int = 0
    why: str = ""
    dead: asyncio.Event = field(default_factory=asyncio.Event)


class Pool:
    """Routes requests to the live server with the fewest of this client.

    Args:
        addresses: of the servers.
        max_in_flight: requests of this client at one server.
        probe_seconds: between two questions to a server that has requests; also their deadline.
    """

    def __init__(self, addresses: Sequence[Address], max_in_flight: int, probe_seconds: float) -> None:
        self.remotes = [Remote(address) for address in addresses]
        self.max_in_flight, self.probe_seconds = max_in_flight, probe_seconds
        self.updating = False  # weights are being sent: a server may be slow to answer, and is not asked
        self._changed = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._users = 0
        self._watchers: list[asyncio.Task[None]] = []

    @property
    def serving(self) -> list[Remote]:
        """Those that get requests."""
        return [remote for remote in self.remotes if remote.alive]

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Ask the engines of busy servers whether they live, for as long as this is open."""
        if self._users == 0:
            self._loop, self._changed = asyncio.get_running_loop(), asyncio.Event()
            for remote in self.remotes:
                remote.dead = asyncio.Event()
            self._watchers = [asyncio.create_task(self._watch(remote)) for remote in self.remotes]
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if self._users == 0:
                self._loop = None
                for watcher in self._watchers:
                    watcher.cancel()
                await asyncio.gather(*self._watchers, return_exceptions=True)

    async def take(self, name: str) -> Remote:
        """A place at the live server with the fewest requests; waits for one.

        Raises:
            ServersLostError: no server is left.
        """
        while True:
            serving = self.serving
            if not serving:
                reasons = "; ".join(remote.why or f"{remote.address}: does not serve" for remote in self.remotes)
                raise ServersLostError(f"no vLLM server is left for request {name!r}: {reasons}", {})
            remote = min(serving, key=lambda candidate: (candidate.in_flight, candidate.asked))
            if remote.in_flight < self.max_in_flight:
                remote.in_flight += 1
                remote.asked += 1
                return remote
            self._changed.clear()
            await self._changed.wait()

    def give_back(self, remote: Remote) -> None:
        """The place is free again."""
        remote.in_flight -= 1
        self._changed.set()

    def exclude(self, remote: Remote, why: str) -> None:
        """No requests any more until `admit`; those that it has go elsewhere. From any thread."""
        if remote.alive:
            remote.why = why
        remote.alive, remote.version = False, None
        self._tell(remote.dead)

    def admit(self, remote: Remote, version: int | None) -> None:
        """It serves, with these weights."""
        if not remote.alive:
            remote.alive, remote.why, remote.dead = True, "", asyncio.Event()
        remote.version = version
        self._tell(self._changed)

    def _tell(self, event: asyncio.Event) -> None:
        loop = self._loop
        if loop is not None:
            loop.call_soon_threadsafe(event.set)
            loop.call_soon_threadsafe(self._changed.set)

    async def suspect(self, remote: Remote, why: str) -> None:
        """Find out whether a server that failed a request still serves."""
        if remote.alive:
            try:
                await probe(remote.address, self.probe_seconds)
            except HttpError as error:
                self.exclude(remote, f"{why}; then its engine did not answer: {error}")

    async def _watch(self, remote: Remote) -> None:
        failures = 0
        while True:
            await asyncio.sleep(self.probe_seconds)
            if remote.in_flight == 0 or not remote.alive or self.updating:
                failures = 0
                continue
            try:
                await probe(remote.address, self.probe_seconds)
                failures = 0
            except HttpError as error:
                failures += 1
                if failures == _DEATH:
                    self.exclude(remote, f"{remote.address}: its engine does not answer any more: {error}")
