"""The NCCL wrapper on the stub: bytes arrive, and every wait ends."""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path

import pytest
import torch

from tests.rollout.stub_nccl import VERSION, Stub, stub, stub_library  # noqa: F401
from tulu_hpc.rollout.nccl import Communicator, Library, NcclError, Pending

CPU = torch.device("cpu")
SECONDS = 20.0  # of calls that are expected to come through
SHORT = 0.3


def finish(*calls: Pending) -> None:
    """Wait for all at once: they wait for each other."""
    while not all([call.is_completed() for call in calls]):
        time.sleep(0.0005)


def group(library: Library, size: int, seconds: float = SECONDS) -> list[Communicator]:
    unique_id = library.unique_id()
    found = [Communicator(library, unique_id, rank, size, seconds=seconds, device=CPU) for rank in range(size)]
    finish(*(each.joined for each in found))
    return found


def aborted(stub: Stub) -> list[int]:  # noqa: F811
    return sorted(int(rank) for _, rank in stub.calls("ncclCommAbort"))


@pytest.mark.parametrize("size", [2, 4])
def test_what_is_sent_arrives(stub: Stub, size: int) -> None:  # noqa: F811
    library = Library(str(stub.path))
    assert library.version == VERSION
    ranks = group(library, size)
    streams = [stub.stream() for _ in ranks]
    terms = [torch.tensor([float(3 + rank)]) for rank in range(size)]
    finish(*(rank.all_reduce(term, stream) for rank, term, stream in zip(ranks, terms, streams)))
    assert [float(term) for term in terms] == [sum(range(3, 3 + size))] * size
    generator = torch.Generator().manual_seed(size)
    for count in (1, 65_535, 65_537, 300_000):
        sent = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
        kept = sent.clone()
        found = [sent, *(torch.zeros_like(sent) for _ in ranks[1:])]
        finish(*(rank.broadcast(each, 0, stream) for rank, each, stream in zip(ranks, found, streams)))
        assert all(torch.equal(each, kept) for each in found)
    assert aborted(stub) == []
    assert all(rank.abort() for rank in ranks) and not any(rank.is_open for rank in ranks)
    assert aborted(stub) == list(range(size))
    assert all(rank.abort() for rank in ranks)
    assert aborted(stub) == list(range(size)), "aborted twice: the handle is not the library's any more"


def test_a_peer_that_does_not_join(stub: Stub) -> None:  # noqa: F811
    library = Library(str(stub.path))
    alone = Communicator(library, library.unique_id(), 0, 2, seconds=SHORT, device=CPU)
    with pytest.raises(
        NcclError, match=rf"ncclCommInitRankConfig at rank 0 of 2: not done within 0.3 s; NCCL {VERSION}"
    ):
        alone.joined.wait()
    assert aborted(stub) == [0] and not alone.is_open


