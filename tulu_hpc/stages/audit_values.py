"""What an audit of a PPO file compares of its value model: a value per token, the value loss and its gradients.

Old values and returns are drawn around the true values, so that some values have moved beyond the clip range, and
neither of the two squared errors that the loss compares is close to the other.

Shapes: n tokens of an answer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from tulu_hpc.config.rlvr_sections import ValueSection
from tulu_hpc.config.schema import RlvrConfig
from tulu_hpc.data.packed_batch import Item
from tulu_hpc.diagnostics import hugging_face
from tulu_hpc.diagnostics.certificate import Check
from tulu_hpc.diagnostics.hugging_face import Answers, ItemLoss
from tulu_hpc.models.names import SCORE
from tulu_hpc.parallel.device import default_device
from tulu_hpc.stages.audit_model import AuditedModel, Tolerances, compared, drawn_head, one_batch, shared_truth
from tulu_hpc.stages.rlvr_values import open_value_model, value_loss_of
from tulu_hpc.stages.training_run import Run
from tulu_hpc.training.normalisation import global_counts

_OUTSIDE = 0.25  # share of the values beyond the clip range


@dataclass(frozen=True)
class Distances:
    """Per answer [n]: how far the old values and the returns are below the true values."""

    to_old: list[Tensor]
    to_return: list[Tensor]


def value_checks(run: Run, config: RlvrConfig, items: Sequence[Item], pad_id: int, allowed: Tolerances) -> list[Check]:
    """Every check of the value model on the answers of the policy's audit. Collective, complete on global rank 0.

    Raises:
        ConfigError, LayoutError, ValueError: as when training opens it.
    """
    section = config.value
    assert section is not None
    model = open_value_model(run, config, total_steps=1)
    architecture, path = model.trainer.architecture, section.model.path
    drawn = drawn_head(path, architecture.hidden_size, config.run.seed) if section.new_head else {}
    distances = {item.id: draw_distances(section, item, config.run.seed) for item in items}
    loss = value_loss(section, items, distances)
    truth = shared_truth(
        run.groups,
        lambda: hugging_face.compute(
            Path(path), items, loss, default_device(), scores=True, new_score=drawn.get(SCORE)
        ),
    )
    known = [_with_columns(item, distances[item.id], truth.logprobs) for item in items]
    parallel, groups = section.parallel or config.parallel, model.place.groups
    with model.place.active():
        data = one_batch(known, config, parallel, groups, architecture, pad_id)
        audited = AuditedModel(model.trainer, path, "values", drawn, prefix="value model ")
        loss_fn = value_loss_of(section, global_counts(data.packs, groups))
        return compared(audited, data, truth, loss_fn, allowed)


def draw_distances(section: ValueSection, item: Item, seed: int) -> Distances:
    """Of one item, the same in every process."""
    generator = random.Random(f"{seed} {item.id}")
    limit = 1.0 if section.clip is None else section.clip

    def to_old() -> float:
        if generator.random() >= _OUTSIDE:
            return generator.uniform(-0.5, 0.5) * limit
        return generator.choice((-1.5, 1.5)) * limit

    def to_return() -> float:  # further than a clipped value can come near
        return generator.choice((-1.0, 1.0)) * generator.uniform(1, 2) * max(limit, 1.0)

    sizes = [len(response) for response in item.responses]
    return Distances(
        [torch.tensor([to_old() for _ in range(size)]) for size in sizes],
        [torch.tensor([to_return() for _ in range(size)]) for size in sizes],
    )


def value_loss(section: ValueSection, items: Sequence[Item], distances: dict[str, Distances]) -> ItemLoss:
    """The clipped squared error over 2 of all tokens, mean, times `value.coef`, written out in fp64.

    As OpenAI baselines' ppo2 and open-instruct have it: the larger of the error of the value and of the value held
    within `value.clip` of the old one.
    """
    tokens = sum(len(response) for item in items for response in item.responses)

    def loss(item: Item, answers: Answers) -> Tensor:
        total = answers.logprobs[0].new_zeros((), dtype=torch.float64)
        for index, values in enumerate(answers.logprobs):
            old, returns = (
                (values.detach().cpu() - drawn[index]).to(values.device).double()
                for drawn in (distances[item.id].to_old, distances[item.id].to_return)
            )
            now = values.double()
            errors = (now - returns).square()
            if section.clip is not None:
                held = old + (now - old).clamp(-section.clip, section.clip)
                errors = torch.maximum(errors, (held - returns).square())
            total = total + errors.sum() / 2
        return section.coef * total / tokens

    return loss


def _with_columns(item: Item, distances: Distances, values: dict[hugging_face.Place, Tensor]) -> Item:
    """The item with the columns that training would have."""
    true = [values[item.id, index] for index in range(len(item.responses))]
    columns = {
        "old_values": [value - drawn for value, drawn in zip(true, distances.to_old, strict=True)],
        "returns": [value - drawn for value, drawn in zip(true, distances.to_return, strict=True)],
    }
    return replace(item, per_sequence={"answer": item.per_sequence["answer"]}, per_target=columns)
