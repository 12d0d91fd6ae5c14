"""Start a vLLM server in its own environment and process group, and make sure that it ends.

Its control endpoints (pause, update_weights, ...) ask nobody who they are, so it listens on private addresses only.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from tulu_hpc.rollout.engine import EngineError
from tulu_hpc.rollout.http import Address, HttpError, request

PLUGIN = "tulu_hpc"
LogprobsMode: TypeAlias = Literal["raw_logprobs", "processed_logprobs"]
GLOO_BACKEND = "tulu_hpc_gloo"  # and files
NCCL_BACKEND = "tulu_hpc_nccl"
GENERATE = "/inference/v1/generate"
PROBE_PATH = "/is_paused"  # answered by the engine core; /health is answered by the API server alone
_END_SECONDS = 20.0
_CPU_BATCHED_TOKENS = 4096
_PROBE_SECONDS = 5.0


@dataclass(frozen=True)
class ServerOptions:
    """How a server is started.

    Attributes:
        python: interpreter of vLLM's environment.
        model: Hugging Face directory.
        dtype: as vLLM names it.
        max_model_len: tokens of prompt and completion together.
        max_sequences: decoded together.
        host: private address to listen on.
        logprobs_mode: `raw_logprobs` of the untempered model or `processed_logprobs` at the sampling temperature.
        device: cpu or cuda.
        kv_cache_mib: of one worker; None: vLLM's own rule.
        weight_backend: how it gets new weights.
        sync_seconds: how long an NCCL worker waits for a bucket.
        extra_args: appended to the command line.
    """

    python: str
    model: str
    dtype: str
    max_model_len: int
    max_sequences: int
    host: str = "127.0.0.1"
    tensor_parallel: int = 1
    logprobs_mode: LogprobsMode = "raw_logprobs"
    device: Literal["cpu", "cuda"] = "cpu"
    kv_cache_mib: int | None = None
    weight_backend: str = GLOO_BACKEND
    sync_seconds: float = 120.0
    extra_args: Sequence[str] = ()

    def arguments(self, port: int) -> list[str]:
        """Command line of vLLM's OpenAI server."""
        arguments = ["--model", self.model, "--served-model-name", "policy", "--dtype", self.dtype]
        arguments += ["--host", self.host, "--port", str(port)]
        arguments += ["--max-model-len", str(self.max_model_len), "--max-num-seqs", str(self.max_sequences)]
        arguments += ["--tensor-parallel-size", str(self.tensor_parallel), "--logprobs-mode", self.logprobs_mode]
        # Without this the model's generation_config.json would change how tokens are drawn.
        arguments += ["--generation-config", "vllm", "--enable-scale-out", "--disable-uvicorn-access-log"]
        arguments += ["--weight-transfer-config", f'{{"backend": "{self.weight_backend}"}}']
        if self.device == "cpu":
            # The part of a split prompt draws a number that vLLM takes back on GPUs; on the CPU it dies of that.
            batched = str(max(_CPU_BATCHED_TOKENS, self.max_model_len))
            arguments += ["--enforce-eager", "--no-enable-chunked-prefill", "--max-num-batched-tokens", batched]
        if self.kv_cache_mib is not None:
            arguments += ["--kv-cache-memory-bytes", str(self.kv_cache_mib << 20)]
        return [*arguments, *self.extra_args]

    def environment(self) -> dict[str, str]:
        """Environment of the server; nothing of the trainer's launcher or Python path reaches it."""
        foreign = ("PYTHON", "TORCHELASTIC_", "NCCL_ASYNC")
        launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(foreign) and name not in launcher
        }
        kept |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_PLUGINS": PLUGIN, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        kept["TULU_HPC_SYNC_SECONDS"] = f"{self.sync_seconds:g}"
        if self.device == "cpu":
            # No worker process beside the engine core, and no pinning to cores that the trainer uses too.
            kept |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
            kept.setdefault("OMP_NUM_THREADS", "1")
            # torch: large tensors on huge pages. A weight update makes every layer anew, much of it page faults.
            kept.setdefault("THP_MEM_ALLOC_ENABLE", "1")
            kept.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would win over kv_cache_mib
        return kept


