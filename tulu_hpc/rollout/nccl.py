"""NCCL without torch's process groups: join a group by its unique id, broadcast, all-reduce. Nothing waits for ever.

vLLM's workers open their communicators by themselves, so the trainer cannot meet them through torch.distributed; it
calls the library. All calls are asynchronous: they return a `Pending` that is asked whether it is done. What takes
longer than the communicator's deadline, or fails at a peer, ends with the communicator aborted and a `NcclError`.
This has not run on NCCL; the tests run it on a library of the same interface on the CPU.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

LIBRARY_VARIABLE = "VLLM_NCCL_SO_PATH"  # vLLM's own: both sides should load the same library
UNIQUE_ID_BYTES = 128
_BLOCKING_VARIABLE = "NCCL_COMM_BLOCKING"  # wins over what a communicator asks for
_DEFAULT_LIBRARY = "libnccl.so.2"
_ABORT_SECONDS = 10.0
_SUCCESS, _IN_PROGRESS = 0, 7  # ncclResult_t
_UINT8, _FLOAT32, _SUM = 1, 7, 0  # ncclDataType_t, ncclRedOp_t
_CONFIG_MAGIC, _CONFIG_VERSION = 0xCAFEBEEF, 21400  # of NCCL 2.14, whose fields every later version takes


class NcclError(RuntimeError):
    """A call failed or took too long; the communicator is gone."""


class Stream(Protocol):
    """Of a device, as `torch.cuda.Stream`."""

    @property
    def cuda_stream(self) -> int:
        """Its handle."""
        ...

    def query(self) -> bool:
        """Whether all work in it is done."""
        ...


class _UniqueId(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_byte * UNIQUE_ID_BYTES)]


class _Config(ctypes.Structure):
    """ncclConfig_t as of 2.14; the library reads `size` bytes and takes its defaults for newer fields."""

    _fields_ = [
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
    ]


_Handle = ctypes.c_void_p
_SIGNATURES: dict[str, list[type]] = {
    "ncclGetErrorString": [ctypes.c_int],
    "ncclGetVersion": [ctypes.POINTER(ctypes.c_int)],
    "ncclGetUniqueId": [ctypes.POINTER(_UniqueId)],
    "ncclCommInitRankConfig": [
        ctypes.POINTER(_Handle),
        ctypes.c_int,
        _UniqueId,
        ctypes.c_int,
        ctypes.POINTER(_Config),
    ],
    "ncclBroadcast": [_Handle, _Handle, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, _Handle, _Handle],
    "ncclAllReduce": [_Handle, _Handle, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, _Handle, _Handle],
    "ncclCommGetAsyncError": [_Handle, ctypes.POINTER(ctypes.c_int)],
    "ncclCommAbort": [_Handle],
}


class Library:
    """A loaded libnccl.

    Attributes:
        path: as it was asked for.
        version: such as 2.29.7.
    """

    def __init__(self, path: str | None = None) -> None:
        """Load it.

        Args:
            path: None: `VLLM_NCCL_SO_PATH` of the environment, or the libnccl.so.2 that torch or the system has.

        Raises:
            NcclError: it cannot be loaded, lacks a call, or is told by the environment to block.
        """
        if os.environ.get(_BLOCKING_VARIABLE) == "1":
            raise NcclError(f"{_BLOCKING_VARIABLE}=1 makes every call of NCCL wait without end: unset it")
        self.path = path or os.environ.get(LIBRARY_VARIABLE) or _DEFAULT_LIBRARY
        try:
            self._library = ctypes.CDLL(self.path)
        except OSError as error:
            raise NcclError(
                f"NCCL cannot be loaded: {error}; name the library in rollout.vllm.nccl_library or {LIBRARY_VARIABLE}"
            ) from None
        for name, arguments in _SIGNATURES.items():
            try:
                function = getattr(self._library, name)
            except AttributeError:
                raise NcclError(f"{self.path} has no {name}: NCCL 2.14 or newer is needed") from None
            function.restype, function.argtypes = ctypes.c_int, arguments
        self._library.ncclGetErrorString.restype = ctypes.c_char_p
        code = ctypes.c_int()
        self.check("ncclGetVersion", ctypes.byref(code))
        self.version = f"{code.value // 10000}.{code.value // 100 % 100}.{code.value % 100}"

    def __str__(self) -> str:
        return f"NCCL {getattr(self, 'version', '?')} ({self.path})"

    def call(self, name: str, *arguments: object) -> int:
        """Its result code."""
        return int(getattr(self._library, name)(*arguments))

    def check(self, name: str, *arguments: object) -> None:
        """Call, and refuse any result but success.

        Raises:
            NcclError: naming call and library.
        """
        code = self.call(name, *arguments)
        if code != _SUCCESS:
            raise NcclError(f"{name}: {self.reason(code)}; {self}")

    def reason(self, code: int) -> str:
        """What the library says to a result code."""
        text = self._library.ncclGetErrorString(code)
        return f"{text.decode(errors='replace') if text else 'unknown error'} ({code})"

    def unique_id(self) -> bytes:
        """Of a new group, 128 bytes; whoever makes it must be the group's rank 0.

        Raises:
            NcclError: no interface to meet at.
        """
        found = _UniqueId()
        self.check("ncclGetUniqueId", ctypes.byref(found))
        return bytes(found)


class Communicator:
    """One rank of a group.

    Args:
        seconds: deadline of every call, of joining too.
        device: of this rank's tensors.
    """

    def __init__(
        self, library: Library, unique_id: bytes, rank: int, size: int, *, seconds: float, device: torch.device
    ) -> None:
        """Begin to join; `joined` tells when it is done.

        Raises:
            NcclError: refused at once.
            ValueError: no unique id.
        """
        if len(unique_id) != UNIQUE_ID_BYTES:
            raise ValueError(f"a unique id has {UNIQUE_ID_BYTES} bytes, not {len(unique_id)}")
        self.library, self.rank, self.size = library, rank, size
        self.seconds, self.device = seconds, device
        self._handle = _Handle()
        config = _Config(ctypes.sizeof(_Config), _CONFIG_MAGIC, _CONFIG_VERSION, 0)
        self.joined = self._begin(
            "ncclCommInitRankConfig",
            ctypes.byref(self._handle),
            size,
            _UniqueId.from_buffer_copy(unique_id),
            rank,
            ctypes.byref(config),
        )

    @property
    def is_open(self) -> bool:
        """Not aborted yet."""
        return bool(self._handle)

    def broadcast(self, content: Tensor, root: int, stream: Stream) -> Pending:
        """Send `content` [N] uint8 from `root` to all, in place.

        Raises:
            NcclError: refused at once, or the communicator is gone.
        """
        assert content.dtype == torch.uint8 and content.is_contiguous()
        return self._enqueue("ncclBroadcast", content, _UINT8, root, stream)

    def all_reduce(self, values: Tensor, stream: Stream) -> Pending:
        """Sum `values` [N] fp32 over all ranks, in place.

        Raises:
            NcclError: refused at once, or the communicator is gone.
        """
        assert values.dtype == torch.float32 and values.is_contiguous()
        return self._enqueue("ncclAllReduce", values, _FLOAT32, _SUM, stream)

    def _enqueue(self, name: str, values: Tensor, kind: int, root_or_sum: int, stream: Stream) -> Pending:
        if not self.is_open:
            raise NcclError(self._message(name, "the communicator was aborted before"))
        pointer = values.data_ptr()
        arguments = (pointer, pointer, values.numel(), kind, root_or_sum, self._handle, stream.cuda_stream)
        return self._begin(name, *arguments, stream=stream, values=values)

    def _begin(
        self, name: str, *arguments: object, stream: Stream | None = None, values: Tensor | None = None
    ) -> Pending:
        with self._here():
            code = self.library.call(name, *arguments)
        if code not in (_SUCCESS, _IN_PROGRESS):
            self.fail(name, self.library.reason(code))
        return Pending(self, name, time.monotonic() + self.seconds, stream, values)

    def _here(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def is_taken_up(self, name: str) -> bool:
        """Whether the library is done with the last call; a call in a stream then goes on there.

        Raises:
            NcclError: something failed meanwhile, here or at a peer; the communicator is aborted.
        """
        if not self.is_open:
            raise NcclError(self._message(name, "the communicator was aborted meanwhile"))
        state = ctypes.c_int()
        code = self.library.call("ncclCommGetAsyncError", self._handle, ctypes.byref(state))
        if code != _SUCCESS or state.value not in (_SUCCESS, _IN_PROGRESS):
            self.fail(name, self.library.reason(code or state.value))
        return state.value == _SUCCESS

    def fail(self, name: str, reason: str) -> None:
        """Abort.

        Raises:
            NcclError: always, with call, rank, reason and library.
        """
        late = "" if self.abort() else f"; ncclCommAbort did not return within {_ABORT_SECONDS:g} s"
        raise NcclError(self._message(name, reason) + late)

    def _message(self, name: str, reason: str) -> str:
        return f"{name} at rank {self.rank} of {self.size}: {reason}; {self.library}"

    def abort(self) -> bool:
        """Leave the group without the others; what is under way ends unfinished. A second time does nothing.

        There is no other way to leave: the library's orderly end (ncclCommDestroy) waits for the peers, and vLLM's
        workers abort as well.

        Returns:
            Whether the library came back from it in time.
        """
        handle, self._handle = self._handle, _Handle()
        if not handle:
            return True

        def act() -> None:
            with self._here():
                self.library.call("ncclCommAbort", handle)

        acting = threading.Thread(target=act, daemon=True)
        acting.start()
        acting.join(_ABORT_SECONDS)
        return not acting.is_alive()


class Pending:
    """A call that is under way. It holds the tensor that the library reads or writes meanwhile."""

    def __init__(
        self, communicator: Communicator, name: str, deadline: float, stream: Stream | None, values: Tensor | None
    ) -> None:
        self._communicator, self._name, self._deadline = communicator, name, deadline
        self._stream, self._values = stream, values
        self._taken_up = False

    def is_completed(self) -> bool:
        """Whether it is done.

        Raises:
            NcclError: it failed or is late; the communicator is then aborted.
        """
        taken_up = self._communicator.is_taken_up(self._name)
        self._taken_up = self._taken_up or taken_up
        if self._taken_up and (self._stream is None or self._stream.query()):
            return True
        if time.monotonic() >= self._deadline:
            self._communicator.fail(self._name, f"not done within {self._communicator.seconds:g} s")
        return False

    def wait(self, pause: Callable[[float], None] = time.sleep) -> None:
        """Return when it is done.

        Raises:
            NcclError: as `is_completed`.
        """
        while not self.is_completed():
            pause(0.0005)
