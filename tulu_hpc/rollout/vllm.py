"""The vLLM engine: completions from one or more servers, asked over HTTP.

A request is with at most one server at a time and yields one completion: it is asked again only after its last attempt
has failed and its connection is closed, and an answer to any other attempt is dropped. Routing is in `vllm_pool`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from tulu_hpc.rollout import vllm_wire as wire
from tulu_hpc.rollout.engine import Completion, EngineError, GenerationStats, Request, Sampling, ServersLostError
from tulu_hpc.rollout.http import Address, HttpError
from tulu_hpc.rollout.revival import revive, silence
from tulu_hpc.rollout.server import LogprobsMode, Server
from tulu_hpc.rollout.vllm_attempt import Attempt, Attempts, OtherAnswerError, exchange, score
from tulu_hpc.rollout.vllm_pool import Pool, Remote
from tulu_hpc.rollout.weight_sync import Channel, push_checkpoint, push_gloo

Answer = TypeVar("Answer")

_REFUSED = (400, 422)  # the request itself is wrong: another server would refuse it too


class VllmEngine:
    """Client of vLLM servers. Several calls of `generate` may be under way at once, in one event loop.

    Args:
        addresses: of the servers.
        vocab_size: token ids beyond it are an error.
        max_in_flight: requests of this client at one server.
        deadline_seconds: of one attempt at one request.
        attempts: per request, not counting those that a server's death ended.
        probe_seconds: between two questions to each server while requests are with it; also their deadline.
        logprobs_mode: how the servers were started. `raw_logprobs` gives the policy's log-probs at temperature 1 (and
            for greedy answers), `processed_logprobs` at any other. None: nobody reads the log-probs, any will do.
        own: servers that this process started, restarted when they are dead; parallel to the first addresses.
        start_seconds: for one of `own` to start, and for servers elsewhere to come back when none is left.
        channel: how weights travel to a server: `Channel` (gloo), or one of `nccl_sync`.
        incidents: where to note what went wrong and was made good; several clients may share it.
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
        channel: Callable[[Address, float, Callable[[int], None]], Channel] = Channel,
        incidents: list[str] | None = None,
    ) -> None:
        if not addresses:
            raise ValueError("no vLLM servers")
        if max_in_flight < 1 or attempts < 1:
            raise ValueError(f"max_in_flight {max_in_flight} and attempts {attempts} must be at least 1")
        self.vocab_size, self.deadline_seconds, self.attempts = vocab_size, deadline_seconds, attempts
        self.logprobs_mode, self.own, self.start_seconds = logprobs_mode, list(own), start_seconds
        self.bucket_bytes = bucket_bytes
        self.pool = Pool(addresses, max_in_flight, probe_seconds)
        self.stats = GenerationStats()
        self.retries = 0  # attempts that failed and were made again
        self.late_answers = 0  # answers to other attempts, dropped
        self.incidents: list[str] = [] if incidents is None else incidents
        self._channels = [
            channel(remote.address, sync_timeout_seconds, partial(setattr, remote, "version"))
            for remote in self.pool.remotes
        ]

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
        async with self.pool.watching():
            tasks = [asyncio.create_task(self._complete(Attempts(each, place))) for place, each in enumerate(requests)]
            for place, asked in enumerate(tasks):
                asked.add_done_callback(partial(_tell, finished, place))
            try:
                if tasks:
                    await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
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
        queue: asyncio.Queue[tuple[int, Completion] | None] = asyncio.Queue()
        whole = asyncio.create_task(self.generate(requests, lambda *found: queue.put_nowait(found)))
        whole.add_done_callback(lambda _: queue.put_nowait(None))
        try:
            while (found := await queue.get()) is not None:
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

    async def _complete(self, attempts: Attempts) -> Completion:
        def ask(remote: Remote, attempt: Attempt) -> Coroutine[Any, Any, Completion]:
            return exchange(remote, attempt, self.vocab_size, self.deadline_seconds)

        return await self._persist(attempts, ask)

    async def _persist(
        self, attempts: Attempts, ask: Callable[[Remote, Attempt], Coroutine[Any, Any, Answer]]
    ) -> Answer:
        """The answer to a request, after as many attempts as it takes."""
        problems: list[str] = []
        deaths = 0
        while len(problems) - deaths < self.attempts:
            attempt = attempts.next()
            remote = await self.pool.take(attempts.name)
            try:
                return await _until_dead(remote, ask(remote, attempt))
            except (HttpError, wire.MalformedError) as error:
                if isinstance(error, HttpError) and error.status in _REFUSED:
                    raise ValueError(f"request {attempts.name!r} was refused: {error}") from None
                problems.append(str(error))
                self.retries += 1
                self.late_answers += isinstance(error, OtherAnswerError)
                if isinstance(error, wire.UnknownWeightsError):
                    self.pool.exclude(remote, str(error))  # until the next update has reached it
                await self.pool.suspect(remote, str(error))
                deaths += not remote.alive  # the death of a server is not the request's fault
                fate = "" if remote.alive else "; the server gets no requests until it has been sent weights"
                self.incidents.append(f"attempt {attempt.id} failed: {error}{fate}")
            finally:
                self.pool.give_back(remote)
        raise EngineError(f"request {attempts.name!r} failed {self.attempts} times: " + "; ".join(problems))

    def take_incidents(self, most: int = 5) -> list[str]:
        """What went wrong since the last call, one line each with server and attempt; after `most` only how many."""
        found = self.incidents[:]
        del self.incidents[: len(found)]  # others may add meanwhile
        more = len(found) - most
        return [*found[:most], f"{more} more attempts failed"] if more > 0 else found

    async def score(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probs of given tokens (all but the first) under the engine's model at temperature 1, in one pass each.

        Raises:
            ServersLostError, EngineError: as `generate`.
        """

        async def one(place: int, tokens: Sequence[int]) -> list[float]:
            attempts = Attempts(Request(tokens, Sampling(1), id=f"score {place}"), place)
            return await self._persist(attempts, partial(score, seconds=self.deadline_seconds))

        async with self.pool.watching():
            tasks = [asyncio.create_task(one(place, tokens)) for place, tokens in enumerate(prompts)]
            try:
                return list(await asyncio.gather(*tasks))
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    # Servers

    @property
    def addresses(self) -> list[Address]:
        """Of all servers, dead ones included."""
        return [remote.address for remote in self.pool.remotes]

    @property
    def updating(self) -> bool:
        """Weights are being sent, by this client or another: servers may be slow, and are not asked if they live."""
        return self.pool.updating

    @updating.setter
    def updating(self, updating: bool) -> None:
        self.pool.updating = updating

    def serving(self) -> list[tuple[Address, int | None]]:
        """Live servers with their version, None before the first update."""
        return [(remote.address, remote.version) for remote in self.pool.serving]

    def missing(self) -> list[str]:
        """Why each server that gets no requests gets none."""
        return [remote.why for remote in self.pool.remotes if not remote.alive]

    async def torn(self) -> list[str]:
        """Why each server that answers, but gets no requests, gets none: it can be sent weights at once."""
        lost = [remote for remote in self.pool.remotes if not remote.alive]
        found = await asyncio.gather(*(silence(remote.address, self.pool.probe_seconds) for remote in lost))
        return [remote.why for remote, problem in zip(lost, found, strict=True) if problem is None]

    def use(self, states: Sequence[tuple[Address, int | None]]) -> None:
        """Take over what the client that sends the weights knows: servers that serve, and their versions.

        May be called from another thread than that of the requests, which go on.
        """
        versions = dict(states)
        for remote in self.pool.remotes:
            if remote.address not in versions:
                self.pool.exclude(remote, f"{remote.address}: did not take the last weights")
                continue
            if remote.version != versions[remote.address]:
                remote.reports += 1
            self.pool.admit(remote, versions[remote.address])

    async def health(self) -> dict[str, Any]:
        """Servers that answer, and their weights.

        Raises:
            EngineError: none does.
        """
        remotes = self.pool.remotes
        answers = await asyncio.gather(*(silence(remote.address, self.pool.probe_seconds) for remote in remotes))
        serving = [str(remote.address) for remote, answer in zip(remotes, answers, strict=True) if answer is None]
        if not serving:
            raise EngineError("no vLLM server answers: " + "; ".join(map(str, answers)))
        return {
            "engine": "vllm",
            "serving": serving,
            "silent": [str(remote.address) for remote in remotes if str(remote.address) not in serving],
            "policy_version": {str(remote.address): remote.version for remote in remotes},
            "sequences": self.stats.sequences,
        }

    async def revive(self, waiting: Callable[[str], None] = lambda reason: None) -> list[str]:
        """Start those of our own servers again that are dead; return when at least one server answers, ours or not.

        Args:
            waiting: told why, when none answers at first.

        Returns:
            Addresses of those that were started again. They and all others that were dead need an update; those that
            are still starting then get the one after it.

        Raises:
            EngineError: none answers within `start_seconds`.
        """
        dead = await revive(self.addresses, self.own, self.start_seconds, self.pool.probe_seconds, waiting)
        for remote, channel in zip(self.pool.remotes, self._channels, strict=True):
            if remote.address in dead:
                channel.close()
        return [str(address) for address in dead]

    # Weights

    async def update_weights(
        self, tensors: Iterable[tuple[str, Tensor]] | None, version: int, *, only_missing: bool = False
    ) -> None:
        """Send all weights to every server; one that fails serves no more until a later update reaches it.

        Args:
            only_missing: leave out servers that have this version already.

        Raises:
            EngineError: no server has them.
            ValueError: no tensors.
        """
        if tensors is None:
            raise ValueError("vLLM servers hold weights of their own: give them tensors")
        await self._update(
            version, only_missing, lambda channels: push_gloo(channels, tensors, version, self.bucket_bytes)
        )

    async def load_checkpoint(self, directory: Path, version: int, *, only_missing: bool = False) -> None:
        """The same from a Hugging Face directory that the servers can read.

        Raises:
            EngineError: no server has them.
            ValueError: there are no safetensors in it.
        """
        await self._update(version, only_missing, lambda channels: push_checkpoint(channels, directory, version))

    async def _update(
        self, version: int, only_missing: bool, push: Callable[[list[Channel]], Awaitable[list[str | None]]]
    ) -> None:
        pairs = zip(self.pool.remotes, self._channels, strict=True)
        chosen = [pair for pair in pairs if not (only_missing and pair[0].alive and pair[0].version == version)]
        self.pool.updating = True
        try:
            problems = await push([channel for _, channel in chosen])
        finally:
            self.pool.updating = False
        for (remote, _), problem in zip(chosen, problems, strict=True):
            if problem is None:
                self.pool.admit(remote, version)
            else:
                self.pool.exclude(remote, problem)
                remote.why = problem  # newer than what it was excluded for before
        if not self.pool.serving:
            raise EngineError(f"no vLLM server took the weights {version}: " + "; ".join(map(str, problems)))


async def _until_dead(remote: Remote, asking: Coroutine[Any, Any, Answer]) -> Answer:
    """The answer, unless the server is given up before it comes."""
    task, death = asyncio.create_task(asking), asyncio.create_task(remote.dead.wait())
    try:
        await asyncio.wait({task, death}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise HttpError(remote.why)
    finally:
        task.cancel()
        death.cancel()
        await asyncio.gather(task, death, return_exceptions=True)  # its connection is closed after this


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
