"""Random draws of everything that must not change training, and the training that they are compared with.

A draw: process layout, stage split, sequence parallelism, context split, optimizer sharding, overlap, buckets,
recompute, precision, packing (order, rows, number of micro-batches and their ranks), prefix sharing, objective,
optimizer, model.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.training import tiny
from tulu_hpc.config.sections import OptimizerSection, ParallelSection
from tulu_hpc.data.packed_batch import Item, PackedBatch, TokenSequence, pack, rows_of
from tulu_hpc.models.build import check_layout
from tulu_hpc.models.llama import TokenLogprobs
from tulu_hpc.objectives.preference import preference_terms
from tulu_hpc.objectives.terms import Terms, own_targets, sequence_lengths
from tulu_hpc.parallel.context import RankBatch
from tulu_hpc.parallel.layout import Groups, LayoutError, initialize, layout_of
from tulu_hpc.training.runner import LossFn, row_multiple
from tulu_hpc.training.step import train_step

STEPS = 3
# Six layers: 2 x 3, 3 x 2, uneven stages, and with embedding and head counted eight places.
SHAPES = {
    tied: tiny.ARCHITECTURE.model_copy(update={"num_hidden_layers": 6, "tie_word_embeddings": tied})
    for tied in (False, True)
}
OPTIMIZERS = {
    "adamw": OptimizerSection(lr=1e-3, weight_decay=0.1, clip_grad=0.5),
    "sgd": OptimizerSection(kind="sgd", lr=0.1, momentum=0.9, weight_decay=0.1, clip_grad=0.5),
}


@dataclass(frozen=True)
class Draw:
    """One case. `parallel` holds the keys of ParallelSection, `packing_seed` decides the packs and who gets them."""

    world: int
    parallel: tuple[tuple[str, Any], ...] = ()
    recompute: str = "none"
    dtype: str = "float32"
    gradient_dtype: str = "float32"
    objective: str = "sft"
    optimizer: str = "adamw"
    tied: bool = False
    share: bool = True
    strategy: str | None = None
    pack_rows: int = 1
    packing_seed: int | None = None

    @property
    def section(self) -> ParallelSection:
        return ParallelSection(**dict(self.parallel))

    @property
    def reference(self) -> Draw:
        """The same training in one process: fp32, an item per micro-batch, in order, prompts repeated."""
        return Draw(1, objective=self.objective, optimizer=self.optimizer, tied=self.tied, share=False)

    def features(self) -> set[str]:
        """What this draw exercises, by name."""
        parallel = self.section
        data = self.world // parallel.model_parallel
        several = data * parallel.context > 1
        found = {
            self.objective, self.optimizer, self.dtype, f"recompute {self.recompute}", f"{self.world} processes",
            "tied" if self.tied else "untied", "shared prompts" if self.share else "repeated prompts",
        }  # fmt: skip
        present = {
            "tp": parallel.tensor > 1 and not parallel.sequence_parallel,
            "tp sp": parallel.tensor > 1 and parallel.sequence_parallel,
            "pp": parallel.pipeline > 1,
            "vpp": parallel.virtual_pipeline is not None,
            "uneven stages": bool(parallel.first_stage_layers or parallel.last_stage_layers),
            "embedding or head counted": parallel.account_for_embedding_in_pipeline_split
            or parallel.account_for_loss_in_pipeline_split,
            "cp": parallel.context > 1,
            f"{parallel.context_split} split": parallel.context > 1,
            "dp": data > 1,
            "sharded optimizer": parallel.distributed_optimizer and several,
            "replicated optimizer": not parallel.distributed_optimizer and several,
            "bfloat16 gradients": self.gradient_dtype == "bfloat16",
            "overlapped reduction": parallel.overlap_grad_reduce and several,
            "overlapped gather": parallel.overlap_param_gather and several,
            "many buckets": parallel.gradient_bucket_size is not None and several,
            "tied over stages": self.tied and parallel.pipeline > 1,
            "dpo over cp": self.objective == "dpo" and parallel.context > 1,
        }
        return found | {name for name, there in present.items() if there}


def all_features(worlds: Sequence[int]) -> set[str]:
    """Every name that `Draw.features` can give."""
    names = (
        "sft dpo adamw sgd float32 bfloat16 tied untied tp pp vpp cp dp|recompute none|recompute selective|"
        "recompute full|shared prompts|repeated prompts|tp sp|uneven stages|embedding or head counted|greedy split|"
        "contiguous split|zigzag split|sharded optimizer|replicated optimizer|bfloat16 gradients|overlapped reduction|"
        "overlapped gather|many buckets|tied over stages|dpo over cp"
    )
    first, *rest = names.split("|")
    return {*first.split(), *rest, *(f"{world} processes" for world in worlds)}


def draw(rng: random.Random, worlds: Sequence[int]) -> Draw:
    """A random case that the configuration accepts."""
    while True:
        try:
            found = _draw(rng, rng.choice(worlds))
            check_layout(SHAPES[found.tied], layout_of(found.section))
            return found
        except (LayoutError, ValueError):  # pydantic's error is a ValueError
            continue


def _draw(rng: random.Random, world: int) -> Draw:
    tensor = rng.choice([n for n in (1, 2) if world % n == 0])
    pipeline = rng.choice([n for n in (1, 2, 3, 4) if world // tensor % n == 0])
    context = rng.choice([n for n in (1, 2, 3, 4) if world // (tensor * pipeline) % n == 0])
    overlap = rng.random() < 0.5
    distributed = rng.random() < 0.7
    options: dict[str, Any] = {
        "tensor": tensor,
        "pipeline": pipeline,
        "context": context,
        "sequence": rng.random() < 0.6,
        "context_split": rng.choice(["greedy", "contiguous", "zigzag"]),
        "distributed_optimizer": distributed,
        "overlap_grad_reduce": overlap,
        "overlap_param_gather": overlap and distributed and rng.random() < 0.6,
        "gradient_bucket_size": rng.choice([2000, 5000, 20000]) if overlap and rng.random() < 0.7 else None,
    }
    if pipeline > 1:
        options["virtual_pipeline"] = rng.choice([None, 2, 3])
        split = rng.choice(["even", "uneven", "counted"])
        if split == "uneven":
            options["first_stage_layers"] = rng.choice([None, 1, 2, 3, 4])
            options["last_stage_layers"] = rng.choice([None, 1, 2, 3, 4])
        elif split == "counted":
            options["account_for_embedding_in_pipeline_split"] = rng.random() < 0.7
            options["account_for_loss_in_pipeline_split"] = rng.random() < 0.7
    low = rng.random() < 0.25
    return Draw(
        world,
        tuple((key, value) for key, value in options.items() if value is not None),
        recompute=rng.choice(["none", "selective", "full"]),
        dtype="bfloat16" if low else "float32",
        gradient_dtype=rng.choice(["float32", "bfloat16"]) if low else "float32",
        objective=rng.choice(["sft", "dpo"]),
        optimizer=rng.choice(sorted(OPTIMIZERS)),
        tied=rng.random() < 0.5,
        share=rng.random() < 0.6,
        strategy=rng.choice([None, "repeat", "merge"]),
        pack_rows=rng.choice([48, 96, 200, 1000]),
        packing_seed=rng.randrange(10**6),
    )


def draws(seed: int, count: int, worlds: Sequence[int]) -> list[Draw]:
    """At least `count` draws that have every feature between them: while one is missing, the best of 30 is taken."""
    rng = random.Random(seed)
    missing, taken = all_features(worlds), []
    while missing or len(taken) < count:
        candidates = [draw(rng, worlds) for _ in range(30 if missing else 1)]
        best = max(candidates, key=lambda each: len(each.features() & missing))
        missing -= best.features()
        taken.append(best)
    return taken


def items_of(objective: str, step: int) -> list[Item]:
    """The global batch; among the sequences one with nothing but its last token trained, after a long prompt."""
    if objective == "dpo":
        return tiny.make_items("p" * 7, seed=100 + step)
    tokens = torch.randint(1, tiny.ARCHITECTURE.vocab_size, (40,), generator=torch.Generator().manual_seed(step))
    late = Item("sequence", [TokenSequence(tokens, torch.arange(40) == 39)], id="late")
    return [*tiny.make_items("s" * 9, seed=100 + step), late]


def loss_of(objective: str, groups: Groups, items: Sequence[Item]) -> LossFn:
    """SFT by token mean or DPO, over the counts of the global batch `items`."""
    cp_group = groups.pg.cp if groups.cp_size > 1 else None
    if objective == "sft":
        return tiny.sft_only(float(sum(tiny.targets_of(item) for item in items)))

    def loss(output: TokenLogprobs, batch: RankBatch) -> Terms:
        whole = batch.batch
        return preference_terms(
            output.logprobs_K,
            sequence_id_K=own_targets(whole.sequence_id_K, batch),
            pairs_P2=whole.pairs_P2,
            reference_sums_Q=whole.per_sequence.get("reference_logprobs", output.logprobs_K.new_zeros(0)),
            lengths_Q=sequence_lengths(whole.sequence_id_K, whole.num_sequences),
            global_pairs=len(items),
            kind="dpo_norm",
            beta=2.0,
            cp_group=cp_group,
        )

    return loss


def deal(draw: Draw, items: Sequence[Item], groups: Groups, step: int) -> list[PackedBatch]:
    """The packs of this data-parallel rank: items in random order fill packs, which go to random ranks, some to none.

    The late one (`items_of`) has a pack of its own every other time.
    """
    order = list(items)
    rng = random.Random(f"{draw.packing_seed}/{step}")
    if draw.packing_seed is not None:
        rng.shuffle(order)
    bins: list[list[Item]] = []
    room = 0
    for item in order:
        alone = item.id == "late" and rng.random() < 0.5
        rows = rows_of(item, draw.share)
        if alone or rows > room:
            bins.append([])
            room = draw.pack_rows
        bins[-1].append(item)
        room = 0 if alone else room - rows
    multiple = row_multiple(groups.layout, draw.section.context_split)
    owners = [rng.randrange(groups.dp_size) for _ in bins]
    return [
        pack(chosen, share=draw.share, multiple=multiple)
        for chosen, owner in zip(bins, owners, strict=True)
        if owner == groups.dp_rank
    ]


def train(draw: Draw, models: dict[bool, Path]) -> dict[str, Any]:
    """STEPS optimizer steps; losses and norms of each, gradients of the first, weights after the last.

    Also what happened on this rank: `packs` per step, and whether it was ever `unscored`: had rows of a pack with
    targets, but none of the targets.
    """
    parallel = draw.section
    groups = initialize(layout_of(parallel), seed=1)
    section = OPTIMIZERS[draw.optimizer].model_copy(update={"gradient_dtype": draw.gradient_dtype})
    trainer = tiny.make_trainer(
        models[draw.tied],
        groups,
        parallel,
        recompute=draw.recompute,
        optimizer=section,
        dtype=draw.dtype,
        strategy=draw.strategy,
    )
    result: dict[str, Any] = {"losses": [], "norms": [], "gradients": {}, "packs": [], "unscored": False}
    for step in range(STEPS):
        items = items_of(draw.objective, step)
        packs, loss = deal(draw, items, groups, step), loss_of(draw.objective, groups, items)
        batches = trainer.runner.prepare(packs)
        result["unscored"] |= any(each.batch.num_targets and not each.target_K.numel() for each in batches)
        if step == 0:
            trainer.zero_grad()
            trainer.runner.forward_backward(batches, loss)
            result["gradients"] = tiny.gradients(trainer)
        outcome = train_step(trainer, packs, loss)
        result["losses"].append(outcome.loss)
        result["norms"].append(outcome.grad_norm)
        result["packs"].append(len(packs))
    trainer.synchronise_parameters()
    result["weights"] = tiny.weights(trainer)
    return result


def train_all(cases: Sequence[Draw], models: dict[bool, Path]) -> list[dict[str, Any]]:
    """Every case in one world of processes, forked once."""
    return [_named(case, models) for case in cases]


def _named(case: Draw, models: dict[bool, Path]) -> dict[str, Any]:
    try:
        return train(case, models)
    except Exception as error:
        raise AssertionError(f"failed: {case}") from error
    finally:
        gc.collect()  # the trainer is a cycle, and holds process groups


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, float]:
    """Largest differences: of loss and gradient norm over the three steps, relative; of the first step's gradients,
    max|d| / max|g| of each tensor, in bf16, where single numbers are noise, |d| / |g| in the 2-norm; of the last
    weights, absolute, beyond rounding where they are bf16."""
    largest = {
        what: max(abs(a - b) / abs(b) for a, b in zip(found[what], wanted[what], strict=True))
        for what in ("losses", "norms")
    }
    low = any(tensor.dtype == torch.bfloat16 for tensor in found["gradients"].values())
    if found["gradients"]:  # on global rank 0
        measure = _by_norm if low else partial(tiny.largest_difference, relative=True)
        largest["gradients"] = measure(found["gradients"], wanted["gradients"])
    assert found["weights"].keys() == wanted["weights"].keys()
    largest["weights"] = max(_beyond_rounding(found["weights"][k], w) for k, w in wanted["weights"].items())
    return largest


def _by_norm(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """max over tensors of |d| / |wanted|."""
    assert found.keys() == wanted.keys()
    return max(float((found[name].double() - g.double()).norm() / g.double().norm()) for name, g in wanted.items())


def _beyond_rounding(found: Tensor, wanted: Tensor) -> float:
    rounding = 2**-8 * wanted.abs() if found.dtype == torch.bfloat16 else 0.0
    return max(0.0, float(((found.float() - wanted).abs() - rounding).max()))
