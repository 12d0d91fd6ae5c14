"""Our side of an audit: a parallel, packed model beside the truth, stage by stage.

Shapes: T rows of this rank, K targets of a pack, L layers, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from torch import Tensor

from tulu_hpc.data.packed_batch import PackedBatch
from tulu_hpc.diagnostics.certificate import Difference
from tulu_hpc.diagnostics.hugging_face import Place, Truth, probes
from tulu_hpc.models.build import unwrap
from tulu_hpc.models.safetensors_files import HfDirectory
from tulu_hpc.parallel.context import RankBatch
from tulu_hpc.parallel.layout import Groups

Worst = dict[int, tuple[float, float]]  # stage of the model -> (largest difference, largest value)


def stage_name(stage: int, layers: int) -> str:
    """0 is the embedding, 1..L the layers, L + 1 the final norm."""
    if stage == 0:
        return "model.embed_tokens"
    return "model.norm" if stage == layers + 1 else f"model.layers.{stage - 1}"


def places(pack: PackedBatch) -> list[Place]:
    """(item id, response) of each sequence of a pack. Parts of a group that was split have the column `answer`."""
    if "answer" in pack.per_sequence:
        numbers = pack.per_sequence["answer"].long().tolist()
        return [
            (pack.item_ids[index], number)
            for index, number in zip(pack.per_sequence["item"].tolist(), numbers, strict=True)
        ]
    found: list[Place] = []
    for index in pack.per_sequence["item"].tolist():
        name = pack.item_ids[index]
        found.append((name, sum(each[0] == name for each in found)))
    return found


def targets_of(pack: PackedBatch) -> list[list[int]]:
    """Indices into the target table of each sequence."""
    found: list[list[int]] = [[] for _ in range(pack.num_sequences)]
    for k, sequence in enumerate(pack.sequence_id_K.tolist()):
        found[sequence].append(k)
    return found


@contextmanager
def captured(chunks: Sequence[torch.nn.Module], layers: int) -> Iterator[dict[int, list[Tensor]]]:
    """Outputs of this rank's stages of the model, one entry per micro-batch in order, while the block runs."""
    outputs: dict[int, list[Tensor]] = {}
    handles = []

    def hook(stage: int) -> Any:
        def keep(_module: Any, _inputs: Any, output: Any) -> None:
            outputs.setdefault(stage, []).append((output[0] if isinstance(output, tuple) else output).detach())

        return keep

    for chunk in chunks:
        model = unwrap(chunk)
        if model.pre_process:
            handles.append(model.embedding.register_forward_hook(hook(0)))
        for layer in model.decoder.layers:
            handles.append(layer.register_forward_hook(hook(layer.layer_number)))
        if model.post_process and model.decoder.final_layernorm is not None:
            handles.append(model.decoder.final_layernorm.register_forward_hook(hook(layers + 1)))
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def hidden_differences(
    outputs: Mapping[int, Sequence[Tensor]],
    batches: Sequence[RankBatch],
    truth: Truth,
    groups: Groups,
    *,
    layers: int,
    sequence_parallel: bool,
) -> list[Difference]:
    """max|d| / max|truth| of every stage of the model over the probed tokens of all samples. Collective."""
    mine: Worst = {}
    for stage, per_batch in outputs.items():
        for batch, output_T1H in zip(batches, per_batch, strict=True):
            # As many rows as the plan has: after the gather they are this context-parallel rank's.
            if sequence_parallel:
                output_T1H = tensor_parallel.gather_from_sequence_parallel_region(output_T1H, group=groups.pg.tp)
            _compare_hidden(mine, stage, output_T1H[:, 0].float().cpu(), batch, truth)
    worst: Worst = {}
    for share in groups.all_gather_object(mine):
        for stage, (difference, scale) in share.items():
            old = worst.get(stage, (0.0, 0.0))
            worst[stage] = _larger(old[0], difference), _larger(old[1], scale)
    return [
        Difference(stage_name(stage, layers), difference / max(scale, 1e-30))
        for stage, (difference, scale) in sorted(worst.items())
    ]


def _compare_hidden(worst: Worst, stage: int, rows_TH: Tensor, batch: RankBatch, truth: Truth) -> None:
    assert batch.params.row_K is not None
    kept = batch.keep_K.cpu()
    local = (kept.cumsum(0) - 1).tolist()  # index among this rank's targets
    row_K = batch.params.row_K.cpu()
    pack = batch.batch.to("cpu")
    for place, targets in zip(places(pack), targets_of(pack), strict=True):
        known = truth.hidden[place]
        for probe, index in enumerate(probes(len(targets))):
            k = targets[index]
            if not bool(kept[k]):
                continue
            wanted_H = known[stage, probe]
            difference = float((rows_TH[int(row_K[local[k]])] - wanted_H).abs().max())
            old = worst.get(stage, (0.0, 0.0))
            worst[stage] = _larger(old[0], difference), _larger(old[1], float(wanted_H.abs().max()))


