"""The supervisor of a server, on a stand-in for vLLM with the same processes; a real vLLM is in tests/engines."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tulu_hpc.rollout.engine import EngineError
from tulu_hpc.rollout.server import Server, ServerOptions, check_private

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "tulu_hpc" / "rollout" / "vllm_plugin"

# An API server that answers the probe, with an engine core as its child that has the plugin's protection.
STAND_IN = """
import json, os, signal, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
arguments = sys.argv[1:]
folder = Path(arguments[arguments.index("--model") + 1])
core = (
    "import signal; from tulu_hpc_vllm.lifetime import die_with_parent; die_with_parent(); "
    "print('up', flush=True); signal.pause()"
)
child = subprocess.Popen([sys.executable, "-c", core], stdout=subprocess.PIPE)
child.stdout.readline()
(folder / "pids.partial").write_text(f"{os.getpid()} {child.pid}")
(folder / "pids.partial").rename(folder / "pids")
if (folder / "broken").exists():
    sys.exit("this model cannot be loaded")
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({"is_paused": False})
    def do_POST(self):
        self.answer({})
    def answer(self, value):
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
HTTPServer(("127.0.0.1", int(arguments[arguments.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def options(tmp_path: Path) -> ServerOptions:
    package = tmp_path / "site" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    (package / "api_server.py").write_text(STAND_IN)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path}/site:{PLUGIN} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return ServerOptions(str(python), str(tmp_path), "float32", 64, 4)


def until(condition: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def started(options: ServerOptions) -> tuple[Server, list[int]]:
    """A serving server, and the pids of its API server and engine core."""
    server = Server(options, Path(options.model) / "log")
    asyncio.run(server.wait_ready(20))
    return server, [int(pid) for pid in (Path(options.model) / "pids").read_text().split()]


def test_stop_and_restart(options: ServerOptions) -> None:
    server, first = started(options)
    assert server.is_running() and not any(map(gone, first))
    server.restart()
    try:
        until(lambda: (Path(options.model) / "pids").read_text().split() != [str(pid) for pid in first], "restart")
        asyncio.run(server.wait_ready(20))
        assert all(map(gone, first))
    finally:
        server.stop()
    assert not server.is_running()
    until(lambda: all(gone(int(pid)) for pid in (Path(options.model) / "pids").read_text().split()), "stopped")


@pytest.mark.parametrize("victim", ["api server", "engine core first", "supervisor"])
def test_no_process_outlives_another(options: ServerOptions, victim: str) -> None:
    """kill -9 of one of them; of the engine core with the API server, which would otherwise go on."""
    server, (api, core) = started(options)
    try:
        if victim == "engine core first":
            os.kill(core, signal.SIGKILL)
        os.kill(server.pid if victim == "supervisor" else api, signal.SIGKILL)
        server.wait()
        until(lambda: gone(api) and gone(core), f"{victim} was killed, something lives on")
    finally:
        server.stop()


def test_the_trainer_is_killed(options: ServerOptions) -> None:
    code = f"""
import asyncio, signal
from pathlib import Path
from tulu_hpc.rollout.server import Server, ServerOptions
server = Server({options!r}, Path({options.model!r}) / "log")
asyncio.run(server.wait_ready(20))
print(server.pid, flush=True)
signal.pause()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment, text=True)
    assert trainer.stdout is not None
    supervisor = int(trainer.stdout.readline())
    pids = [supervisor, *map(int, (Path(options.model) / "pids").read_text().split())]
    assert not any(map(gone, pids))
    trainer.kill()
    trainer.wait()
    until(lambda: all(map(gone, pids)), "the server outlives its trainer")


def test_a_server_that_does_not_start(options: ServerOptions) -> None:
    (Path(options.model) / "broken").touch()
    server = Server(options, Path(options.model) / "log")
    try:
        with pytest.raises(EngineError, match=r"(?s)ended while it started.*cannot be loaded"):
            asyncio.run(server.wait_ready(20))
        until(lambda: all(gone(int(pid)) for pid in (Path(options.model) / "pids").read_text().split()), "left over")
    finally:
        server.stop()


def test_no_environment(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="make rollout-engine"):
        Server(ServerOptions(str(tmp_path / "python"), str(tmp_path), "float32", 64, 4), tmp_path / "log")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "8.8.8.8", "2001:4860:4860::8888"])
def test_public_addresses(host: str) -> None:
    with pytest.raises(ValueError, match="not a private address"):
        check_private(host)


def test_private_addresses() -> None:
    for host in ("127.0.0.1", "10.1.2.3", "192.168.0.9", "::1", "fd00::1", "localhost"):
        check_private(host)


def test_nothing_of_the_trainer_reaches_the_server(options: ServerOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTHONPATH", "RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "VLLM_CPU_KVCACHE_SPACE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HTTP_PROXY", "kept")
    environment = options.environment()
    assert not {"PYTHONPATH", "RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"} & set(environment)
    assert environment["HTTP_PROXY"] == "kept" and environment["VLLM_SERVER_DEV_MODE"] == "1"
    assert "VLLM_CPU_KVCACHE_SPACE" not in environment


def test_rollout_serve(options: ServerOptions) -> None:
    """The verb says where it serves and ends everything on SIGTERM."""
    folder = Path(options.model)
    config = folder / "rlvr.yaml"
    config.write_text(
        f"run: {{root: {folder}}}\nmodel: {{path: {folder}}}\ndata: {{path: {folder}/none.jsonl}}\n"
        f"optimizer: {{lr: 1e-3}}\ntrain: {{steps: 1, pack_rows: 8192}}\n"
        f"rlvr: {{prompts_per_step: 1, samples_per_prompt: 2}}\n"
        f"rollout: {{vllm: {{python: {options.python}}}}}\n"
    )
    command = [sys.executable, "-m", "tulu_hpc", "rollout", "serve", str(config), "--log", str(folder / "log")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, text=True)
    assert process.stdout is not None
    try:
        lines = [process.stdout.readline(), process.stdout.readline()]
        assert "starting http://127.0.0.1:" in lines[0] and f"serves {folder}" in lines[1], lines
        process.terminate()
        assert "stopped on request" in process.stdout.read() and process.wait(20) == 0
    finally:
        process.kill()
    until(lambda: all(gone(int(pid)) for pid in (folder / "pids").read_text().split()), "left over")