@pytest.mark.parametrize("call", ["ncclAllReduce", "ncclBroadcast"])
def test_a_peer_that_hangs(stub: Stub, call: str) -> None:  # noqa: F811
    sender, peer = group(Library(str(stub.path)), 2, SHORT)
    content, stream = torch.zeros(100, dtype=torch.uint8), stub.stream()
    pending = (
        sender.broadcast(content, 0, stream) if call == "ncclBroadcast" else sender.all_reduce(torch.zeros(1), stream)
    )
    with pytest.raises(NcclError, match=rf"{call} at rank 0 of 2: not done within 0.3 s; NCCL {VERSION}.*libstub_nccl"):
        pending.wait()
    assert aborted(stub) == [0] and not sender.is_open and stream.query()
    with pytest.raises(NcclError, match="the communicator was aborted before"):
        sender.broadcast(content, 0, stream)
    with pytest.raises(NcclError, match="the communicator was aborted meanwhile"):
        pending.is_completed()
    peer.abort()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("error:ncclBroadcast:0:1", "ncclBroadcast at rank 0 of 2: unhandled system error"),
        ("refuse:ncclBroadcast:0:1", "ncclBroadcast at rank 0 of 2: invalid usage"),
        ("error:ncclAllReduce:0:1", "ncclAllReduce at rank 0 of 2: unhandled system error"),
        ("error:ncclCommInitRankConfig:0:1", "ncclCommInitRankConfig at rank 0 of 2: unhandled system error"),
        ("refuse:ncclCommInitRankConfig:0:1", "ncclCommInitRankConfig at rank 0 of 2: unhandled system error"),
    ],
)
def test_an_error(stub: Stub, monkeypatch: pytest.MonkeyPatch, fault: str, words: str) -> None:  # noqa: F811
    """Said at once or later by the library: the communicator is aborted either way, well before its deadline."""
    library, stream = Library(str(stub.path)), stub.stream()
    monkeypatch.setenv("STUB_NCCL_FAULT", fault)
    peers: list[Communicator] = []

    def act() -> None:
        unique_id = library.unique_id()
        sender = Communicator(library, unique_id, 0, 2, seconds=SECONDS, device=CPU)
        peers.append(Communicator(library, unique_id, 1, 2, seconds=SECONDS, device=CPU))
        finish(sender.joined, peers[0].joined)
        if "Broadcast" in fault:
            sender.broadcast(torch.zeros(10, dtype=torch.uint8), 0, stream).wait()
        else:
            sender.all_reduce(torch.zeros(1), stream).wait()

    with pytest.raises(NcclError, match=f"{words}.*NCCL {VERSION}"):
        act()
    made = not fault.startswith("refuse:ncclCommInit")  # what was never made is not aborted
    assert aborted(stub) == ([0] if made else [])
    for peer in peers:
        peer.abort()


def test_a_peer_that_dies(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    library = Library(str(stub.path))
    unique_id = library.unique_id()
    gc.collect()
    process = os.fork()
    if process == 0:
        try:
            os.environ["STUB_NCCL_FAULT"] = "die:ncclBroadcast:1:2"
            peer = Communicator(library, unique_id, 1, 2, seconds=SECONDS, device=CPU)
            peer.joined.wait()
            for _ in range(2):
                peer.broadcast(torch.zeros(10, dtype=torch.uint8), 0, stub.stream()).wait()
        finally:
            os._exit(1)
    sender = Communicator(library, unique_id, 0, 2, seconds=SECONDS, device=CPU)
    sender.joined.wait()
    content, stream = torch.arange(10, dtype=torch.uint8), stub.stream()
    sender.broadcast(content, 0, stream).wait()
    with pytest.raises(NcclError, match="ncclBroadcast at rank 0 of 2: remote process exited"):
        sender.broadcast(content, 0, stream).wait()
    assert aborted(stub) == [0]
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9


def test_a_library_that_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    missing = tmp_path / "libnccl.so.2"
    with pytest.raises(NcclError, match=f"NCCL cannot be loaded: {missing}.*rollout.vllm.nccl_library"):
        Library(str(missing))
    monkeypatch.setenv("VLLM_NCCL_SO_PATH", str(missing))
    with pytest.raises(NcclError, match=f"NCCL cannot be loaded: {missing}"):
        Library()
    with pytest.raises(NcclError, match=r"libc\.so\.6 has no ncclGetErrorString: NCCL 2\.14 or newer"):
        Library("libc.so.6")


def test_calls_that_would_block(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setenv("NCCL_COMM_BLOCKING", "1")
    with pytest.raises(NcclError, match="NCCL_COMM_BLOCKING=1 makes every call of NCCL wait without end"):
        Library(str(stub.path))


def test_no_interface_to_meet_at(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setenv("VLLM_NCCL_SO_PATH", str(stub.path))
    library = Library()
    monkeypatch.setenv("STUB_NCCL_FAULT", "refuse:ncclGetUniqueId:0:1")
    with pytest.raises(NcclError, match="ncclGetUniqueId: unhandled system error"):
        library.unique_id()
    with pytest.raises(ValueError, match="128 bytes, not 3"):
        Communicator(library, b"abc", 0, 2, seconds=SHORT, device=CPU)
