"""vLLM as the rollout engine of a training run: servers, a client per model replica, weights from all ranks.

Global rank 0 starts the servers (unless they run already) and sends the weights; the leader of each replica asks for
its replica's completions. Every failure is told to all ranks, so none waits for another that has given up.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Coroutine, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakSet

from tulu_hpc.config.loader import ConfigError
from tulu_hpc.config.schema import RlvrConfig
from tulu_hpc.config.sections import VllmSection
from tulu_hpc.models.convert import iter_hf_tensors, save_hf
from tulu_hpc.parallel.device import default_device
from tulu_hpc.parallel.layout import Groups
from tulu_hpc.rollout.engine import Completion, EngineError, Request, ServersLostError
from tulu_hpc.rollout.http import Address
from tulu_hpc.rollout.nccl import Library, NcclError
from tulu_hpc.rollout.nccl_sync import NOT_RUN, NcclChannel
from tulu_hpc.rollout.server import GLOO_BACKEND, NCCL_BACKEND, Server, ServerOptions, check_private
from tulu_hpc.rollout.vllm import VllmEngine, logprobs_mode_for, logprobs_problem
from tulu_hpc.rollout.weight_sync import Channel
from tulu_hpc.stages.rollouts import broadcast_in_replica, is_replica_leader, say_incidents
from tulu_hpc.stages.training_run import Run
from tulu_hpc.training.trainer import DTYPES, Trainer

_LATER_SECONDS = 10.0  # the trainer gives an update up before the worker does, and says why
_ATTEMPTS = 3  # at sending weights, and at generating, each after restarting what has died


def check_served(config: RlvrConfig) -> None:
    """Refuse settings that vLLM cannot serve.

    Raises:
        ConfigError: naming the keys.
    """
    rollout, vllm = config.rollout, config.rollout.vllm
    problem = logprobs_problem(logprobs_mode_for(rollout.temperature), rollout.temperature, rollout.top_p)
    if problem:
        raise ConfigError(f"rollout.temperature and rollout.top_p with rollout.engine = vllm: {problem}")
    try:
        for url in vllm.servers:
            check_private(Address.parse(url).host)
        check_private(vllm.host)
    except ValueError as error:
        raise ConfigError(f"rollout.vllm: {error}") from None
    if vllm.sync == "nccl":
        check_nccl(vllm.nccl_library)


def check_nccl(library: str | None) -> None:
    """Refuse NCCL where it cannot run.

    Raises:
        ConfigError: no GPU, or no library.
    """
    if default_device().type != "cuda":
        raise ConfigError("rollout.vllm.sync = nccl needs GPUs, and there is none here; gloo and checkpoint need none")
    try:
        Library(library)
    except NcclError as error:
        raise ConfigError(f"rollout.vllm.sync = nccl: {error}") from None


def channel_of(vllm: VllmSection) -> Callable[[Address, float, Callable[[int], None]], Channel]:
    """How weights travel to a server."""
    if vllm.sync != "nccl":
        return Channel
    return partial(NcclChannel, library=vllm.nccl_library, bucket_bytes=vllm.bucket_mib << 20, device=default_device())


def server_options(config: RlvrConfig) -> ServerOptions:
    """How the configuration's servers are started."""
    rollout, vllm = config.rollout, config.rollout.vllm
    return ServerOptions(
        python=str(Path(vllm.python).absolute()),  # not resolved: the link names the environment
        model=config.model.path,
        dtype=config.model.dtype,
        max_model_len=config.data.max_length + rollout.max_new_tokens,
        max_sequences=rollout.max_sequences,
        host=vllm.host,
        tensor_parallel=vllm.tensor_parallel,
        logprobs_mode=logprobs_mode_for(rollout.temperature),
        device="cuda" if default_device().type == "cuda" else "cpu",
        kv_cache_mib=vllm.kv_cache_mib,
        weight_backend=NCCL_BACKEND if vllm.sync == "nccl" else GLOO_BACKEND,
        sync_seconds=vllm.sync_timeout_seconds + _LATER_SECONDS,
        extra_args=vllm.extra_args,
    )


