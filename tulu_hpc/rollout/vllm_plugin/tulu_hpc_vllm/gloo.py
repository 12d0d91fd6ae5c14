"""Worker side of weight updates, over gloo or from files.

Over gloo rank 0 of the group is the trainer, the workers follow. One call of /update_weights announces one bucket of
tensors and is one broadcast for each of them, in the order announced; or it names a safetensors file to read.
Tensors are loaded while the next ones arrive, the last of a bucket during the next call.
"""

from __future__ import annotations

import math
import socket
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.logger import init_logger

from tulu_hpc_vllm.host_buffers import HostBuffers
from tulu_hpc_vllm.safeguards import Safeguards

logger = init_logger("vllm.tulu_hpc")


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Body of /init_weight_transfer_engine; `key` is new for each group."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    key: str
    timeout_seconds: float


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Body of /update_weights: the tensors of one bucket (in bytes, in order), or of a safetensors file at `path`."""

    names: list[str]
    shapes: list[list[int]]
    dtype_names: list[str] = field(default_factory=list)
    path: str | None = None

    def __post_init__(self) -> None:
        wanted = len(self.names) if self.path is None else 0
        if len(self.names) != len(self.shapes) or len(self.dtype_names) != wanted:
            raise ValueError("names, dtype_names and shapes differ in length")


class GlooEngine(Safeguards, WeightTransferEngine):
    """The backend `tulu_hpc_gloo`."""

    init_info_cls, update_info_cls = InitInfo, UpdateInfo

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._group: Any = None
        self._buffers = HostBuffers()
        self._unloaded: list[tuple[str, torch.Tensor]] = []  # arrived, at most one

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Join the trainer's group."""
        self.shutdown()
        parallel = self.parallel_config
        rank = init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        timeout = timedelta(seconds=init_info.timeout_seconds)
        self._store = dist.TCPStore(
            init_info.master_address, init_info.master_port, None, False, timeout=timeout, wait_for_workers=False
        )
        self._key = init_info.key
        self._group = gloo_group(
            dist.PrefixStore(init_info.key, self._store),
            rank,
            init_info.world_size,
            timeout,
            local_address(init_info.master_address, init_info.master_port),
        )
        logger.info("weight updates: rank %d of %d, group %s", rank, init_info.world_size, init_info.key)

    def start_weight_update(self) -> None:
        """Begin an update; what an earlier one left is gone."""
        self._unloaded = []
        super().start_weight_update()

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Receive one bucket, or read one file, and load it."""
        self.check_announced(update_info.names, update_info.shapes)
        if update_info.path is not None:
            self._load_file(update_info.path, update_info.names)
        else:
            self._load_bucket(update_info)
        self._received |= frozenset(update_info.names)

    def _load_bucket(self, update_info: UpdateInfo) -> None:
        if self._group is None:
            raise RuntimeError("the weight transfer group was not opened")
        dtypes = [getattr(torch, name) for name in update_info.dtype_names]
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in zip(update_info.shapes, dtypes, strict=True)]
        buffer = self._buffers.take(sum(sizes))
        options = dist.BroadcastOptions()
        options.rootRank = 0
        self._store.add(f"{self._key}/ready", 1)  # only now may the trainer send: a refused bucket leaves no trace
        # One broadcast per tensor, all of them under way at once.
        arriving = [(part, self._group.broadcast([part], options)) for part in buffer.split(sizes)]
        parts = zip(update_info.names, arriving, dtypes, update_info.shapes, strict=True)
        for name, (part, work), dtype, shape in parts:
            self._load_rest()
            work.wait()
            self._unloaded = [(name, part.view(dtype).view(shape))]

    def _load_rest(self) -> None:
        """Load what has arrived and is not loaded yet."""
        arrived, self._unloaded = self._unloaded, []
        if arrived:
            self.model.load_weights(arrived)

    def _load_file(self, path: str, names: list[str]) -> None:
        with safe_open(path, framework="pt") as file:
            for name in names:
                tensor = file.get_tensor(name)
                if tuple(tensor.shape) != self._expected[name]:
                    raise ValueError(f"{path}: {name} has shape {list(tensor.shape)}, not as announced")
                self.model.load_weights([(name, tensor)])

    def finish_weight_update(self) -> None:
        """Accept a complete update. Its buffers are kept for the next one."""
        try:
            super().finish_weight_update()
        finally:
            self._unloaded = []

    def shutdown(self) -> None:
        """Leave the group."""
        self._group = None


def gloo_group(store: dist.Store, rank: int, size: int, timeout: timedelta, address: str) -> dist.ProcessGroupGloo:
    """A gloo group whose connections go over the interface of `address`; independent of torch's default group."""
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timeout
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
    return dist.ProcessGroupGloo(store, rank, size, options)


def local_address(host: str, port: int) -> str:
    """Address of this machine that reaches `host`."""
    family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)  # sends nothing
        return str(probe.getsockname()[0])
