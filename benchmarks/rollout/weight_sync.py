"""Weight sync over gloo beside a bare gloo broadcast of the same bytes, between processes over loopback.

    python benchmarks/rollout/weight_sync.py                                 # 4.5 GB of bf16; needs 12 GB of memory
    python benchmarks/rollout/weight_sync.py --layers 2 --hidden 256 --vocab 1000 --bucket-mib 1  # checks the machinery

The sender is a real megatron model at tp 1 and at tp 2 x pp 2, streamed as in training; the receiver is the plugin's
own class in vLLM's environment, loading into resident memory. Bare broadcasts go from one buffer to one buffer and
alternate with the syncs. Extra memory is the peak of a rank's anonymous memory during a sync over
what it had before the first one (its shard, Python and libraries).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tulu_hpc.config.architecture import Architecture
from tulu_hpc.models.build import build_model
from tulu_hpc.models.convert import iter_hf_tensors
from tulu_hpc.models.names import hf_shapes
from tulu_hpc.parallel.layout import Layout, initialize
from tulu_hpc.rollout.http import Address, request
from tulu_hpc.rollout.server import Server, ServerOptions
from tulu_hpc.rollout.weight_sync import Channel, push_gloo

LAYOUTS = {"tp1": Layout(), "tp2 pp2": Layout(tensor=2, pipeline=2)}
GOAL_RATIO, GOAL_MEMORY = 0.8, 3.0
SECONDS = 300.0
BARE_BYTES = 128 << 20  # of one broadcast; not slower than larger ones


class AnonymousPeak:
    """Peak of this process's anonymous resident memory while the context lasts, sampled every 2 ms. Bytes."""

    def __enter__(self) -> AnonymousPeak:
        self.peak, self._end = anonymous(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._end.wait(0.002):
            self.peak = max(self.peak, anonymous())

    def __exit__(self, *args: object) -> None:
        self._end.set()
        self._thread.join()


def anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) << 10
    raise RuntimeError("no RssAnon in /proc/self/status")


def sender(args: argparse.Namespace) -> None:
    """One rank of the trainer; rank 0 prints the figures."""
    torch.set_num_threads(1)
    groups = initialize(LAYOUTS[args.layout], seed=1)
    architecture = architecture_of(args)
    models = build_model(architecture, groups, dtype=torch.bfloat16, device="cpu")
    fill(models)
    total = sum(torch.Size(shape).numel() * 2 for shape in hf_shapes(architecture).values())
    expected = 0
    for _, tensor in iter_hf_tensors(models, architecture, groups):  # also warms up the groups' connections
        if tensor is not None:
            expected += int(tensor.contiguous().view(torch.int16).sum(dtype=torch.int64))
    del tensor
    before = anonymous()
    bare_channel = channel = Channel(Address("127.0.0.1", args.port), SECONDS)
    if args.server_port:
        channel = Channel(Address("127.0.0.1", args.server_port), SECONDS)
        if groups.is_main:
            asyncio.run(bare_channel.begin())
    bare, syncs, peaks, cpu = [], [], [], []
    for version in range(args.repeats + 1):
        with AnonymousPeak() as memory:
            dist.barrier()
            started, busy = time.perf_counter(), time.process_time()
            stream = iter_hf_tensors(models, architecture, groups)
            if groups.is_main:
                whole = ((name, each) for name, each in stream if each is not None)
                problems = asyncio.run(push_gloo([channel], whole, version, args.bucket_mib << 20))
                if problems != [None]:
                    raise RuntimeError(str(problems))
            for _ in stream:
                pass
            syncs.append(time.perf_counter() - started)
            cpu.append(time.process_time() - busy)
            peaks.append(memory.peak)
        if groups.is_main:
            bare.append(asyncio.run(bare_broadcast(bare_channel, total, BARE_BYTES, version)))
    peaks = groups.all_gather_object(max(max(peaks), memory.peak) - before)
    shards = groups.all_gather_object(sum(p.numel() * p.element_size() for m in models for p in m.parameters()))
    cpu = groups.all_gather_object(statistics.median(cpu[1:]))
    if groups.is_main:
        if not args.server_port:
            received = asyncio.run(request(channel.address, "GET", "/sum", seconds=SECONDS))["sum"]
            if received != expected:
                raise RuntimeError(f"the receiver's weights add up to {received}, not {expected}")
        figures = {"sync_seconds": syncs[1:], "bare_seconds": bare[1:], "bytes": total, "extra": peaks}
        figures |= {"shards": shards, "largest": largest_parameter(architecture), "cpu_seconds": cpu}
        print(json.dumps(figures), flush=True)
    dist.barrier()
    os._exit(0)  # gloo's threads need no farewell


async def bare_broadcast(channel: Channel, total: int, bucket: int, number: int) -> float:
    """Seconds of broadcasting `total` bytes from one buffer to one buffer, nothing else; for the `number`th time."""
    content = torch.ones(bucket, dtype=torch.uint8)
    told = asyncio.create_task(request(channel.address, "POST", "/bare", {"bytes": total}, seconds=SECONDS))
    while channel._store.add("bare", 0) <= number:  # only the transfer is timed
        await asyncio.sleep(0.001)
    options = dist.BroadcastOptions()
    options.rootRank = 0

    def send() -> float:
        started, left = time.perf_counter(), total
        while left > 0:
            channel._group.broadcast([content[: min(bucket, left)]], options).wait()
            left -= bucket
        return time.perf_counter() - started

    seconds = await asyncio.to_thread(send)
    await told
    return seconds


