"""The files of one checkpoint: planned by all ranks together, then written by each on its own.

megatron-core can save asynchronously, but its writer starts a multiprocessing manager by `spawn` (which re-imports the
main module, seconds) and forks a process per file. Here torch's writer puts the same `torch_dist` files on disk, from a
thread when training is to go on: it spends its time in system calls, hashing and copies, which hold no interpreter
lock. Whatever needs another rank happens in `take`, before the thread starts, and in `seal`, after it has ended.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import _DistWrapper

from tulu_hpc.models.checksums import Entry, file_entry
from tulu_hpc.models.safetensors_files import sync_to_disk
from tulu_hpc.parallel.device import default_device
from tulu_hpc.parallel.layout import Groups

MANIFEST, TORCH_METADATA = "manifest.json", ".metadata"
FORMAT = 4
# Of torch.save around each tensor, and its lines in .metadata; 1,550 measured.
_RECORD_BYTES = 1600


class _Writer(torch_checkpoint.FileSystemWriter):
    """torch's writer without the random identity and the path that it notes down: equal states are equal files."""

    def __init__(self, directory: Path) -> None:
        super().__init__(str(directory), thread_count=1, sync_files=True, per_thread_copy_ahead=0)

    def storage_meta(self) -> None:
        return None


@dataclass
class Part:
    """What one rank has written. `failure` is (file, reason); the rest then does not count."""

    results: list[WriteResult] = field(default_factory=list)
    files: dict[str, Entry] = field(default_factory=dict)
    failure: tuple[str, str] | None = None


class Snapshot:
    """The state of a step on its way to `directory`, which exists and is empty.

    Attributes:
        bytes_here: what this rank will write, about.
        bytes_all: the same of all ranks.
    """

    def __init__(
        self, directory: Path, plan: SavePlan, source: Any, metadata: Metadata | None, plain: dict[str, bytes]
    ) -> None:
        self.directory, self._plan, self._source, self._metadata, self._plain = directory, plan, source, metadata, plain
        self._writer = _Writer(directory)
        self.bytes_here = sum(_size(item, source) for item in plan.items) + sum(map(len, plain.values()))
        self.bytes_all = self.bytes_here

    @classmethod
    def take(
        cls, state: dict[str, Any], directory: Path, plain: dict[str, bytes], groups: Groups, *, hold: bool
    ) -> Snapshot:
        """Agree on who writes what. Collective.

        Args:
            state: megatron's sharded state dict; emptied on the way.
            plain: further files (name -> content) that the main process writes.
            hold: copy the tensors that this rank writes to host memory, so that the state may change while they are
                written. Without it the state must stay as it is until `write` has returned.
        """
        sharded, common = save_preprocess(state)
        renamed, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, True)
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        writer, metadata = _Writer(directory), None

        def local() -> SavePlan:
            planner.set_up_planner(mcore_to_pyt_state_dict(renamed, False), is_coordinator=groups.is_main)
            return planner.create_local_plan()

        def whole(plans: list[SavePlan]) -> list[SavePlan]:
            nonlocal metadata
            plans, metadata = planner.create_global_plan(plans)
            return writer.prepare_global_plan(plans)

        wrapper = _DistWrapper(None, groups.world_size > 1, coordinator_rank=0)
        plan = planner.finish_plan(wrapper.reduce_scatter("plan", local, whole))
        content = {}
        if groups.is_main:
            config = json.dumps(asdict(CheckpointingConfig("torch_dist"))).encode()
            content = {COMMON_STATE_FNAME: _serialised(common), CONFIG_FNAME: config, **plain}
        snapshot = cls(directory, plan, _Held(planner, plan) if hold else planner, metadata, content)
        snapshot.bytes_all = sum(groups.all_gather_object(snapshot.bytes_here))
        return snapshot

    def write(self) -> Part:
        """Write and hash this rank's files; never raises, needs no other rank."""
        part, name = Part(), ""
        try:
            if self._plan.items:
                name = f"{self._plan.storage_data.prefix}0.distcp"
                part.results = self._writer.write_data(self._plan, self._source).value()
                part.files[name] = file_entry(self.directory / name)
            for name, content in self._plain.items():
                write_file(self.directory / name, content)
                part.files[name] = file_entry(self.directory / name)
        except Exception as error:  # reported to every rank, which decide together
            part.failure = (str(self.directory / name), reason(error))
        finally:
            self._source = None  # the copies are not needed any longer
        return part

    def seal(self, parts: list[Part]) -> dict[str, Entry]:
        """Write what describes the parts of all ranks, and see that it is on disk (main process).

        Returns:
            every file of the directory, for the manifest.

        Raises:
            OSError: with the file's name.
        """
        assert self._metadata is not None
        files = {name: entry for part in parts for name, entry in part.files.items()}
        with naming(self.directory / TORCH_METADATA):
            self._writer.finish(self._metadata, [part.results for part in parts])
        files[TORCH_METADATA] = file_entry(self.directory / TORCH_METADATA)
        sync_to_disk(self.directory)
        return files


def write_manifest(directory: Path, step: int, files: dict[str, Entry]) -> None:
    """Name every file below `directory` with size and hash, and see that it is on disk: from here on it is complete.

    Raises:
        OSError: with the file's name.
    """
    manifest = {"format": FORMAT, "step": step, "files": files}
    write_file(directory / MANIFEST, json.dumps(manifest, indent=1).encode())
    sync_to_disk(directory)


class _Held:
    """Copies of the data of a plan; answers torch's writer in the planner's place."""

    def __init__(self, planner: Any, plan: SavePlan) -> None:
        # On a GPU whatever is on the host was gathered for this checkpoint; on a CPU it may be the model itself.
        must_copy = default_device().type == "cpu"
        self._data: dict[MetadataIndex, Any] = {}
        for item in plan.items:
            data = planner.resolve_data(item)
            if item.type != WriteItemType.BYTE_IO:
                data = data.detach()
                data = data.clone(memory_format=torch.contiguous_format) if must_copy else data.cpu()
            self._data[item.index] = data

    def resolve_data(self, item: WriteItem) -> Any:
        return self._data[item.index]


def _size(item: WriteItem, source: Any) -> int:
    if item.tensor_data is None:
        return _RECORD_BYTES + int(source.resolve_data(item).getbuffer().nbytes)
    return _RECORD_BYTES + int(item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize)


def _serialised(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Give errors of the operating system the name of the file they belong to."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(file)) from error


def write_file(file: Path, content: bytes) -> None:
    """Write a file and see that it is on disk.

    Raises:
        OSError: with the file's name.
    """
    with naming(file), file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def reason(error: BaseException) -> str:
    """What the operating system said, also where another error (torch's writer raises its own) hides it."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.strerror:
            return seen.strerror
        seen = seen.__cause__ or seen.__context__
    return f"{type(error).__name__}: {error}"


def free_bytes(directory: Path) -> int:
    return shutil.disk_usage(directory).free
