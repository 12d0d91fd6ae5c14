"""Weights over NCCL in vLLM's own protocol, as its backend `nccl` and ours (the same with safeguards) speak it.

The trainer is rank 0 of a group per server. The server is told to join by HTTP, and once the communicator stands all
ranks sum one fp32 number, because vLLM's workers do. Then each call of /update_weights announces one bucket, which is
one broadcast of its bytes: vLLM ends a packed buffer after the tensor that makes its sum exceed the buffer size, and a
bucket exceeds it at its last tensor at the earliest.

Two dialects: vLLM 0.25 meets at a store and is told of the packing at each update; 0.32 takes the group's unique id and
the packing in the request to join. This has not run on NCCL.
"""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from tulu_hpc.rollout.http import Address
from tulu_hpc.rollout.nccl import Communicator, Library, NcclError, Pending, Stream
from tulu_hpc.rollout.weight_buckets import Bucket
from tulu_hpc.rollout.weight_sync import Channel, SyncError, local_address, open_store

NOT_RUN = "this path has not been run on NCCL, only on a library of the same interface on the CPU"
_POLL_SECONDS = 0.0005
_BUFFERS = 2  # of vLLM, which receives into one while it loads from another
_PICKLED_CLASS = "vllm.distributed.device_communicators.pynccl_wrapper", "ncclUniqueId"


class Dialect(Enum):
    """What a version of vLLM expects."""

    STORE = "the workers look for the unique id in a store, and are told of the packing at each update"
    UNIQUE_ID = "the request to join has the unique id and the packing"

    def init_info(self, workers: int, buffer_bytes: int, meeting: dict[str, Any]) -> dict[str, Any]:
        """Of /init_weight_transfer_engine; `meeting` is the unique id or the store's address."""
        packing = _packing(buffer_bytes) if self is Dialect.UNIQUE_ID else {}
        return {"rank_offset": 1, "world_size": 1 + workers} | meeting | packing

    def update_info(self, bucket: Bucket, buffer_bytes: int) -> dict[str, Any]:
        """Of /update_weights."""
        packing = {} if self is Dialect.UNIQUE_ID else _packing(buffer_bytes)
        return dict(bucket.announcement()["update_info"]) | packing


def _packing(buffer_bytes: int) -> dict[str, Any]:
    return {"packed": True, "packed_buffer_size_bytes": buffer_bytes, "packed_num_buffers": _BUFFERS}


