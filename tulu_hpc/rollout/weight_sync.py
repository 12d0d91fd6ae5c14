"""New weights for running vLLM servers under Hugging Face names: bucket by bucket over gloo (or NCCL: `nccl_sync`), or
from files.

The weights come as a stream of whole tensors in buckets (`weight_buckets`); one is sent while the next is filled. Every
server has a group of its own, so a server that dies in an update does not take the others with it. An update always
pauses the server (requests in flight are frozen and go on under the new weights) and always clears its caches: keys and
values of the old weights would give log-probs of no policy at all. While it lasts the server's version is "dirty", and
a server whose update broke off stays paused until a later one has come through.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import uuid
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tulu_hpc.models.safetensors_files import HfDirectory
from tulu_hpc.rollout.http import Address, HttpError, request
from tulu_hpc.rollout.server import probe
from tulu_hpc.rollout.weight_buckets import Bucket, buckets

DIRTY = "dirty"
_CONTROL_SECONDS = 30.0
_POLL_SECONDS = 0.0005


class SyncError(RuntimeError):
    """An update did not come through; the server keeps no usable weights until a later one does."""


class Channel:
    """The trainer's end of one server's group; opened at the first update and again after any error.

    Args:
        held: told of the version that the server has, before it draws a token from it.
    """

    def __init__(
        self, address: Address, timeout_seconds: float, held: Callable[[int], None] = lambda version: None
    ) -> None:
        self.address, self.timeout_seconds, self.held = address, timeout_seconds, held
        self._group: Any = None
        self._store: Any = None
        self._key = ""
        self._workers: Any = 0
        self._sent = 0
        self._answers: list[asyncio.Task[Any]] = []  # to announcements, the oldest first
        self._accepted = asyncio.Event()  # the server receives what was announced last

    async def _call(self, method: str, path: str, body: Any = None, seconds: float = _CONTROL_SECONDS) -> Any:
        return await request(self.address, method, path, body, seconds=seconds)

    async def begin(self, *, with_group: bool = True) -> None:
        """Pause the server and begin an update; what an earlier one left behind is given up first.

        Raises:
            HttpError, SyncError: naming the server.
        """
        self._answers, self._accepted = [], asyncio.Event()  # of this event loop
        self._accepted.set()
        await probe(self.address)
        await pause(self.address)
        await set_version(self.address, DIRTY)
        if with_group and self._group is None:
            await self._open()
        try:
            await self._call("POST", "/start_weight_update")
        except HttpError as error:
            if error.status is None:
                raise
            await self._give_up()
            await self._call("POST", "/start_weight_update")

    async def _give_up(self) -> None:
        """End an update that an earlier trainer left open. An incomplete one is refused once, and gone then."""
        try:
            await self._call("POST", "/finish_weight_update")
        except HttpError as error:
            if error.status is None:
                raise
            await self._call("POST", "/finish_weight_update")

    async def _count_workers(self) -> int:
        answer = await self._call("GET", "/get_world_size")
        workers = answer.get("world_size") if isinstance(answer, dict) else None
        if not isinstance(workers, int) or workers < 1:
            raise SyncError(f"{self.address}: has a world size of {str(answer)[:200]}")
        return workers

    async def _open(self) -> None:
        self._workers = await self._count_workers()
        here = local_address(self.address)
        self._key, self._sent = uuid.uuid4().hex, 0
        timeout = timedelta(seconds=self.timeout_seconds)
        store, port = open_store(here, timeout)
        info = {
            "master_address": here,
            "master_port": port,
            "rank_offset": 1,
            "world_size": 1 + self._workers,
            "key": self._key,
            "timeout_seconds": self.timeout_seconds,
        }
        joined = asyncio.create_task(
            self._call("POST", "/init_weight_transfer_engine", {"init_info": info}, self.timeout_seconds + 10)
        )
        opened = asyncio.create_task(asyncio.to_thread(self._join, store, 1 + self._workers, timeout, here))
        try:
            # The server's refusal comes first; waiting for the group alone would take its whole timeout.
            await asyncio.wait({joined, opened}, return_when=asyncio.FIRST_EXCEPTION)
            await joined
            self._group = await opened
        except RuntimeError as error:
            raise error if isinstance(error, HttpError) else SyncError(f"{self.address}: no group: {error}") from error
        finally:
            joined.cancel()
        self._store = store

    def _join(self, store: Any, size: int, timeout: timedelta, here: str) -> Any:
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = timeout
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=here)]
        return dist.ProcessGroupGloo(dist.PrefixStore(self._key, store), 0, size, options)

    async def announce(self, bucket: Bucket) -> None:
        """Tell the server what comes next, while what came before may be under way: it then waits at the server.

        Returns once the server receives what was announced before, so that they cannot overtake each other.
        """
        await self._accepted.wait()
        if self._group is not None:  # else sending has failed meanwhile
            self._accepted.clear()
            seconds = 2 * self.timeout_seconds + 10  # of the bucket before, and of this one
            body = bucket.announcement()
            self._answers.append(asyncio.create_task(self._call("POST", "/update_weights", body, seconds)))

    async def send(self, bucket: Bucket) -> None:
        """One announced bucket: wait until all workers accept it and broadcast it; they load it later.

        Raises:
            HttpError, SyncError: naming the server; the group is then closed.
        """
        try:
            async with asyncio.timeout(self.timeout_seconds):
                await self._until_ready()
                options = dist.BroadcastOptions()
                options.rootRank = 0
                works = [self._group.broadcast([part], options) for part in bucket.parts]
                await self._unless_refused(asyncio.gather(*map(_completion, works)))
            for work in works:
                work.wait()  # raises what went wrong
            self._sent += 1
        except (RuntimeError, TimeoutError) as error:
            self.close()
            if isinstance(error, HttpError):
                raise
            raise SyncError(f"{self.address}: weights not sent: {error or 'too late'}") from error

    async def load(self, body: dict[str, Any]) -> None:
        """Let the server read one file.

        Raises:
            HttpError: naming the server.
        """
        await self._call("POST", "/update_weights", body, self.timeout_seconds + 10)

    async def _until_ready(self) -> None:
        """Wait until every worker waits for the next bucket, or for the server to say no."""
        while self._store.add(f"{self._key}/ready", 0) < (self._sent + 1) * self._workers:
            await self._unless_refused(asyncio.sleep(_POLL_SECONDS))
        self._accepted.set()

    async def _unless_refused(self, action: Awaitable[Any]) -> None:
        """Wait for an action, or for the server to refuse what was announced."""
        doing = asyncio.ensure_future(action)
        try:
            while not doing.done():
                await asyncio.wait({doing, *self._answers}, return_when=asyncio.FIRST_COMPLETED)
                while self._answers and self._answers[0].done():
                    self._answers.pop(0).result()
            doing.result()
        finally:
            doing.cancel()

    async def finish(self, version: int) -> None:
        """End the update; the server refuses if a parameter is missing. Then it serves again.

        Raises:
            HttpError, SyncError: naming the server.
        """
        for answer in self._answers:
            await answer
        body = {"weight_version": str(version)}
        await self._call("POST", "/finish_weight_update", body, self.timeout_seconds + 10)
        await confirm_version(self.address, version)
        self.held(version)
        await self._call("POST", "/resume")

    def close(self) -> None:
        """Leave the group; workers that wait in it see the connection end."""
        self._group = self._store = None
        for answer in self._answers:
            answer.cancel()
        self._accepted.set()  # nobody waits for a server that is given up


async def push_gloo(
    channels: Sequence[Channel], tensors: Iterable[tuple[str, Tensor]], version: int, bucket_bytes: int
) -> list[str | None]:
    """Send the same weights to several servers at once.

    Args:
        tensors: whole model, Hugging Face names, on the host; none is changed. Not read to its end if every server has
            failed.
        bucket_bytes: of the tensors held at a time: one half is sent while the other is gathered. A tensor larger than
            half of it is sent alone.

    Returns:
        For each channel what went wrong, or None.
    """
    problems: list[str | None] = [None] * len(channels)

    await _every(channels, problems, Channel.begin)
    stream = iter(buckets(tensors, bucket_bytes // 2))
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def advance() -> Bucket | None:
        if device is not None:  # which device is current is a matter of each thread
            torch.cuda.set_device(device)
        return next(stream, None)

    async def prepare() -> Bucket | None:
        bucket = await asyncio.to_thread(advance)
        if bucket is not None:
            await _every(channels, problems, lambda channel: channel.announce(bucket))
        return bucket

    try:
        bucket = await prepare() if None in problems else None
        while bucket is not None:
            # The next bucket is gathered and announced while this one is sent and the one before is loaded.
            following = asyncio.create_task(prepare())
            try:
                await _every(channels, problems, lambda channel, bucket=bucket: channel.send(bucket))
            finally:
                bucket = await following  # before anyone else touches the stream
            if None not in problems:
                break
    except BaseException:
        for channel in channels:
            channel.close()  # a server may be waiting for a bucket
        raise
    await _every(channels, problems, lambda channel: channel.finish(version))
    return problems


def _completion(work: Any) -> asyncio.Future[None]:
    """Done when the work is, well or not."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def settle() -> None:
        if not done.done():
            done.set_result(None)

    def tell(_: Any) -> None:  # in a thread of gloo
        with contextlib.suppress(RuntimeError):  # nobody waits any more
            loop.call_soon_threadsafe(settle)

    work.get_future().add_done_callback(tell)
    return done


