"""The vLLM engine: completions from one or more servers, asked over HTTP.

A request is with at most one server at a time and yields one completion: it is asked again only after its last attempt
has failed and its connection is closed. Routing: the live server with the fewest requests of this client.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from tulu_hpc.rollout import vllm_wire as wire
from tulu_hpc.rollout.engine import Completion, EngineError, GenerationStats, Request, ServersLostError
from tulu_hpc.rollout.http import Address, HttpError, request
from tulu_hpc.rollout.server import GENERATE, LogprobsMode, Server, probe
from tulu_hpc.rollout.weight_sync import Channel, push_checkpoint, push_gloo

_REFUSED = (400, 422)  # the request itself is wrong: another server would refuse it too
_ABSENT = (403, 404, 405)  # the endpoint is not there


@dataclass
class _Remote:
    """A server as this client sees it; `version` is None while its weights are unknown or half replaced."""

    address: Address
    alive: bool = True
    version: int | None = None
    has_generate: bool = True
    in_flight: int = 0
    dead: asyncio.Event = field(default_factory=asyncio.Event)


class VllmEngine:
    """Client of vLLM servers.

    Args:
        addresses: of the servers.
        vocab_size: token ids beyond it are an error.
        max_in_flight: requests of this client at one server.
        deadline_seconds: of one attempt at one request.
        attempts: per request.
        probe_seconds: between two questions to each server while requests are with it; also their deadline.
        logprobs_mode: how the servers were started. `raw_logprobs` gives the policy's log-probs at temperature 1 (and
            for greedy answers), `processed_logprobs` at any other. None: nobody reads the log-probs, any will do.
        own: servers that this process started, restarted when they are dead; parallel to the first addresses.
        start_seconds: for one of `own` to start.
    """

    def __init__(
        self,
        addresses: Sequence[Address],
        *,
        vocab_size: int,
        max_in_flight: int = 256,
        deadline_seconds: float = 600.0,
        attempts: int = 3,
        probe_seconds: float = 5.0,
        logprobs_mode: LogprobsMode | None = "raw_logprobs",
        own: Sequence[Server] = (),
        start_seconds: float = 600.0,
        sync_timeout_seconds: float = 60.0,
        bucket_bytes: int = 256 << 20,
    ) -> None:
        if not addresses:
            raise ValueError("no vLLM servers")
        if max_in_flight < 1 or attempts < 1:
            raise ValueError(f"max_in_flight {max_in_flight} and attempts {attempts} must be at least 1")
        self.vocab_size, self.max_in_flight = vocab_size, max_in_flight
        self.deadline_seconds, self.attempts, self.probe_seconds = deadline_seconds, attempts, probe_seconds
        self.logprobs_mode, self.own, self.start_seconds = logprobs_mode, list(own), start_seconds
        self.bucket_bytes = bucket_bytes
        self.stats = GenerationStats()
        self.retries = 0  # attempts that failed and were made again
        self.updating = False  # weights are being sent: a server may be slow to answer, and is not asked
        self._remotes = [_Remote(address) for address in addresses]
        self._channels = {address: Channel(address, sync_timeout_seconds) for address in addresses}
        self._free: asyncio.Condition

    # Generation

    async def generate(
        self, requests: Sequence[Request], finished: Callable[[int, Completion], None] | None = None
    ) -> list[Completion]:
        """Completions in the order of the requests.

        Args:
            finished: told of each completion, with the place of its request, as soon as it is there.

        Raises:
            ValueError: a request that the servers cannot serve as it is meant.
            ServersLostError: no server is left, with the completions that came before.
            EngineError: a request failed at every attempt, each time at a server that serves.
        """
        for each in requests:
            self._check(each)
        started = time.perf_counter()
        self._free = asyncio.Condition()
        for remote in self._remotes:
            remote.in_flight, remote.dead = 0, asyncio.Event()
            if not remote.alive:
                remote.dead.set()
        probes = [asyncio.create_task(self._watch(remote)) for remote in self._remotes if remote.alive]
        tasks = [asyncio.create_task(self._complete(each)) for each in requests]
        for place, asked in enumerate(tasks):
            asked.add_done_callback(partial(_tell, finished, place))
        try:
            if tasks:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for task in (*tasks, *probes):
                task.cancel()
            await asyncio.gather(*tasks, *probes, return_exceptions=True)
        done = {index: task for index, task in enumerate(tasks) if not task.cancelled()}
        completions = {index: task.result() for index, task in done.items() if task.exception() is None}
        self._count(requests, list(completions.values()), time.perf_counter() - started)
        failures = [task.exception() for task in done.values() if task.exception() is not None]
        for failure in sorted(failures, key=lambda each: isinstance(each, ServersLostError)):
            if isinstance(failure, ServersLostError):
                raise ServersLostError(str(failure), completions)
            assert failure is not None
            raise failure
        return [completions[index] for index in range(len(requests))]

    async def generate_stream(self, requests: Sequence[Request]) -> AsyncIterator[tuple[int, Completion]]:
        """Each completion with the place of its request, as soon as it is there.

        Raises:
            ValueError, ServersLostError, EngineError: as `generate`, after what came before has been handed out.
        """
        ended = object()
        queue: asyncio.Queue[Any] = asyncio.Queue()
        whole = asyncio.create_task(self.generate(requests, lambda *found: queue.put_nowait(found)))
        whole.add_done_callback(lambda _: queue.put_nowait(ended))
        try:
            while (found := await queue.get()) is not ended:
                yield found
            await whole
        finally:  # also when the caller has had enough
            whole.cancel()
            await asyncio.gather(whole, return_exceptions=True)

    async def generate_groups(
        self, requests: Sequence[Request], size: int
    ) -> AsyncIterator[tuple[int, list[Completion]]]:
        """The same for groups of `size` requests that follow each other: each group once all its answers are there.

        Raises:
            ValueError: the requests are no whole number of groups; and as `generate`.
        """
        if size < 1 or len(requests) % size:
            raise ValueError(f"{len(requests)} requests are no groups of {size}")
        groups: dict[int, dict[int, Completion]] = {}
        async for place, completion in self.generate_stream(requests):
            group = groups.setdefault(place // size, {})
            group[place % size] = completion
            if len(group) == size:
                yield place // size, [found for _, found in sorted(groups.pop(place // size).items())]

    def _check(self, each: Request) -> None:
        sampling = each.sampling
        if not each.token_ids:
            raise ValueError(f"request {each.id!r}: the prompt is empty")
        if min(each.token_ids) < 0 or max(each.token_ids) >= self.vocab_size:
            raise ValueError(f"request {each.id!r}: a token id is outside the vocabulary of {self.vocab_size}")
        mode = self.logprobs_mode
        problem = logprobs_problem(mode, sampling.temperature, sampling.top_p) if mode else None
        if problem:
            raise ValueError(f"request {each.id!r}: {problem}")

    def _count(self, requests: Sequence[Request], completions: Sequence[Completion], seconds: float) -> None:
        self.stats.sequences += len(completions)
        self.stats.prompt_tokens += sum(len(each.token_ids) for each in requests)
        self.stats.new_tokens += sum(len(each.token_ids) for each in completions)
        self.stats.seconds += seconds

    async def _complete(self, each: Request) -> Completion:
        problems: list[str] = []
        lost_servers = 0
        while len(problems) - lost_servers < self.attempts:
            remote = await self._take(each, problems)
            try:
                return await self._ask(remote, each)
            except (HttpError, wire.MalformedError) as error:
                if isinstance(error, HttpError) and error.status in _REFUSED:
                    raise ValueError(f"request {each.id!r} was refused: {error}") from None
                problems.append(str(error))
                self.retries += 1
                await self._suspect(remote)
                lost_servers += not remote.alive  # the death of a server is not the request's fault
            finally:
                await self._give_back(remote)
        raise EngineError(f"request {each.id!r} failed {self.attempts} times: " + "; ".join(problems))

    async def _take(self, each: Request, problems: Sequence[str]) -> _Remote:
        """A place at the live server with the fewest requests; waits for one."""
        async with self._free:
            while True:
                serving = [remote for remote in self._remotes if remote.alive]
                if not serving:
                    last = f": {problems[-1]}" if problems else ""
                    raise ServersLostError(f"no vLLM server is left for request {each.id!r}{last}", {})
                remote = min(serving, key=lambda candidate: candidate.in_flight)
                if remote.in_flight < self.max_in_flight:
                    remote.in_flight += 1
                    return remote
                await self._free.wait()

    async def _give_back(self, remote: _Remote) -> None:
        async with self._free:
            remote.in_flight -= 1
            self._free.notify_all()

    async def _ask(self, remote: _Remote, each: Request) -> Completion:
        """One attempt, given up when the server dies."""
        attempt = asyncio.create_task(self._exchange(remote, each))
        death = asyncio.create_task(remote.dead.wait())
        try:
            await asyncio.wait({attempt, death}, return_when=asyncio.FIRST_COMPLETED)
            if attempt.done():
                return attempt.result()
            raise HttpError(f"{remote.address}: does not answer any more")
        finally:
            attempt.cancel()
            death.cancel()
            await asyncio.gather(attempt, death, return_exceptions=True)  # its connection is closed after this

    async def _exchange(self, remote: _Remote, each: Request) -> Completion:
        if remote.has_generate:
            try:
                answer = await self._post(remote, GENERATE, wire.generate_body(each))
                return wire.parse_generate(answer, each, self.vocab_size, remote.version)
            except HttpError as error:
                if error.status not in _ABSENT:
                    raise
                remote.has_generate = False
        answer = await self._post(remote, wire.COMPLETIONS, wire.completions_body(each))
        return wire.parse_completions(answer, each, self.vocab_size, remote.version)

    async def _post(self, remote: _Remote, path: str, body: Any) -> Any:
        return await request(remote.address, "POST", path, body, seconds=self.deadline_seconds)

    async def score(self, prompts: Sequence[Sequence[int]], seconds: float = 60.0) -> list[list[float]]:
        """Log-probs of given tokens (all but the first) under the engine's model at temperature 1, in one pass each.

        Raises:
            EngineError: no server answers properly.
        """
        serving = [remote.address for remote in self._remotes if remote.alive]
        if not serving:
            raise EngineError("no vLLM server is left")
        scored = []
        for tokens in prompts:
            body = {"token_ids": list(tokens), "sampling_params": {"max_tokens": 1, "prompt_logprobs": 0}}
            try:
                answer = await request(serving[0], "POST", GENERATE, body, seconds=seconds)
                entries = answer["prompt_logprobs"][1:]
                scored.append(
                    [float(entry[str(token)]["logprob"]) for token, entry in zip(tokens[1:], entries, strict=True)]
                )
            except (HttpError, KeyError, TypeError, ValueError) as error:
                raise EngineError(f"{serving[0]}: cannot score: {error!r}") from None
        return scored

    # Liveness

    async def _suspect(self, remote: _Remote) -> None:
        """Find out whether a server that failed a request still serves."""
        if remote.alive:
            try:
                await probe(remote.address, self.probe_seconds)
            except HttpError:
                await self._bury(remote)

    async def _watch(self, remote: _Remote) -> None:
        """Ask the engine from time to time; two failures in a row are a death."""
        failures = 0
        while failures < 2:
            await asyncio.sleep(self.probe_seconds)
            if remote.in_flight == 0 or self.updating:
                continue
            try:
                await probe(remote.address, self.probe_seconds)
                failures = 0
            except HttpError:
                failures += 1
        await self._bury(remote)

    async def _bury(self, remote: _Remote) -> None:
        remote.alive, remote.version = False, None
        remote.dead.set()
        async with self._free:
            self._free.notify_all()

    @property
    def addresses(self) -> list[Address]:
        """Of all servers, dead ones included."""
        return [remote.address for remote in self._remotes]

    def serving(self) -> list[tuple[Address, int | None]]:
        """Live servers with their version, None before the first update."""
        return [(remote.address, remote.version) for remote in self._remotes if remote.alive]

    def use(self, states: Sequence[tuple[Address, int | None]]) -> None:
        """Take over what the client that sends the weights knows: servers that serve, and their versions."""
        versions = dict(states)
        for remote in self._remotes:
            remote.alive = remote.address in versions
            remote.version = versions.get(remote.address)

    async def health(self) -> dict[str, Any]:
        """Servers that answer, and their weights.

        Raises:
            EngineError: none does.
        """
        answers = await asyncio.gather(
            *(probe(remote.address, self.probe_seconds) for remote in self._remotes), return_exceptions=True
        )
        serving = [str(r.address) for r, answer in zip(self._remotes, answers, strict=True) if answer is None]
        if not serving:
            raise EngineError("no vLLM server answers: " + "; ".join(str(answer) for answer in answers))
        return {
            "engine": "vllm",
            "serving": serving,
            "silent": [str(remote.address) for remote in self._remotes if str(remote.address) not in serving],
            "policy_version": {str(remote.address): remote.version for remote in self._remotes},
            "sequences": self.stats.sequences,
        }

    # Weights

    async def update_weights(self, tensors: Iterable[tuple[str, Tensor]] | None, version: int) -> None:
        """Send all weights to every server over gloo; one that fails serves no more until a later update reaches it.

        Raises:
            EngineError: no server took them.
            ValueError: no tensors.
        """
        if tensors is None:
            raise ValueError("vLLM servers hold weights of their own: give them tensors")
        channels = [self._channels[remote.address] for remote in self._remotes]
        self._settle(await push_gloo(channels, tensors, version, self.bucket_bytes), version)

    async def load_checkpoint(self, directory: Path, version: int) -> None:
        """The same from a Hugging Face directory that the servers can read.

        Raises:
            EngineError: no server took it.
            ValueError: there are no safetensors in it.
        """
        channels = [self._channels[remote.address] for remote in self._remotes]
        self._settle(await push_checkpoint(channels, directory, version), version)

    def _settle(self, problems: Sequence[str | None], version: int) -> None:
        for remote, problem in zip(self._remotes, problems, strict=True):
            remote.alive, remote.version = problem is None, version if problem is None else None
        if all(problem is not None for problem in problems):
            raise EngineError(f"no vLLM server took the weights {version}: " + "; ".join(map(str, problems)))

    async def revive(self) -> list[str]:
        """Restart those of our own servers that do not answer; their addresses. They need an update afterwards.

        Raises:
            EngineError: one does not start.
        """

        async def one(server: Server) -> str | None:
            try:
                await probe(server.address, self.probe_seconds)
                return None
            except HttpError:
                self._channels[server.address].close()
                await asyncio.to_thread(server.restart)
                await server.wait_ready(self.start_seconds)
                return str(server.address)

        return [each for each in await asyncio.gather(*map(one, self.own)) if each]


def _tell(finished: Callable[[int, Completion], None] | None, place: int, ended: asyncio.Task[Completion]) -> None:
    if finished is not None and not ended.cancelled() and ended.exception() is None:
        finished(place, ended.result())


def logprobs_problem(mode: LogprobsMode, temperature: float, top_p: float) -> str | None:
    """Why servers of this mode do not return log-probs at this temperature over the whole vocabulary, or None."""
    if mode == "raw_logprobs":
        if temperature not in (0, 1):
            return f"temperature {temperature} needs servers with --logprobs-mode processed_logprobs"
    elif temperature == 0:
        return "greedy answers need servers with --logprobs-mode raw_logprobs"
    elif top_p < 1:
        return f"top_p {top_p} with a temperature other than 1: vLLM's log-probs would be renormalised"
    return None


def logprobs_mode_for(temperature: float) -> LogprobsMode:
    """The mode of servers for this temperature."""
    return "raw_logprobs" if temperature in (0, 1) else "processed_logprobs"
