"""Streaming import and export of Hugging Face Llama directories at any tensor- and pipeline-parallel degree.

Import: every rank reads from the files only the slices that it holds. Export: one tensor at a time travels to global
rank 0. Both are exact: export of an import in the same dtype gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from tulu_hpc.config.architecture import Architecture
from tulu_hpc.models.build import check_layout, unwrap
from tulu_hpc.models.companions import copy_companions, write_config
from tulu_hpc.models.host_tensors import host_empty
from tulu_hpc.models.llama import Llama
from tulu_hpc.models.names import SCORE, Mapping, Merged, hf_shapes, mapping, merge_shards, read_local
from tulu_hpc.models.safetensors_files import HfDirectory, published, write_shards
from tulu_hpc.models.safetensors_layout import check_names
from tulu_hpc.models.scalar_head import Head, new_head_weight
from tulu_hpc.parallel.layout import Groups


@torch.no_grad()
def load_hf(
    chunks: Sequence[torch.nn.Module],
    path: str | Path,
    architecture: Architecture,
    groups: Groups,
    *,
    new_head_seed: int | None = None,
) -> None:
    """Fill the model chunks of this rank from a Hugging Face directory; vocabulary padding becomes zero.

    Args:
        chunks: from `build_model` (wrapped by megatron or not).
        path: directory with safetensors.
        new_head_seed: of a model with a scalar head: draw the head by this seed where the directory has none (a
            language model); None: it must have one.

    Raises:
        ValueError: a missing, unexpected or differently shaped tensor, named with the directory.
    """
    check_layout(architecture, groups.layout)
    directory = HfDirectory(path)
    head = unwrap(chunks[0]).head
    new_head = head == "value" and new_head_seed is not None and SCORE not in directory.file_of
    _check_tensors(directory, architecture, head, new_head=new_head)
    for name, parameter, mapped in _parameters(chunks, architecture):
        if new_head and mapped.hf_names == (SCORE,):
            parameter.copy_(new_head_weight(architecture.hidden_size, new_head_seed or 0))
            continue
        local = read_local(mapped, directory.read, parameter.shape, groups.tp_rank, groups.tp_size, architecture)
        if local.shape != parameter.shape:
            raise ValueError(f"{path}: {name} assembled as {tuple(local.shape)}, wanted {tuple(parameter.shape)}")
        parameter.copy_(local)
    directory.close()


def _check_tensors(directory: HfDirectory, architecture: Architecture, head: Head, *, new_head: bool) -> None:
    shapes = hf_shapes(architecture, head)
    if new_head:
        del shapes[SCORE]
    elif head == "value" and SCORE not in directory.file_of:
        raise ValueError(f"{directory.path}: has no {SCORE}: it is a language model, not a reward model")
    if head == "logprobs" and SCORE in directory.file_of:
        raise ValueError(f"{directory.path}: has {SCORE}: it is a reward model, not a language model")
    check_names(directory.path, directory.file_of, shapes, extra_head=architecture.tie_word_embeddings or new_head)
    for name, shape in shapes.items():
        if directory.shape(name) != shape:
            raise ValueError(f"{directory.path}: {name} has shape {directory.shape(name)}, config.json says {shape}")


def _parameters(
    chunks: Sequence[torch.nn.Module], architecture: Architecture
) -> Iterator[tuple[str, torch.nn.Parameter, Mapping]]:
    """Parameters of this rank with their Hugging Face mapping."""
    for chunk in chunks:
        model: Llama = unwrap(chunk)
        layers = model.decoder.layers
        offset = layers[0].layer_number - 1 if len(layers) else 0
        for name, parameter in model.named_parameters():
            yield name, parameter, mapping(name, offset, architecture)


def iter_hf_tensors(
    chunks: Sequence[torch.nn.Module], architecture: Architecture, groups: Groups
) -> Iterator[tuple[str, Tensor | None]]:
    """Stream the whole model under its Hugging Face names, in the order of `names.hf_shapes`.

    Collective: every rank of the job must exhaust the iterator. Only the replica that global rank 0 belongs to
    communicates.

    Yields:
        (name, tensor) with the tensor on the CPU, in the parameters' dtype, on global rank 0; None on all other ranks.
    """
    mine: dict[tuple[int, int], tuple[Tensor, Mapping]] = {}
    for _name, parameter, mapped in _parameters(chunks, architecture):
        tied_copy = architecture.tie_word_embeddings and mapped.order == (architecture.num_hidden_layers, 1)
        if not tied_copy:
            mine[mapped.order] = (parameter.detach(), mapped)
    in_replica = groups.dp_rank == 0 and groups.cp_rank == 0
    description = [(order, tuple(p.shape), p.dtype, mapped) for order, (p, mapped) in mine.items()]
    stages: list[Any] = [None] * groups.pp_size
    if groups.pp_size > 1:
        dist.all_gather_object(stages, description, group=groups.pg.pp)
    else:
        stages[0] = description
    every = sorted((entry[0], stage, entry[1:]) for stage, entries in enumerate(stages) for entry in entries)
    for order, stage, (shape, dtype, mapped) in every:
        tensors: list[Tensor] | None = None
        if in_replica:
            local = mine[order][0] if stage == groups.pp_rank else None
            tensors = _collect(local, stage, shape, dtype, mapped, architecture, groups)
        for index, name in enumerate(mapped.hf_names):
            yield name, None if tensors is None else tensors[index]


def _collect(
    local: Tensor | None,
    stage: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    mapped: Mapping,
    architecture: Architecture,
    groups: Groups,
) -> list[Tensor] | None:
    """Bring one parameter from pipeline stage `stage` to global rank 0, as Hugging Face tensors on the CPU."""
    size = groups.tp_size if mapped.kind != "whole" else 1
    tensor, pipeline = groups.pg.tp, groups.pg.pp
    on_gpu = dist.get_backend() == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    if groups.tp_rank != 0:
        if local is not None and size > 1:
            dist.send(local.contiguous(), dist.get_global_rank(tensor, 0), group=tensor)
        return None

    def receive(rank: int, into: Tensor) -> Tensor:
        """The shard of a tensor-parallel rank of the stage."""
        if local is None:
            dist.recv(into, dist.get_global_rank(pipeline, stage), group=pipeline)
        elif rank == 0:
            return local.contiguous()
        else:
            dist.recv(into, dist.get_global_rank(tensor, rank), group=tensor)
        return into

    if groups.pp_rank != 0 and local is None:
        return None
    buffer = _empty(shape, dtype, device)
    if groups.pp_rank != 0:
        for rank in range(size):
            dist.send(receive(rank, buffer), dist.get_global_rank(pipeline, 0), group=pipeline)
        return None
    # Merged on the host: the device holds one shard beside the model.
    if size == 1:
        return merge_shards(mapped, [receive(0, buffer).cpu()], architecture)
    merged = Merged(mapped, shape, dtype, size, architecture)
    for rank in range(size):
        place = None if on_gpu else merged.place(rank)
        shard = receive(rank, buffer if place is None else place)
        if shard is not place:
            merged.add(rank, shard.cpu())
    return merged.tensors


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor."""
    return host_empty(shape, dtype) if device.type == "cpu" else torch.empty(shape, dtype=dtype, device=device)