async def push_checkpoint(channels: Sequence[Channel], directory: Path, version: int) -> list[str | None]:
    """Let several servers read the same Hugging Face directory, which all their workers must see.

    Returns:
        For each channel what went wrong, or None.

    Raises:
        ValueError: there are no safetensors in the directory.
    """
    content = HfDirectory(directory)
    files: dict[str, list[str]] = {}
    for name, file in content.file_of.items():
        files.setdefault(file, []).append(name)
    bodies = [
        {
            "update_info": {
                "path": str((directory / file).absolute()),
                "names": names,
                "shapes": [list(content.shape(name)) for name in names],
            }
        }
        for file, names in files.items()
    ]
    content.close()
    problems: list[str | None] = [None] * len(channels)
    await _every(channels, problems, lambda channel: channel.begin(with_group=False))
    for body in bodies:
        await _every(channels, problems, lambda channel, body=body: channel.load(body))
    await _every(channels, problems, lambda channel: channel.finish(version))
    return problems


async def _every(channels: Sequence[Channel], problems: list[str | None], step: Any) -> None:
    """Do a step at all servers that have no problem yet, at once; note what fails."""

    async def one(index: int) -> None:
        try:
            await step(channels[index])
        except (RuntimeError, OSError) as error:  # torch's network errors are RuntimeErrors too
            channels[index].close()
            problems[index] = str(error)

    await asyncio.gather(*(one(index) for index, problem in enumerate(problems) if problem is None))


