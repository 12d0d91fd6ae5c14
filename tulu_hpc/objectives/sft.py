"""Supervised fine-tuning: negative log-likelihood of the trained tokens. Shapes: K scored tokens of this rank."""

from __future__ import annotations

from torch import Tensor

from tulu_hpc.objectives.terms import Terms


def sft_terms(logprobs_K: Tensor, *, divisor: float) -> Terms:
    """Sum of token losses over `divisor`.

    Two presets differ in the divisor only: a constant (Tulu 3 section 4.3.2: the sum over the global batch, divided by
    the number of sequences of a batch, so that every token weighs the same in every batch) and the number of trained
    tokens of the global batch (token mean).

    Metrics: `loss`, the mean over trained tokens, comparable between batches and presets.

    Raises:
        ValueError: the divisor is not positive.
    """
    if not divisor > 0:
        raise ValueError(f"SFT loss: divisor {divisor} is not positive; the global batch has no trained token")
    total = -logprobs_K.sum()
    return Terms(loss=total / divisor, metrics={"loss": (total.detach(), float(logprobs_K.numel()))})