def check_private(host: str) -> None:
    """Refuse to listen where strangers could reach the control endpoints.

    Raises:
        ValueError: not a loopback or private address, or all interfaces at once.
    """
    try:
        found = {ipaddress.ip_address(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError as error:
        raise ValueError(f"{host}: not an address of this machine: {error}") from None
    public = [
        str(each) for each in sorted(found, key=str) if each.is_unspecified or not (each.is_private or each.is_loopback)
    ]
    if public:
        raise ValueError(
            f"{host} ({', '.join(public)}) is not a private address: vLLM does not authenticate its control endpoints"
        )


def free_port(host: str) -> int:
    """A port that nobody listens on at the moment."""
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        return int(probe.getsockname()[1])


class Server:
    """One server of ours: start, wait until it serves, end. It ends with this process, however this process ends.

    Attributes:
        ready: it has answered since it was started last.
    """

    def __init__(self, options: ServerOptions, log: Path, port: int = 0) -> None:
        """Start it.

        Args:
            log: file for its output; appended to.
            port: 0 for a free one.

        Raises:
            ValueError: the host is not private.
            EngineError: the interpreter is not there.
        """
        check_private(options.host)
        self.options, self.log = options, log
        self.address = Address(options.host, port or free_port(options.host))
        if not Path(options.python).is_file():
            raise EngineError(
                f"{options.python}: no interpreter of a vLLM environment; `make rollout-engine` makes one"
            )
        log.parent.mkdir(parents=True, exist_ok=True)
        self._launch()

    def _launch(self) -> None:
        self.ready, self._started = False, time.monotonic()
        command = [self.options.python, "-m", "tulu_hpc_vllm.serve", str(os.getpid())]
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                [*command, *self.options.arguments(self.address.port)],
                env=self.options.environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is the trainer's; it then ends the server
            )

    @property
    def pid(self) -> int:
        """Of the supervisor; its only child leads the server's process group."""
        return self._process.pid

    def is_running(self) -> bool:
        """Whether its processes exist, which does not mean that it serves."""
        return self._process.poll() is None

    def is_starting(self, seconds: float) -> bool:
        """Whether it runs, has not answered yet, and was started no longer than this ago."""
        return self.is_running() and not self.ready and time.monotonic() - self._started < seconds

    def wait(self) -> int:
        """Exit code, when it has ended."""
        return self._process.wait()

    async def wait_ready(self, seconds: float) -> None:
        """Return when the engine answers.

        Raises:
            EngineError: it ended or did not answer in time; with the end of its log.
        """
        try:
            async with asyncio.timeout(seconds):
                while True:
                    if not self.is_running():
                        raise EngineError(f"{self.address}: vLLM ended while it started:\n{self.log_tail()}")
                    try:
                        await probe(self.address)
                        break
                    except HttpError:
                        await asyncio.sleep(0.2)
                await self._first_token(seconds)
                self.ready = True
        except TimeoutError:
            raise EngineError(f"{self.address}: vLLM does not serve after {seconds:g} s:\n{self.log_tail()}") from None

    async def _first_token(self, seconds: float) -> None:
        """A model that vLLM loads but cannot run ends the engine at its first step: better now than later."""
        body = {"token_ids": [0], "sampling_params": {"max_tokens": 1, "ignore_eos": True}}
        try:
            await request(self.address, "POST", GENERATE, body, seconds=seconds)
        except HttpError as error:
            raise EngineError(
                f"{self.address}: vLLM cannot run {self.options.model}: {error}\n{self.log_tail()}"
            ) from None

    def log_tail(self, size: int = 3000) -> str:
        """The last part of its output."""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - size))
            return f"{self.log}: ...\n{file.read().decode(errors='replace')}"

    def restart(self) -> None:
        """End what is left of it and start it again on the same port."""
        self.stop()
        self._launch()

    def stop(self) -> None:
        """End it and all its processes."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_SECONDS)
        if self._process.poll() is None:
            self._process.kill()  # the kernel then kills the server
            self._process.wait()


async def probe(address: Address, seconds: float = _PROBE_SECONDS) -> None:
    """Ask the engine core a question; a hung core fails this, while /health goes on answering.

    Raises:
        HttpError: no proper answer.
    """
    answer = await request(address, "GET", PROBE_PATH, seconds=seconds)
    if not isinstance(answer, dict) or not isinstance(answer.get("is_paused"), bool):
        raise HttpError(f"{address}{PROBE_PATH}: unexpected answer {str(answer)[:200]}")