async def pause(address: Address) -> None:
    """Freeze requests and clear the caches; an update of a server that runs would end it.

    Raises:
        HttpError, SyncError: it is not paused.
    """
    await request(address, "POST", "/pause?mode=keep&clear_cache=true", seconds=_CONTROL_SECONDS)
    answer = await request(address, "GET", "/is_paused", seconds=_CONTROL_SECONDS)
    if not isinstance(answer, dict) or answer.get("is_paused") is not True:
        raise SyncError(f"{address}: not paused ({answer}): an update now would end it")


async def set_version(address: Address, version: str) -> None:
    """Name the weights; servers before 0.32 have no versions."""
    try:
        await request(address, "POST", "/update_weight_version", {"new_version": version}, seconds=_CONTROL_SECONDS)
    except HttpError as error:
        if error.status != 404:
            raise


async def confirm_version(address: Address, version: int) -> None:
    """Ask a server (that has versions) which weights it has.

    Raises:
        HttpError, SyncError: it holds another version.
    """
    try:
        answer = await request(address, "GET", "/weight_info", seconds=_CONTROL_SECONDS)
        if not isinstance(answer, dict) or str(answer.get("weight_version")) != str(version):
            raise SyncError(f"{address}: says {str(answer)[:200]} after an update to version {version}")
    except HttpError as error:
        if error.status != 404:
            raise


def open_store(here: str, timeout: timedelta) -> tuple[dist.TCPStore, int]:
    """A store at this address of this machine, and its port."""
    family = socket.AF_INET6 if ":" in here else socket.AF_INET
    listener = socket.create_server((here, 0), family=family)  # else the store would listen on all interfaces
    port = int(listener.getsockname()[1])
    store = dist.TCPStore(
        here, port, None, True, timeout=timeout, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    return store, port


def local_address(server: Address) -> str:
    """Address of this machine that reaches the server."""
    family, kind, protocol, _, target = socket.getaddrinfo(server.host, server.port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as link:
        link.connect(target)  # sends nothing
        return str(link.getsockname()[0])
