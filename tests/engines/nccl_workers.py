"""Run by vLLM's interpreter: vLLM's own NCCL receivers behind the requests of a server, on the CPU.

    python nccl_workers.py WORKERS LIBRARY FOLDER

The engine (`/configure` says which: `stock` is vLLM's, `ours` the plugin's), its packing and its communicator are those
of the installed vLLM. Put in their place is only what needs a GPU: torch's streams and current device, by those of the
library LIBRARY; and the model, by one that keeps what it is given. The workers write that to FOLDER/received-RANK.pt at
the end of an update. A whole vLLM server gets the same put in place by `register`.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import multiprocessing
import os
import pickle
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tulu_hpc_vllm.lifetime import die_with_parent
from vllm.version import __version__ as version

CPU = torch.device("cpu")


class Stream:
    """In the place of a CUDA stream."""

    library: ctypes.CDLL
    current: Stream

    def __init__(self, *_: object, **__: object) -> None:
        self.cuda_stream = self.library.stub_stream_new()

    def synchronize(self) -> None:
        self.library.stub_stream_synchronize(ctypes.c_void_p(self.cuda_stream))


def put_in_place(path: str) -> None:
    """Let vLLM run its NCCL code with the library at `path`."""
    from vllm.distributed.device_communicators import pynccl
    from vllm.distributed.weight_transfer import packed_tensor

    os.environ["VLLM_NCCL_SO_PATH"] = path
    Stream.library = ctypes.CDLL(path)
    Stream.library.stub_stream_new.restype = ctypes.c_void_p
    Stream.current = Stream()

    @contextlib.contextmanager
    def in_stream(stream: Stream) -> Iterator[None]:
        before, Stream.current = Stream.current, stream
        try:
            yield
        finally:
            Stream.current = before

    def unpacked(*arguments: Any) -> Any:
        """A GPU would do what follows in the stream, after the broadcast."""
        Stream.current.synchronize()
        return unpack(*arguments)

    unpack, packed_tensor.unpack_tensor = packed_tensor.unpack_tensor, unpacked
    all_reduce = pynccl.PyNcclCommunicator.all_reduce

    def finished(*arguments: Any, **options: Any) -> torch.Tensor:
        """Its result is dropped at once, which a GPU's allocator knows to keep until the stream is done with it."""
        result = all_reduce(*arguments, **options)
        Stream.current.synchronize()
        return result

    pynccl.PyNcclCommunicator.all_reduce = finished
    torch.cuda.stream = in_stream  # type: ignore[assignment,misc]
    torch.cuda.Stream = Stream  # type: ignore[assignment,misc]
    torch.accelerator.current_device_index = lambda: CPU  # type: ignore[assignment,return-value]
    torch.accelerator.device_index = lambda _: contextlib.nullcontext()  # type: ignore[assignment,misc,return-value]
    torch.accelerator.synchronize = lambda *_: None  # type: ignore[assignment]
    pynccl.current_stream = lambda: Stream.current


def register() -> None:
    """As a plugin of a whole server."""
    put_in_place(os.environ["STUB_NCCL_LIBRARY"])


class Kept(torch.nn.Module):
    """Keeps what it is given, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.received: list[tuple[str, torch.Tensor]] = []

    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        self.received += [(name, tensor.clone()) for name, tensor in weights]


def engine_class(kind: str) -> Any:
    if kind == "stock":
        from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

        return NCCLWeightTransferEngine
    from tulu_hpc_vllm.nccl import NcclEngine

    return NcclEngine


class Worker:
    """One of them, of a server that has as many as `/configure` says."""

    def __init__(self, rank: int, folder: Path) -> None:
        self.rank, self.folder, self.model = rank, folder, Kept()
        self.engine: Any = None

    def answer(self, verb: str, body: dict[str, Any]) -> Any:
        engine, model = self.engine, self.model
        if verb == "environment":
            os.environ.update(body)
        elif verb == "configure":
            if engine is not None:
                engine.shutdown()
            parallel = SimpleNamespace(data_parallel_index=0, world_size=body["workers"], rank=self.rank)
            model_config = SimpleNamespace(hf_config=SimpleNamespace(**body["config"]))
            config = SimpleNamespace(parallel_config=parallel, model_config=model_config)
            self.engine = engine_class(body["kind"])(SimpleNamespace(backend="nccl"), config, CPU, model)
            kinds = {"init": self.engine.init_info_cls, "update": self.engine.update_info_cls}
            return {name: [field.name for field in dataclasses.fields(kind)] for name, kind in kinds.items()}
        elif verb == "init_weight_transfer_engine":
            engine.init_transfer_engine(engine.parse_init_info(body["init_info"]))
        elif verb == "start_weight_update":
            model.received = []
            engine.start_weight_update()
        elif verb == "update_weights":
            engine.update_weights(body["update_info"])
        elif verb == "finish_weight_update":
            engine.finish_weight_update()
            torch.save(model.received, self.folder / f"received-{self.rank}.pt")
        elif verb == "unpickle":
            found = pickle.loads(bytes(body["content"]))
            return [type(found).__module__, list(bytes(found))]
        return None

    def run(self, link: Any) -> None:
        die_with_parent()
        while True:
            verb, body = link.recv()
            try:
                link.send((True, self.answer(verb, body)))
            except Exception as error:
                link.send((False, f"{type(error).__name__}: {error}"))


def serve(links: list[Any]) -> None:
    """Requests as a server of vLLM takes them, one at a time at the workers."""
    state: dict[str, Any] = {"version": "default", "paused": False, "workers": len(links)}
    lock = threading.Lock()

    def ask(verb: str, body: Any) -> tuple[bool, Any]:
        if verb == "configure":
            state["workers"] = body["workers"]
        used = links[: state["workers"]]
        for link in used:
            link.send((verb, body))
        answers = [link.recv() for link in used]
        return next((each for each in answers if not each[0]), answers[0])

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.handle_request()

        def do_POST(self) -> None:
            self.handle_request()

        def handle_request(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else {}
            verb = self.path.strip("/").split("?")[0]
            well, found = True, None
            if verb in ("pause", "resume"):
                state["paused"] = verb == "pause"
            elif verb == "update_weight_version":
                state["version"] = body["new_version"]
            elif verb in ("is_paused", "get_world_size", "version", "weight_info"):
                found = {
                    "is_paused": {"is_paused": state["paused"]},
                    "get_world_size": {"world_size": state["workers"]},
                    "version": {"version": version},
                    "weight_info": {"weight_version": state["version"]},
                }[verb]
            else:
                with lock:
                    well, found = ask(verb, body)
                if well and verb == "finish_weight_update":
                    state["version"] = body.get("weight_version", state["version"])
            content = json.dumps(found).encode()
            with contextlib.suppress(OSError):  # the trainer may have hung up
                self.send_response(200 if well else 500)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        print(f"port {server.server_address[1]}", flush=True)
        server.serve_forever()


def main() -> None:
    size, path, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    put_in_place(path)
    engine_class("ours")  # imports before the fork
    fork = multiprocessing.get_context("fork")
    links = []
    for rank in range(size):
        ours, theirs = fork.Pipe()
        fork.Process(target=Worker(rank, folder).run, args=(theirs,)).start()
        links.append(ours)
    serve(links)


if __name__ == "__main__":
    main()
