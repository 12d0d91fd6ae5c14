"""Builds `stub_nccl.cpp`, a library of NCCL's interface for the CPU, and speaks to what is not NCCL's in it."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_suffix(".cpp")
VERSION = "2.29.7"


class StubStream:
    """In the place of a `torch.cuda.Stream`."""

    def __init__(self, path: str | Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.stub_stream_new.restype = ctypes.c_void_p
        self._library.stub_stream_query.argtypes = [ctypes.c_void_p]
        self._library.stub_stream_synchronize.argtypes = [ctypes.c_void_p]
        self.cuda_stream = int(self._library.stub_stream_new())

    def query(self) -> bool:
        return bool(self._library.stub_stream_query(self.cuda_stream))

    def synchronize(self) -> None:
        self._library.stub_stream_synchronize(self.cuda_stream)


class Stub:
    """The built library; ranks meet in `folder`."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.path, self.folder = path, folder

    def stream(self) -> StubStream:
        return StubStream(self.path)

    def calls(self, name: str = "") -> list[list[str]]:
        """Name, rank and arguments of all calls so far, of every process, or of those of this name."""
        file = self.folder / "calls"
        lines = file.read_text().splitlines() if file.exists() else []
        return [line.split() for line in lines if not name or line.split()[0] == name]

    def forget(self) -> None:
        (self.folder / "calls").unlink(missing_ok=True)


@functools.cache
def built(folder: Path) -> Path:
    """The library, in a folder of this session."""
    target = folder / "libstub_nccl.so"
    compiler = os.environ.get("CXX", (sysconfig.get_config_var("CXX") or "c++").split()[0])
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread"]
    subprocess.run([compiler, *flags, str(SOURCE), "-o", str(target)], check=True, timeout=120)
    return target


@pytest.fixture(scope="session")
def stub_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.getbasetemp())


@pytest.fixture
def stub(stub_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    folder = tmp_path / "nccl"
    folder.mkdir()
    monkeypatch.setenv("STUB_NCCL_FOLDER", str(folder))
    monkeypatch.delenv("STUB_NCCL_FAULT", raising=False)
    yield Stub(stub_library, folder)
