"""A model that does not change, on vLLM servers: what `eval` and `data prefer` generate with.

Global rank 0 starts the servers (unless they run already) and has them read the model's files; the leader of each
replica asks for its replica's completions. Log-probs are not used here, so any temperature and top_p may be asked for.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tulu_hpc.config.loader import ConfigError
from tulu_hpc.config.sections import ModelSection, RolloutSection
from tulu_hpc.models.convert import save_hf
from tulu_hpc.parallel.device import default_device
from tulu_hpc.rollout.embedded import EmbeddedEngine
from tulu_hpc.rollout.engine import Completion, EngineError, Request, ServersLostError
from tulu_hpc.rollout.http import Address
from tulu_hpc.rollout.server import Server, ServerOptions, check_private
from tulu_hpc.rollout.vllm import VllmEngine
from tulu_hpc.stages.model_source import OpenModel
from tulu_hpc.stages.rollouts import broadcast_in_replica, is_replica_leader, open_engine, say_incidents
from tulu_hpc.training.trainer import DTYPES

_ATTEMPTS = 3  # at generating, each after restarting what has died


def open_model_engine(
    rollout: RolloutSection, model: OpenModel, section: ModelSection, folder: Path, max_length: int, stack: ExitStack
) -> EmbeddedEngine | ServedModel:
    """The engine that `rollout.engine` names, on this model; collective.

    Args:
        folder: for the servers' logs and, if the model is a checkpoint, its export while they run.
        max_length: of prompt and completion on a server.
        stack: servers that were started end with it.

    Raises:
        ConfigError: a server's address is not private.
        EngineError: on every rank, when no server serves the model.
    """
    if rollout.engine == "embedded":
        return open_engine(rollout, model.chunks, model.groups, model.architecture, model.tokenizer)
    return ServedModel(rollout, model, section, folder, max_length, stack)


class ServedModel:
    """Servers that hold one model. All methods are collective over the job."""

    def __init__(
        self,
        rollout: RolloutSection,
        model: OpenModel,
        section: ModelSection,
        folder: Path,
        max_length: int,
        stack: ExitStack,
    ) -> None:
        vllm = rollout.vllm
        try:
            check_private(vllm.host)
            addresses = [Address.parse(url) for url in vllm.servers]
            for address in addresses:
                check_private(address.host)
        except ValueError as error:
            raise ConfigError(f"rollout.vllm: {error}") from None
        self.model, self.start_seconds = model, vllm.start_seconds
        self.weights = self._files(section, folder, stack)
        own: list[Server] = []

        def start() -> list[Address]:
            options = ServerOptions(
                python=str(Path(vllm.python).absolute()),  # not resolved: the link names the environment
                model=str(self.weights),
                dtype=section.dtype,
                max_model_len=max_length,
                max_sequences=rollout.max_sequences,
                host=vllm.host,
                tensor_parallel=vllm.tensor_parallel,
                device="cuda" if default_device().type == "cuda" else "cpu",
                kv_cache_mib=vllm.kv_cache_mib,
                extra_args=vllm.extra_args,
            )
            for number in range(vllm.local_servers):
                server = Server(options, folder / f"server-{number}.log")
                stack.callback(server.stop)
                own.append(server)
            return [server.address for server in own]

        addresses = addresses or self._on_main(start)
        self.client = VllmEngine(
            addresses,
            vocab_size=model.architecture.vocab_size,
            max_in_flight=rollout.max_sequences,
            deadline_seconds=vllm.deadline_seconds,
            attempts=vllm.attempts,
            probe_seconds=vllm.probe_seconds,
            logprobs_mode=None,
            own=own,
            start_seconds=vllm.start_seconds,
            sync_timeout_seconds=vllm.sync_timeout_seconds,
        )
        self._on_main(lambda: [asyncio.run(server.wait_ready(vllm.start_seconds)) for server in own])
        self._load()

    def generate_batch(self, requests: Sequence[Request]) -> list[Completion]:
        """Completions of this replica's requests, on every rank of the replica.

        When all servers are lost, those of ours are started again and only what is missing is asked for again.

        Raises:
            EngineError: on every rank.
        """
        groups = self.model.groups
        leader = is_replica_leader(groups)
        done: dict[int, Completion] = {}
        for _ in range(_ATTEMPTS):
            lost, failure = self._generate(requests, done) if leader else (None, None)
            shares = groups.all_gather_object((lost, failure))
            for _, problem in shares:
                if problem is not None:
                    raise EngineError(problem)
            lost = next((found for found, _ in shares if found is not None), None)
            say_incidents(groups, self.client.take_incidents(), self.model.say)
            if lost is None:
                ordered = [done[index] for index in range(len(requests))] if leader else None
                return list(broadcast_in_replica(groups, ordered))
            self.model.say(f"rollout servers lost: {lost}")
            self._load()
        raise EngineError(f"rollout servers were lost {_ATTEMPTS} times in one batch: {lost}")

    def _generate(self, requests: Sequence[Request], done: dict[int, Completion]) -> tuple[str | None, str | None]:
        """Fill `done`; which servers were lost on the way, and what cannot be helped."""
        missing = [index for index in range(len(requests)) if index not in done]
        lost = None
        try:
            found = dict(enumerate(asyncio.run(self.client.generate([requests[index] for index in missing]))))
        except ServersLostError as error:
            found, lost = error.completions, str(error)
        except (EngineError, ValueError, OSError) as error:
            return None, f"[rank {self.model.groups.rank}] {error}"
        done.update({missing[place]: completion for place, completion in found.items()})
        return lost, None

    def _load(self) -> None:
        """Have every server read the files; servers of ours that are dead are started again."""

        def load() -> list[tuple[Address, int | None]]:
            for address in asyncio.run(self.client.revive(self.model.say)):
                self.model.say(f"rollout server {address} was dead and has been started again")
            asyncio.run(self.client.load_checkpoint(self.weights, 0))
            return self.client.serving()

        self.client.use(self._on_main(load))

    def _files(self, section: ModelSection, folder: Path, stack: ExitStack) -> Path:
        """The Hugging Face directory of the model, written for as long as `stack` is open if it is a checkpoint."""
        model = self.model
        if model.source.checkpoint is None:
            return model.source.base.absolute()

        def make() -> str:
            folder.mkdir(parents=True, exist_ok=True)
            return stack.enter_context(tempfile.TemporaryDirectory(prefix="weights-", dir=folder.absolute()))

        target = Path(self._on_main(make)) / "hf"
        dtype = DTYPES[section.dtype]
        save_hf(model.chunks, target, model.architecture, model.groups, source=model.source.base, dtype=dtype)
        return target

    def _on_main(self, action: Callable[[], Any]) -> Any:
        """What rank 0 makes of the action, on every rank.

        Raises:
            EngineError: on every rank, what the action raised.
        """
        result, failure = None, None
        if self.model.groups.is_main:
            try:
                result = action()
            except (EngineError, ValueError, OSError) as error:
                failure = str(error)
        failure, result = self.model.groups.broadcast_object((failure, result))
        if failure is not None:
            raise EngineError(failure)
        return result
