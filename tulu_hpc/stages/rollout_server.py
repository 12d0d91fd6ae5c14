"""One vLLM server in the foreground, for trainers that name it in rollout.vllm.servers."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import NoReturn

from tulu_hpc.config.schema import RlvrConfig
from tulu_hpc.rollout.engine import EngineError
from tulu_hpc.rollout.server import Server
from tulu_hpc.stages.served import check_served, server_options


def run(config: RlvrConfig, log: Path) -> None:
    """Serve `model.path` until SIGTERM or Ctrl-C; the server's own output goes to `log`.

    Raises:
        ConfigError: vLLM cannot serve this.
        EngineError: it does not start, or it ended by itself; with the end of its log.
    """
    check_served(config)
    signal.signal(signal.SIGTERM, _stop)
    server = Server(server_options(config), log, port=config.rollout.vllm.port)
    try:
        print(f"rollout serve: starting {server.address}, log in {log}", flush=True)
        asyncio.run(server.wait_ready(config.rollout.vllm.start_seconds))
        print(f"rollout serve: {server.address} serves {config.model.path}", flush=True)
        code = server.wait()
        raise EngineError(f"{server.address}: vLLM ended by itself (exit code {code}):\n{server.log_tail()}")
    except KeyboardInterrupt:
        print("rollout serve: stopped on request", flush=True)
    finally:
        server.stop()


def _stop(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt
