"""The losses of an audit's truth: of one sample at a time, from the log-probs that Hugging Face gives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tulu_hpc.config.schema import DpoConfig, SftConfig
from tulu_hpc.data.datasets import LABEL, WEIGHT
from tulu_hpc.data.packed_batch import Item
from tulu_hpc.diagnostics import hugging_face
from tulu_hpc.diagnostics.hugging_face import Answers, ItemLoss
from tulu_hpc.kernels import preference_loss
from tulu_hpc.stages import dpo
from tulu_hpc.training import reference


def sft_loss(config: SftConfig, items: Sequence[Item]) -> ItemLoss:
    """Negative log-likelihood over the configured divisor."""
    if config.sft.normalisation == "token_mean":
        divisor = float(sum(len(hugging_face.scored_positions(item, 0)) for item in items))
    else:
        divisor = float(config.sft.sum_divisor or config.train.global_batch_size or 0)

    def loss(item: Item, answers: Answers) -> Tensor:
        return -answers.logprobs[0].sum() / divisor

    return loss


def pair_loss(config: DpoConfig, items: Sequence[Item]) -> ItemLoss:
    """The specification of the configured loss (`kernels.preference_loss`, reference backend, fp64) over all items."""

    def loss(item: Item, answers: Answers) -> Tensor:
        flat_K = torch.cat(list(answers.logprobs)).double()
        sizes = torch.tensor([len(each) for each in answers.logprobs], device=flat_K.device)
        sequence_K = torch.arange(len(sizes), device=flat_K.device).repeat_interleave(sizes)
        sums_Q = torch.tensor(item.per_sequence[reference.COLUMN], dtype=torch.float32, device=flat_K.device)
        sides = [0, 1]
        if config.dpo.records == "labels":
            sides = [0, -1] if item.per_sequence[LABEL] == [1.0] else [-1, 0]
        weights_P = alignment_sums_Q = None
        if config.dpo.weight_field is not None:
            weights_P = torch.tensor(item.per_sequence[WEIGHT][:1], dtype=torch.float32, device=flat_K.device)
        if config.dpo.wpo_alignment:
            alignment_sums_Q = torch.stack([each.double().sum() for each in answers.alignments])
        out = preference_loss(
            flat_K,
            sequence_K,
            sums_Q,
            torch.tensor([sides], device=flat_K.device),
            beta=config.dpo.beta,
            weights_P=weights_P,
            alignment_sums_Q=alignment_sums_Q,
            backend="reference",
            **dpo.loss_options(config),
        )
        return out.loss / len(items)

    return loss


def score_loss(items: Sequence[Item]) -> ItemLoss:
    """Bradley-Terry: -log(1 / (1 + exp(rejected - chosen))), mean over the pairs, in fp64 [2203.02155 eq. 1]."""

    def loss(item: Item, answers: Answers) -> Tensor:
        chosen, rejected = (each.double().sum() for each in answers.logprobs)
        return torch.log1p(torch.exp(rejected - chosen)) / len(items)

    return loss