def fill(models: Any) -> None:
    """Random bits that are finite bf16, from a short template: quick, and no two neighbours are alike."""
    template = torch.randn(1_000_003, generator=torch.Generator().manual_seed(dist.get_rank())).bfloat16()
    with torch.no_grad():
        for model in models:
            for parameter in model.parameters():
                for part in parameter.view(-1).split(template.numel()):
                    part.copy_(template[: part.numel()])


def architecture_of(args: argparse.Namespace) -> Architecture:
    return Architecture(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=4 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=16,
        num_key_value_heads=8,
    )


def largest_parameter(architecture: Architecture) -> int:
    """Bytes of the largest parameter as the trainer holds it (gate and up are one), all shards together."""
    a = architecture
    qkv = (a.num_attention_heads + 2 * a.num_key_value_heads) * a.head_dim
    return 2 * a.hidden_size * max(a.vocab_size, 2 * a.intermediate_size, qkv)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def start_server(folder: Path, args: argparse.Namespace, cleanup: ExitStack) -> int:
    """A real vLLM server with random weights of this model; its port."""
    options = ServerOptions(
        python=args.python,
        model=str(folder),
        dtype="bfloat16",
        max_model_len=256,
        max_sequences=4,
        kv_cache_mib=64,
        extra_args=("--load-format", "dummy", "--skip-tokenizer-init"),
    )
    server = Server(options, folder / "server.log")
    cleanup.callback(server.stop)
    asyncio.run(server.wait_ready(SECONDS))
    return server.address.port


def measure(layout: str, args: argparse.Namespace) -> dict[str, Any]:
    """Figures of one layout of the sender."""
    world = LAYOUTS[layout].tensor * LAYOUTS[layout].pipeline
    with tempfile.TemporaryDirectory() as name, ExitStack() as cleanup:
        folder = Path(name)
        config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **architecture_of(args).to_hf()}
        (folder / "config.json").write_text(json.dumps(config))
        quiet = {"OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "CUDA_VISIBLE_DEVICES": ""}

        def start(command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
            process = subprocess.Popen(command, env=environment | quiet, stdout=subprocess.PIPE, text=True)
            cleanup.callback(process.wait)
            cleanup.callback(process.kill)
            return process

        clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        script, bucket = Path(__file__).with_name("receiver.py"), str(BARE_BYTES)
        receiver = start([args.python, str(script), str(folder / "config.json"), bucket], clean)
        assert receiver.stdout is not None
        line = next((each for each in receiver.stdout if each.strip().isdigit()), None)
        if line is None:
            raise SystemExit(f"the receiver in {args.python} ended with code {receiver.wait()}")
        common = [sys.executable, str(Path(__file__)), "--layout", layout, "--port", line.strip()]
        if args.server:
            common += ["--server-port", str(start_server(folder, args, cleanup))]
        for name in ("vocab", "hidden", "layers", "bucket_mib", "repeats"):
            common += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
        place = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        ranks = [
            start(common, os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(world)
        ]
        outputs = [each.communicate(timeout=SECONDS)[0] for each in ranks]
        if any(each.returncode for each in ranks):
            raise SystemExit(f"{layout}: ranks ended with {[each.returncode for each in ranks]}")
        found: dict[str, Any] = json.loads(outputs[0].splitlines()[-1])
    ratios = [b / s for b, s in zip(found["bare_seconds"], found["sync_seconds"], strict=True)]
    unit = max(args.bucket_mib << 20, found["largest"])
    found |= {"ratio": statistics.median(ratios), "ratios": ratios, "unit": unit}
    found["memory"] = [extra / unit for extra in found["extra"]]
    found["gb_per_second"] = found["bytes"] / 1e9 / statistics.median(found["sync_seconds"])
    found["bare_gb_per_second"] = found["bytes"] / 1e9 / statistics.median(found["bare_seconds"])
    found["met"] = found["ratio"] >= GOAL_RATIO and max(found["memory"]) <= GOAL_MEMORY
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--bucket-mib", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3, help="timed syncs, after one that is not")
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=LAYOUTS)
    parser.add_argument("--python", default=".venv-vllm/bin/python", help="interpreter of vLLM's environment")
    parser.add_argument("--server", action="store_true", help="send to a real vLLM server, which packs what it loads")
    parser.add_argument("--json", metavar="PATH", help="also write the last line's JSON object here")
    parser.add_argument("--layout", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--server-port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.layout:
        sender(args)
        return
    results = {}
    for layout in args.layouts:
        found = results[layout] = measure(layout, args)
        print(
            f"{layout}: {found['bytes'] / 1e9:.2f} GB, sync {found['gb_per_second']:.2f} GB/s, "
            f"bare broadcast {found['bare_gb_per_second']:.2f} GB/s, ratio {found['ratio']:.2f} (goal {GOAL_RATIO}); "
            f"extra memory by rank, in units of {found['unit'] / 2**20:.0f} MiB: "
            f"{', '.join(f'{each:.2f}' for each in found['memory'])} (goal {GOAL_MEMORY:.0f}): "
            f"{'met' if found['met'] else 'MISSED'}",
            flush=True,
        )
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    result = {"benchmark": "weight_sync", "layouts": results, "versions": versions, "load_average": os.getloadavg()}
    line = json.dumps(result)
    if args.json:
        Path(args.json).write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
