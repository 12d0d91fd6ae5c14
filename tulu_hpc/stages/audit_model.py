"""One model of an audit beside its truth: all that is compared, in the order in which a fault shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from tulu_hpc.config.architecture import Architecture
from tulu_hpc.config.sections import ParallelSection
from tulu_hpc.config.verbs import TrainingConfig
from tulu_hpc.data.loader import ItemLoader, StepData
from tulu_hpc.data.packed_batch import Item
from tulu_hpc.diagnostics import compare
from tulu_hpc.diagnostics.certificate import Check, Difference
from tulu_hpc.diagnostics.hugging_face import Truth
from tulu_hpc.models.convert import iter_hf_tensors
from tulu_hpc.models.names import SCORE
from tulu_hpc.models.safetensors_files import HfDirectory
from tulu_hpc.models.scalar_head import new_head_weight
from tulu_hpc.objectives.terms import Terms
from tulu_hpc.parallel.device import default_device
from tulu_hpc.parallel.layout import Groups
from tulu_hpc.stages.training_run import item_cost
from tulu_hpc.training.runner import LossFn, row_multiple
from tulu_hpc.training.trainer import Trainer


@dataclass(frozen=True)
class Tolerances:
    """Largest differences that pass; Hugging Face always runs in fp32.

    hidden: of max|truth| per stage. logprobs: absolute, nats. loss: relative. gradients: per tensor, relative.
    gradient_measure: "max" or "norm" (`compare.gradient_differences`).
    """

    hidden: float
    logprobs: float
    loss: float
    gradients: float
    gradient_measure: str


# fp32: rounding through a few dozen layers, a hundred times less than the smallest fault. bf16: 8 bits per number,
# random in sign, so that norms say more than extremes.
TOLERANCES = {
    "float32": Tolerances(hidden=1e-4, logprobs=2e-4, loss=1e-5, gradients=2e-4, gradient_measure="max"),
    "bfloat16": Tolerances(hidden=6e-2, logprobs=0.5, loss=2e-2, gradients=0.1, gradient_measure="norm"),
}


@dataclass(frozen=True)
class AuditedModel:
    """A model as training holds it, and where it comes from.

    Attributes:
        path: of its Hugging Face directory.
        answer: what it says about a response: log-probs of its tokens, its score, or a value per token.
        drawn: tensors that training draws because `path` lacks them.
        prefix: of the names of its checks.
    """

    trainer: Trainer
    path: str
    answer: Literal["logprobs", "scores", "values"] = "logprobs"
    drawn: Mapping[str, Tensor] = field(default_factory=dict)
    prefix: str = ""


def shared_truth(groups: Groups, compute: Callable[[], Truth]) -> Truth:
    """Computed by global rank 0; the others get all but the gradients."""
    truth = compute() if groups.is_main else None
    shared = groups.broadcast_object(None if truth is None else replace(truth, gradients={}))
    assert isinstance(shared, Truth)
    return truth or shared


def drawn_head(path: str, hidden_size: int, seed: int) -> dict[str, Tensor]:
    """The scalar head that training draws by the seed where the directory has none."""
    directory = HfDirectory(path)
    has_head = SCORE in directory.file_of
    directory.close()
    return {} if has_head else {SCORE: new_head_weight(hidden_size, seed)}


def one_batch(
    items: Sequence[Item],
    config: TrainingConfig,
    parallel: ParallelSection,
    groups: Groups,
    architecture: Architecture,
    pad_id: int,
) -> StepData:
    """All samples as one global batch, packed and dealt as training would."""
    return ItemLoader(
        list(items),
        global_batch_size=len(items),
        seed=config.run.seed,
        steps=1,
        shuffle=False,
        dp_rank=groups.dp_rank,
        dp_size=groups.dp_size,
        pack_rows=config.train.pack_rows,
        multiple=row_multiple(groups.layout, parallel.context_split),
        share=config.train.prefix_sharing,
        pad_id=pad_id,
        cost=item_cost(architecture, share=config.train.prefix_sharing),
    ).next_step()


def compared(
    model: AuditedModel,
    data: StepData,
    truth: Truth,
    loss_fn: LossFn,
    allowed: Tolerances,
    *,
    whole_on_every_context_rank: bool = False,
) -> list[Check]:
    """Every check. Complete on global rank 0. Collective.

    Args:
        whole_on_every_context_rank: the loss; otherwise each context-parallel rank has a part of it.
    """
    trainer = model.trainer
    groups, architecture = trainer.groups, trainer.architecture
    stored = iter_hf_tensors(trainer.models, architecture, groups)
    weights = compare.weight_differences(stored, model.path, model.drawn)
    layers = architecture.num_hidden_layers
    with compare.captured(trainer.models, layers) as outputs:
        runner = trainer.runner
        answers = runner.logprobs(data.packs) if model.answer == "logprobs" else runner.values(data.packs)
    batches = trainer.runner.prepare(data.packs)
    hidden = compare.hidden_differences(
        outputs,
        batches,
        truth,
        groups,
        layers=layers,
        sequence_parallel=groups.layout.sequence_parallel,
    )
    answered = compare.logprob_differences(data.packs, answers, truth, groups)
    trainer.zero_grad()
    terms = trainer.runner.forward_backward(batches, loss_fn)
    loss = global_loss(groups, terms, whole_on_every_context_rank=whole_on_every_context_rank)
    with compare.gradients_as_parameters(trainer.chunks, groups):
        stream = iter_hf_tensors(trainer.models, architecture, groups)
        gradients, remark = compare.gradient_differences(stream, truth, measure=allowed.gradient_measure)
    relative = abs(loss - truth.loss) / max(abs(truth.loss), 1e-30)
    measure = "max|d| / max|truth|" if allowed.gradient_measure == "max" else "|d| / |truth|"
    unit = ", nats" if model.answer == "logprobs" else ""
    loss_differences = [Difference(f"the batch ({loss:.6g})", relative)]
    return [
        Check(f"{model.prefix}weights", "max|d|", 0.0, weights),
        Check(f"{model.prefix}hidden", "max|d| / max|truth|", allowed.hidden, hidden),
        Check(f"{model.prefix}{model.answer}", f"max|d|{unit}", allowed.logprobs, answered),
        Check(f"{model.prefix}loss", "|d| / |truth|", allowed.loss, loss_differences, remark),
        Check(f"{model.prefix}gradients", measure, allowed.gradients, gradients, remark),
    ]


def global_loss(groups: Groups, terms: Sequence[Terms], *, whole_on_every_context_rank: bool) -> float:
    """Sum over micro-batches and ranks of what each contributes to the loss."""
    counts = groups.is_last_stage and groups.tp_rank == 0 and (groups.cp_rank == 0 or not whole_on_every_context_rank)
    mine = sum(float(each.loss) for each in terms) if counts else 0.0
    total = torch.tensor(mine, dtype=torch.float64, device=default_device())
    if groups.world_size > 1:
        dist.all_reduce(total)
    return float(total)
