"""Run in a process of its own with the stand-in on its path: megatron-core looks for Transformer Engine at import."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.models.reference import architecture, mixed_items, on_rank, ours, write_model
from tests.parallel.forked import run_forked
from tulu_hpc.data.packed_batch import pack
from tulu_hpc.models import build, convert
from tulu_hpc.models.build import build_model
from tulu_hpc.models.conversion import import_hf
from tulu_hpc.models.llama import Llama, score
from tulu_hpc.models.names import hf_shapes, merge_shards
from tulu_hpc.models.transformer_engine import LayerSpecError, TransformerEngineOptions
from tulu_hpc.parallel.layout import Layout, destroy, initialize, initialize_fake
from tulu_hpc.training.weights import load_pretrained

TE = TransformerEngineOptions()
SHAPE = architecture()


def step(chunk: Llama, layout: Layout, groups: Any) -> tuple[list[float], dict[str, Tensor]]:
    """Log-probs of a pack and gradients of this rank's parameters under their Hugging Face names (first of several)."""
    batch = on_rank(pack(mixed_items(), multiple=layout.row_multiple), SHAPE, groups)
    found = score(chunk, batch).logprobs_K
    found.square().sum().backward()
    grads = {mapped.hf_names: p.grad for _, p, mapped in convert._parameters([chunk], SHAPE)}
    whole = {}
    for _name, parameter, mapped in convert._parameters([chunk], SHAPE):
        grad = grads[mapped.hf_names]
        if getattr(parameter, "sequence_parallel", False) and layout.sequence_parallel:
            torch.distributed.all_reduce(grad, group=groups.pg.tp)
        shards = [grad]
        if layout.tensor > 1 and mapped.kind != "whole":
            shards = [torch.empty_like(grad) for _ in range(layout.tensor)]
            torch.distributed.all_gather(shards, grad.contiguous(), group=groups.pg.tp)
        whole.update(zip(mapped.hf_names, merge_shards(mapped, shards, SHAPE), strict=True))
    return found.tolist(), whole


def on_ranks(path: str, layout: Layout, options: TransformerEngineOptions | None) -> Any:
    groups = initialize(layout, seed=1)
    (chunk,) = ours(SHAPE, Path(path), groups, transformer_engine=options)
    names = [name for name, _ in chunk.named_parameters()]
    marked = [n for n, p in chunk.named_parameters() if getattr(p, "tensor_model_parallel", False)]
    extra = [name for name in chunk.state_dict() if "_extra_state" in name]
    stream = [(n, t) for n, t in convert.iter_hf_tensors([chunk], SHAPE, groups)]
    exact = all(t is None or torch.equal(t, convert.HfDirectory(path).read(n, (slice(None),))) for n, t in stream)
    logprobs, grads = step(chunk, layout, groups)
    return {
        "logprobs": logprobs,
        "grads": {name: grad.tolist() for name, grad in grads.items()},
        "names": names,
        "marked": marked,
        "extra": len(extra),
        "stream": [n for n, _ in stream],
        "exact": exact,
    }


def loaded_from(checkpoint: str, path: str, layout: Layout, options: TransformerEngineOptions | None) -> bool:
    """Whether a model that reads the checkpoint holds the tensors of the Hugging Face directory, bit by bit."""
    groups = initialize(layout, seed=1)
    chunks = build_model(SHAPE, groups, device="cpu", transformer_engine=options)
    load_pretrained(chunks, Path(checkpoint), SHAPE, groups)
    files = convert.HfDirectory(path)
    stream = convert.iter_hf_tensors(chunks, SHAPE, groups)
    return all(t is None or torch.equal(t, files.read(n, (slice(None),))) for n, t in stream)


def difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    worst = max(abs(x - y) for x, y in zip(a["logprobs"], b["logprobs"], strict=True))
    assert a["grads"].keys() == b["grads"].keys()
    for name, grad in a["grads"].items():
        one, two = torch.tensor(grad), torch.tensor(b["grads"][name])
        worst = max(worst, float((one - two).abs().max() / two.abs().max()))
    return worst


def main(folder: Path) -> None:
    path = str(write_model(SHAPE, folder / "model"))
    refused = ""
    try:
        build_model(SHAPE, initialize_fake(Layout(), rank=0, world_size=1), device="cpu", transformer_engine=TE)
    except LayerSpecError as error:
        refused = str(error)
    # Names and shapes of every rank of a split model, where nothing is computed.
    groups = initialize_fake(Layout(tensor=2, pipeline=2), rank=3, world_size=4)
    (last,) = build_model(SHAPE, groups, device="meta", dtype=torch.bfloat16, transformer_engine=TE)
    overlapped = build.transformer_config(
        SHAPE,
        Layout(tensor=2, sequence=True),
        dtype=torch.bfloat16,
        transformer_engine=TransformerEngineOptions("hybrid", "mxfp8", 64),
    )
    destroy()
    build.check_device = lambda device: None  # the stand-in runs on the CPU
    local = run_forked(1, on_ranks, path, Layout(), None)[0]
    one = run_forked(1, on_ranks, path, Layout(), TE)[0]
    two = run_forked(2, on_ranks, path, Layout(tensor=2, sequence=True), TE)[0]
    imported = str(folder / "imported")
    import_hf(Path(path), Path(imported))
    from_checkpoint = [
        run_forked(world, loaded_from, imported, path, layout, options)[0]
        for world, layout, options in ((1, Layout(), None), (2, Layout(tensor=2), TE))
    ]
    print(
        json.dumps(
            {
                "refused": refused,
                "hf_names": list(hf_shapes(SHAPE)),
                "names": one["names"],
                "marked": {"one": one["marked"], "two": two["marked"]},
                "extra": one["extra"],
                "stream": one["stream"],
                "stream_two": two["stream"],
                "from_checkpoint": from_checkpoint,
                "exact": [one["exact"], two["exact"]],
                "against_local": difference(one, local),
                "split": difference(two, local),
                "last_stage": [n for n, _ in last.named_parameters()],
                "marked_meta": [n for n, p in last.named_parameters() if getattr(p, "tensor_model_parallel", False)],
                "config": [overlapped.fp8, overlapped.fp8_recipe, overlapped.tp_comm_overlap],
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