def save_hf(
    chunks: Sequence[torch.nn.Module],
    path: str | Path,
    architecture: Architecture,
    groups: Groups,
    *,
    source: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: float = 5e9,
    chat_template: str | None = None,
) -> None:
    """Write the model as a Hugging Face directory that transformers and inference engines load.

    Collective over the whole job; global rank 0 writes. One parameter at a time is gathered and written: beside the
    model rank 0 holds at most four times the largest parameter, any other rank twice. The directory appears, or
    replaces an older one, only when it is complete.

    Args:
        source: directory whose tokenizer, chat template and generation settings are copied.
        dtype: of the written weights; None: that of the model.
        max_shard_bytes: largest file, unless one tensor is larger.
        chat_template: Jinja text that takes the place of the source's; None: that of the source.

    Raises:
        RuntimeError: on every rank, when rank 0 could not write.
    """
    dtype = dtype or unwrap(chunks[0]).config.params_dtype
    stream = iter_hf_tensors(chunks, architecture, groups)
    failure = None
    if groups.is_main:
        try:
            with published(Path(path)) as staging:
                whole = ((name, tensor) for name, tensor in stream if tensor is not None)
                head = unwrap(chunks[0]).head
                write_shards(whole, staging, hf_shapes(architecture, head), dtype, max_shard_bytes)
                write_config(staging, architecture, dtype, source=Path(source), head=head)
                copy_companions(Path(source), staging)
                if chat_template is not None:
                    (staging / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
        except (OSError, SafetensorError, ValueError) as error:
            failure = f"{path}: export failed: {error}"
    for _ in stream:  # on other ranks the whole stream; on rank 0 what a failed write left, so that nobody waits
        pass
    failure = groups.broadcast_object(failure)
    if failure:
        raise RuntimeError(failure)