def dialect_of(version: str) -> Dialect:
    """The dialect of a version of vLLM.

    Raises:
        ValueError: a version whose dialect is not known.
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    numbers = (int(found[1]), int(found[2])) if found else (0, 0)
    if numbers == (0, 25):
        return Dialect.STORE
    if numbers >= (0, 32):
        return Dialect.UNIQUE_ID
    raise ValueError(f"weights over NCCL are known for vLLM 0.25 and from 0.32 on, not for {version}")


def pickled_unique_id(unique_id: bytes) -> bytes:
    """What vLLM 0.25's workers unpickle: their own ctypes structure, named by its module, with these 128 bytes.

    Written by hand in pickle protocol 3, because the class is not here to be pickled.
    """
    module, name = _PICKLED_CLASS
    rebuild = f"c_ctypes\n_unpickle\nc{module}\n{name}\n".encode()
    state = b"}C" + bytes([len(unique_id)]) + unique_id + b"\x86"  # ({}, unique_id)
    return b"\x80\x03" + rebuild + state + b"\x86R."


def aligned(bucket: Bucket) -> Iterator[Bucket]:
    """The bucket in pieces in which each tensor begins at a multiple of its item size: vLLM can view no other.

    One piece, unless dtypes are mixed.
    """
    first, size = 0, 0
    for index, ((_, dtype, _), part) in enumerate(zip(bucket.metadata, bucket.parts, strict=True)):
        if size % dtype.itemsize:
            yield Bucket(bucket.metadata[first:index], bucket.parts[first:index])
            first, size = index, 0
        size += part.numel()
    yield Bucket(bucket.metadata[first:], bucket.parts[first:])


class NcclChannel(Channel):
    """The trainer's end of one server's NCCL group.

    Args:
        library: path of libnccl; None: see `Library`.
        bucket_bytes: the limit of its buckets.
        device: of the trainer's rank.
        new_stream: makes a stream of that device.
    """

    def __init__(
        self,
        address: Address,
        timeout_seconds: float,
        held: Callable[[int], None],
        *,
        library: str | None,
        bucket_bytes: int,
        device: torch.device,
        new_stream: Callable[[], Stream] | None = None,
    ) -> None:
        super().__init__(address, timeout_seconds, held)
        self.library, self.bucket_bytes, self.device = library, bucket_bytes, device
        self._new_stream = new_stream or (lambda: torch.cuda.Stream(device))
        self._stream: Any = None
        self._dialect = Dialect.UNIQUE_ID

    async def _open(self) -> None:
        answer = await self._call("GET", "/version")
        try:
            self._dialect = dialect_of(str(answer.get("version")) if isinstance(answer, dict) else str(answer))
        except ValueError as error:
            raise SyncError(f"{self.address}: {error}") from None
        workers = await self._count_workers()
        library = Library(self.library)
        unique_id = library.unique_id()
        info = self._dialect.init_info(workers, self.bucket_bytes, self._meeting(unique_id))
        joined = asyncio.create_task(
            self._call("POST", "/init_weight_transfer_engine", {"init_info": info}, self.timeout_seconds + 10)
        )
        try:
            self._stream = self._new_stream()
            self._group = Communicator(
                library, unique_id, 0, 1 + workers, seconds=self.timeout_seconds, device=self.device
            )
            await _until(self._group.joined, joined)
            with self._in_stream():
                number = torch.zeros(1, device=self.device)
            await _until(self._group.all_reduce(number, self._stream), joined)
            await joined
        except BaseException as error:
            self.close()
            if isinstance(error, NcclError):
                raise SyncError(f"{self.address}: no group: {error}") from error
            raise
        finally:
            joined.cancel()

    def _meeting(self, unique_id: bytes) -> dict[str, Any]:
        """Where the workers get the unique id."""
        if self._dialect is Dialect.UNIQUE_ID:
            return {"nccl_unique_id_b64": base64.b64encode(unique_id).decode()}
        here = local_address(self.address)
        self._store, port = open_store(here, timedelta(seconds=self.timeout_seconds))
        self._store.set("broadcast_from/0/0", pickled_unique_id(unique_id))
        return {"master_address": here, "master_port": port}

    async def announce(self, bucket: Bucket) -> None:
        """Nothing yet: `send` announces, because what is announced and refused leaves a broadcast to be aborted."""

    async def send(self, bucket: Bucket) -> None:
        """One bucket: announce it, broadcast it, wait until the workers have loaded it.

        vLLM does not say when it is ready: it is refused only when the broadcast has begun, which then is aborted.

        Raises:
            HttpError, SyncError: naming the server; the group is then closed.
        """
        try:
            for piece in aligned(bucket):
                await self._send(piece)
        except BaseException as error:
            self.close()
            if isinstance(error, NcclError):
                raise SyncError(f"{self.address}: weights not sent: {error}") from error
            raise

    async def _send(self, bucket: Bucket) -> None:
        body = {"update_info": self._dialect.update_info(bucket, self.bucket_bytes)}
        announced = asyncio.create_task(self._call("POST", "/update_weights", body, self.timeout_seconds + 10))
        try:
            await _until(self._group.broadcast(self._packed(bucket), 0, self._stream), announced)
            await announced
        finally:
            announced.cancel()

    def _packed(self, bucket: Bucket) -> Tensor:
        """Its bytes on the device, put there in the stream that sends them."""
        sizes = [part.numel() for part in bucket.parts]
        with self._in_stream():
            packed = torch.empty(sum(sizes), dtype=torch.uint8, device=self.device)
            for place, part in zip(packed.split(sizes), bucket.parts, strict=True):
                place.copy_(part)
        return packed

    def _in_stream(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream) if self.device.type == "cuda" else nullcontext()

    def close(self) -> None:
        """Abort the communicator: a broadcast that the workers do not take part in would never end."""
        if self._group is not None:
            self._group.abort()
        super().close()


async def _until(call: Pending, answer: asyncio.Task[Any]) -> None:
    """Wait for a call to be done, or for the server to say no."""
    while not call.is_completed():
        if answer.done():
            answer.result()
        await asyncio.sleep(_POLL_SECONDS)