def start_servers(run: Run, config: RlvrConfig, stack: ExitStack) -> tuple[list[Address], list[Server]]:
    """Addresses of the servers on every rank, and on rank 0 those that were started; they end with `stack`.

    They start while the model is loaded: nobody waits here until they serve.

    Raises:
        EngineError: on every rank, when they could not be started.
    """
    vllm = config.rollout.vllm
    if vllm.servers:
        return [Address.parse(url) for url in vllm.servers], []
    own: list[Server] = []
    failure = None
    if run.groups.is_main:
        try:
            for number in range(vllm.local_servers):
                server = Server(server_options(config), run.directory.root / "rollout" / f"server-{number}.log")
                stack.callback(server.stop)
                own.append(server)
        except (EngineError, OSError, ValueError) as error:
            failure = str(error)
    failure, addresses = run.groups.broadcast_object((failure, [server.address for server in own]))
    if failure:
        raise EngineError(failure)
    return addresses, own


class ServedEngine:
    """What a rollout step needs of an engine. All methods are collective over the job.

    Attributes:
        version: of the trainer's weights; when it differs from what the servers hold, weights are sent.
    """

    def __init__(
        self, run: Run, config: RlvrConfig, trainer: Trainer, addresses: Sequence[Address], own: Sequence[Server]
    ) -> None:
        self.run, self.config, self.trainer, self.own = run, config, trainer, list(own)
        self.version = 0
        self._held: int | None = None
        self._ready = False
        self._incidents: list[str] = []  # of all clients of this process
        self._clients: WeakSet[VllmEngine] = WeakSet()
        self.client = self.new_client(addresses, own)
        if config.rollout.vllm.sync == "nccl":
            run.say(f"weights go to the rollout servers over {Library(config.rollout.vllm.nccl_library)}: {NOT_RUN}")

    def new_client(self, addresses: Sequence[Address], own: Sequence[Server] = ()) -> VllmEngine:
        """A client of its own state for these servers; `own` are restarted by it when they are dead."""
        vllm = self.config.rollout.vllm
        client = VllmEngine(
            addresses,
            vocab_size=self.run.architecture.vocab_size,
            max_in_flight=self.config.rollout.max_sequences,
            deadline_seconds=vllm.deadline_seconds,
            attempts=vllm.attempts,
            probe_seconds=vllm.probe_seconds,
            logprobs_mode=logprobs_mode_for(self.config.rollout.temperature),
            own=own,
            start_seconds=vllm.start_seconds,
            sync_timeout_seconds=vllm.sync_timeout_seconds,
            bucket_bytes=vllm.bucket_mib << 20,
            channel=channel_of(vllm),
            incidents=self._incidents,
        )
        self._clients.add(client)
        return client

    @property
    def groups(self) -> Groups:
        return self.run.groups

    @property
    def is_behind(self) -> bool:
        """Whether the servers hold other weights than the trainer's."""
        return self._held != self.version

    def release(self) -> None:
        """Nothing to give back: the servers have memory of their own."""

    def generate_batch(self, requests: Sequence[Request]) -> list[Completion]:
        """Completions of this replica's requests under the trainer's weights, on every rank of the replica.

        When all servers are lost, those of ours are started again and only what is missing is asked for again.

        Raises:
            EngineError: on every rank.
        """
        if self.is_behind:
            self.send_weights()
        done: dict[int, Completion] = {}
        self._persist(lambda: self._generate(requests, done), is_replica_leader(self.groups))
        self.say_incidents()
        leader = is_replica_leader(self.groups)
        ordered = [done[index] for index in range(len(requests))] if leader else None
        return list(broadcast_in_replica(self.groups, ordered))

    def _generate(self, requests: Sequence[Request], done: dict[int, Completion]) -> str | None:
        """Fill `done`; what was lost on the way, or None."""
        missing = [index for index in range(len(requests)) if index not in done]
        found: dict[int, Completion]
        lost = None
        try:
            found = dict(enumerate(asyncio.run(self.client.generate([requests[index] for index in missing]))))
        except ServersLostError as error:
            found, lost = error.completions, str(error)
        done.update({missing[place]: completion for place, completion in found.items()})
        return lost

    def _persist(self, ask: Callable[[], str | None], mine: bool) -> None:
        """Call `ask` where it is `mine`, until it does not say that servers were lost; they are replaced in between.

        Raises:
            EngineError: on every rank.
        """
        for _ in range(_ATTEMPTS):
            lost = self._everywhere(ask, mine)
            if not lost:
                return
            self.run.say(f"rollout servers lost: {lost}")
            self.send_weights()
        logs = f"; see {self.run.directory.root / 'rollout'}" if not self.config.rollout.vllm.servers else ""
        raise EngineError(f"rollout servers were lost {_ATTEMPTS} times in one step{logs}: {lost}")

    def say_incidents(self) -> None:
        """Print what went wrong on the way to the completions and was made good, of all replicas."""
        say_incidents(self.groups, self.client.take_incidents(), self.run.say)

    def score(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        """See `VllmEngine.score`; the same on every rank. Servers that are lost on the way are replaced.

        Raises:
            EngineError: on every rank.
        """
        scores: list[list[list[float]]] = []

        def ask() -> str | None:
            try:
                scores.append(asyncio.run(self.client.score(prompts)))
            except ServersLostError as error:
                return str(error)
            return None

        self._persist(ask, self.groups.is_main)
        return list(self.groups.broadcast_object(scores[0] if scores else None))

    def send_weights(self) -> None:
        """Give the servers the trainer's weights as `version`; servers of ours that are dead are started again.

        A server whose update breaks off is sent everything once more. One that is dead, or still starting, is left out
        until the next time; at least one must take the weights, and if none is there, they are waited for.

        Raises:
            EngineError: on every rank.
        """
        failure = None
        for number in range(_ATTEMPTS):
            self._everywhere(self._start, self.groups.is_main)
            self.trainer.synchronise_parameters()
            sync = self.config.rollout.vllm.sync
            failure = (self._checkpoint if sync == "checkpoint" else self._stream)(number > 0)
            torn = self.groups.broadcast_object(self._torn() if self.groups.is_main else None)
            if failure is None and not torn:
                break
            self.run.say(failure or "; ".join(torn))
        if failure is not None:
            raise EngineError(failure)
        state = (self.client.serving(), self.client.missing()) if self.groups.is_main else None
        serving, missing = self.groups.broadcast_object(state)
        self.client.use(serving)
        for client in set(self._clients) - {self.client}:  # requests that are under way leave a server without weights
            client.use([(address, None) for address, _ in serving])
        for reason in missing:
            self.run.say(f"a rollout server is left out until the next weights: {reason}")
        self._held = self.version
        self.say_incidents()

    def _start(self) -> None:
        """Rank 0: wait for servers that start, restart dead ones."""
        if not self._ready:
            for server in self.own:
                asyncio.run(server.wait_ready(self.config.rollout.vllm.start_seconds))
            self._ready = True
        for address in asyncio.run(self.client.revive(self.run.say)):
            self.run.say(f"rollout server {address} was dead and has been started again")

    def _torn(self) -> list[str]:
        """Servers that answer, but did not take the weights."""
        return asyncio.run(self.client.torn())

    def _stream(self, only_missing: bool) -> str | None:
        """Weights over gloo or NCCL: every rank gives its shards, rank 0 sends. What went wrong, on every rank."""
        stream = iter_hf_tensors(self.trainer.models, self.run.architecture, self.groups)
        failure = None
        if self.groups.is_main:
            whole = ((name, tensor) for name, tensor in stream if tensor is not None)
            failure = _failure(self.client.update_weights(whole, self.version, only_missing=only_missing))
        for _ in stream:  # on other ranks the whole stream; on rank 0 what a failed update left, so that nobody waits
            pass
        return str(message) if (message := self.groups.broadcast_object(failure)) else None

    def _checkpoint(self, only_missing: bool) -> str | None:
        """The same through a directory."""
        folder = (self.run.directory.root / "rollout" / "weights").absolute()
        save_hf(
            self.trainer.models,
            folder,
            self.run.architecture,
            self.groups,
            source=Path(self.config.model.path),
            dtype=DTYPES[self.config.model.dtype],
        )
        failure = None
        if self.groups.is_main:
            failure = _failure(self.client.load_checkpoint(folder, self.version, only_missing=only_missing))
            shutil.rmtree(folder)
        return str(message) if (message := self.groups.broadcast_object(failure)) else None

    def _everywhere(self, action: Callable[[], Any], mine: bool) -> Any:
        """Act where `mine` is true; the first result that says something, on every rank.

        Raises:
            EngineError: on every rank, what the action raised on any.
        """
        result, failure = None, None
        if mine:
            try:
                result = action()
            except (EngineError, ValueError, OSError) as error:
                failure = f"[rank {self.groups.rank}] {error}"
        shares = self.groups.all_gather_object((result, failure))
        for _, problem in shares:
            if problem is not None:
                raise EngineError(problem)
        return next((found for found, _ in shares if found is not None), None)


def _failure(action: Coroutine[Any, Any, None]) -> str | None:
    try:
        asyncio.run(action)
    except EngineError as error:
        return str(error)
    return None
