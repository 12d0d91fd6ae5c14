"""A weight receiver without a server around it: the plugin's own receiving class behind vLLM's endpoints.

`receiver.py CONFIG.json BUCKET_BYTES`, in vLLM's environment; prints its port. Beside vLLM's endpoints: POST /bare
{"bytes": N} receives N bytes by plain broadcasts of the bucket's size, GET /sum adds up all weights as 16-bit integers.
"""

from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2] / "tulu_hpc" / "rollout" / "vllm_plugin"))
from tulu_hpc_vllm.expected import check_complete, expected_shapes
from tulu_hpc_vllm.gloo import GlooEngine, InitInfo, UpdateInfo
from tulu_hpc_vllm.host_buffers import HostBuffers


class Weights:
    """Stands for vLLM's model: loading is one copy into resident memory."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}

    def load_weights(self, weights: Any) -> None:
        for name, tensor in weights:
            self.tensors[name].copy_(tensor)


class Receiver(GlooEngine):
    """All of the plugin's receiving and loading; vLLM's layerwise reload, which needs its layers, is left out."""

    def __init__(self, config: SimpleNamespace) -> None:
        self.parallel_config = SimpleNamespace(data_parallel_index=0, world_size=1, rank=0)
        self.model_config = SimpleNamespace(hf_config=config)
        self._expected = expected_shapes(config)
        self._group, self._received = None, set()
        self._buffers, self._unloaded = HostBuffers(), []
        self._bare = torch.empty(0, dtype=torch.uint8)
        self.model: Any = Weights(self._expected)

    def start_weight_update(self) -> None:
        self._received = set()

    def finish_weight_update(self) -> None:
        self._load_rest()
        check_complete(self._expected, self._received)

    def bare(self, total: int, bucket: int) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = 0
        if self._bare.numel() != bucket:
            self._bare = torch.ones(bucket, dtype=torch.uint8)  # its pages are touched once, not in the measurement
        self._store.add("bare", 1)
        buffer = self._bare
        while total > 0:
            self._group.broadcast([buffer[: min(bucket, total)]], options).wait()
            total -= bucket


def main() -> None:
    torch.set_num_threads(1)
    config = SimpleNamespace(**json.loads(Path(sys.argv[1]).read_text()))
    bucket = int(sys.argv[2])
    receiver, version, engine = Receiver(config), "none", threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def answer(self, body: dict[str, Any]) -> Any:
            nonlocal version
            path = self.path.split("?")[0]
            if path == "/init_weight_transfer_engine":
                receiver.init_transfer_engine(InitInfo(**body["init_info"]))
            elif path == "/start_weight_update":
                receiver.start_weight_update()
            elif path == "/update_weights":
                receiver.receive_weights(UpdateInfo(**body["update_info"]))
            elif path == "/finish_weight_update":
                receiver.finish_weight_update()
                version = body["weight_version"]
            elif path == "/bare":
                receiver.bare(body["bytes"], bucket)
            elif path == "/sum":
                tensors = receiver.model.tensors.values()
                return {"sum": sum(int(each.view(torch.int16).sum(dtype=torch.int64)) for each in tensors)}
            return {"is_paused": True, "world_size": 1, "weight_version": version}

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
            try:
                with engine:  # one call after the other, as vLLM's engine core takes them
                    status, found = 200, self.answer(body)
            except (ValueError, RuntimeError) as error:
                status, found = 500, {"error": str(error)}
            content = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