def logprob_differences(
    packs: Sequence[PackedBatch], logprobs: Sequence[Tensor], truth: Truth, groups: Groups
) -> list[Difference]:
    """Largest |d| of each response of all samples, in the order of `truth`. Collective.

    A response without exactly the expected number of scored tokens counts as infinitely far.
    """
    mine: dict[Place, float] = {}
    for pack, logprobs_K in zip(packs, logprobs, strict=True):
        for place, targets in zip(places(pack), targets_of(pack), strict=True):
            wanted, found = truth.logprobs[place], logprobs_K.float().cpu()[targets]
            same = found.shape == wanted.shape
            mine[place] = float((found - wanted).abs().max()) if same else math.inf
    merged: dict[Place, float] = {}
    for share in groups.all_gather_object(mine):
        for place, value in share.items():
            merged[place] = _larger(merged.get(place, 0.0), value)
    return [
        Difference(f"sample {place[0]}, response {place[1]}", merged.get(place, math.inf)) for place in truth.logprobs
    ]


def weight_differences(
    stream: Iterator[tuple[str, Tensor | None]], path: str, drawn: Mapping[str, Tensor] | None = None
) -> list[Difference]:
    """Largest |d| between each tensor that training holds and the file it came from, rounded to the same dtype.

    Args:
        drawn: tensors that no file has.

    Collective; complete on global rank 0, empty elsewhere.
    """
    directory = HfDirectory(path)
    found = []
    for name, tensor in stream:
        if tensor is not None:
            if drawn and name in drawn:
                stored = drawn[name]
            else:
                stored = directory.read(name, tuple(slice(0, size) for size in directory.shape(name)))
            found.append(Difference(name, float((tensor.float() - stored.to(tensor.dtype).float()).abs().max())))
    directory.close()
    return found


def gradient_differences(
    stream: Iterator[tuple[str, Tensor | None]], truth: Truth, *, measure: str
) -> tuple[list[Difference], str]:
    """Difference of every tensor's gradient, and a remark on the common factor if there is one.

    Args:
        measure: "max": max|d| / max|truth|; "norm": |d| / |truth| in the 2-norm.

    Collective; complete on global rank 0, empty elsewhere.
    """
    found, factors = [], []
    for name, tensor in stream:
        if tensor is None:
            continue
        wanted, given = truth.gradients[name].double(), tensor.double()
        delta = given - wanted
        if measure == "max":
            value = float(delta.abs().max()) / max(float(wanted.abs().max()), 1e-30)
        else:
            value = float(delta.norm()) / max(float(wanted.norm()), 1e-30)
        found.append(Difference(name, value))
        factors.append(float((given * wanted).sum() / wanted.square().sum().clamp(min=1e-60)))
    return found, _common_factor(factors)


def _common_factor(factors: Sequence[float]) -> str:
    if not factors or any(math.isnan(factor) for factor in factors):
        return ""
    low, high = min(factors), max(factors)
    if abs(low - 1) > 0.01 and abs(high - low) <= 0.01 * abs(low):
        return f"every gradient is {low:.4g} times the true one: a wrong divisor or scale of the loss"
    return ""


@contextmanager
def gradients_as_parameters(chunks: Sequence[Any], groups: Groups) -> Iterator[None]:
    """While the block runs, the parameters' values are their reduced gradients (fp32), so that they can be exported."""
    for chunk in chunks:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            for bucket in buffer.buckets:
                group = groups.pg.dp_cp
                if chunk.ddp_config.use_distributed_optimizer and group.size() > 1:
                    shard = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                    dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)
    parameters: list[Any] = [p for chunk in chunks for p in chunk.module.parameters()]
    kept = [p.data for p in parameters]
    for p in parameters:
        # A view of another dtype cannot be assigned; the export only reads shape and values.
        p.data = p.main_grad.view_as(p).to(p.dtype) if p.dtype != p.main_grad.dtype else p.main_grad.view_as(p)
    try:
        yield
    finally:
        for p, data in zip(parameters, kept, strict=True):
            p.data = data


def _larger(a: float, b: float) -> float:
    """The larger one; NaN wins, so that it is never lost."""
    return a if math.isnan(a) or (not math.isnan(b) and a >= b) else b
