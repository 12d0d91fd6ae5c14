"""What an audit of an rlvr file compares: the policy loss of answers to the file's prompts.

The answers are pieces of the data's own text and their old log-probs, advantages and reference log-probs are drawn, so
that neither an engine nor a verifier takes part, and no ratio is 1 where a fault would change nothing. Some ratios are
inside the clip range and some outside, none so close to its ends that rounding could decide on which side it is.

Shapes: n tokens of an answer.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tulu_hpc.config.loader import ConfigError
from tulu_hpc.config.rlvr_sections import RlvrSection
from tulu_hpc.config.schema import RlvrConfig
from tulu_hpc.data.packed_batch import Item, TokenSequence
from tulu_hpc.diagnostics.hugging_face import Answers, ItemLoss, Truth
from tulu_hpc.stages.rlvr import check as check_settings
from tulu_hpc.stages.rollouts import load_prompts

_ANSWERS = 4  # to a prompt, at most
_OUTSIDE = 0.25  # share of the ratios that are clipped
_LOG_RATIO, _LOG_IMPORTANCE, _TO_REFERENCE = "log_ratio", "log_importance", "to_reference"  # drawn, per token


def check(config: RlvrConfig, dtype: str) -> None:
    """Refuse what cannot be compared.

    Raises:
        ConfigError: naming the keys.
    """
    check_settings(config)
    if config.rlvr.kind == "gspo" and dtype == "bfloat16":
        raise ConfigError(
            f"rlvr.kind is gspo: its clip range ({config.rlvr.clip_low:g}, {config.rlvr.clip_high:g}) is narrower than "
            "bf16 rounds a mean log-prob; audit with --dtype float32"
        )


def sample_answers(
    config: RlvrConfig, tokenizer: Any, rows: int, max_tokens: int, say: Callable[[str], None]
) -> list[Item]:
    """Groups of answers to a seeded choice of prompts; prompt and answer have `max_tokens` tokens together at most.

    Raises:
        ConfigError, RecordError, ValueError: as when training reads the prompts.
    """
    short = config.data.model_copy(update={"max_length": min(config.data.max_length, max_tokens - 1)})
    prompts = load_prompts(short, config.verifier, tokenizer, say)
    generator = random.Random(config.run.seed)
    text = [token for prompt in prompts for token in prompt.token_ids]
    items = []
    for number, index in enumerate(generator.sample(range(len(prompts)), min(rows, len(prompts)))):
        prompt = prompts[index]
        longest = min(config.rollout.max_new_tokens, max_tokens - len(prompt.token_ids), len(text))
        responses = []
        for _ in range(min(config.rlvr.samples_per_prompt, _ANSWERS)):
            size = generator.randint(1, longest)
            start = generator.randint(0, len(text) - size)
            responses.append(TokenSequence(torch.tensor(text[start : start + size])))
        sizes = [len(each) for each in responses]
        # Of both signs, but not 0 on average: the loss of the batch must not be what a cancellation leaves.
        advantages = [[generator.gauss(0.5, 1) for _ in range(size)] for size in sizes]
        per_token = {"advantages": [torch.tensor(each) for each in advantages]}
        by_token = config.rlvr.kind == "ppo"
        items.append(
            Item(
                "group",
                responses,
                prompt=torch.tensor(prompt.token_ids),
                per_sequence={
                    "answer": [float(each) for each in range(len(sizes))],
                    **({} if by_token else {"advantage": [each[0] for each in advantages]}),
                },
                per_target={
                    _LOG_RATIO: [_log_ratios(config.rlvr, size, generator) for size in sizes],
                    _LOG_IMPORTANCE: [_uniform(size, 0.3, generator) for size in sizes],
                    _TO_REFERENCE: [_uniform(size, 0.5, generator) for size in sizes],
                    **(per_token if by_token else {}),
                },
                id=f"{number} ({prompt.record.id})",
                source=prompt.record.source,
            )
        )
    return items


def _uniform(size: int, most: float, generator: random.Random) -> Tensor:
    return torch.tensor([generator.uniform(-most, most) for _ in range(size)])


def _log_ratios(rlvr: RlvrSection, size: int, generator: random.Random) -> Tensor:
    """[n] log-ratios, of gspo with their mean, at some distance from the ends of the clip range."""
    low = math.log(1 - rlvr.clip_low) if rlvr.clip_low < 1 else -math.inf
    high = math.log(1 + rlvr.clip_high)
    inside = 0.25 * min(-low, high)

    def draw() -> float:
        if generator.random() >= _OUTSIDE:
            return generator.uniform(-inside, inside)
        return low - 0.5 if low > -math.inf and generator.random() < 0.5 else high + 0.5

    if rlvr.kind != "gspo":
        return torch.tensor([draw() for _ in range(size)])
    around = _uniform(size, 0.1, generator)
    return draw() + around - around.mean()


def with_logprobs(config: RlvrConfig, items: Sequence[Item], truth: Truth) -> list[Item]:
    """The items with the columns that training would have: log-probs of the engine, the reference and itself."""
    found = []
    for item in items:
        logprobs = [truth.logprobs[item.id, index] for index in range(len(item.responses))]
        found.append(replace(item, per_target={**item.per_target, **_columns(config.rlvr, item, logprobs)}))
    return found


def _columns(rlvr: RlvrSection, item: Item, logprobs: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """Log-probs [n] of each answer at the drawn distances from the true ones."""

    def beside(name: str, around: Sequence[Tensor]) -> list[Tensor]:
        return [each - drawn for each, drawn in zip(around, item.per_target[name], strict=True)]

    old = beside(_LOG_RATIO, logprobs)
    columns = {"behaviour_logprobs": old}
    if rlvr.uses_own_logprobs:
        columns = {"old_logprobs": old, "behaviour_logprobs": beside(_LOG_IMPORTANCE, old)}
    if rlvr.kl_coef > 0:
        columns["reference_logprobs"] = beside(_TO_REFERENCE, logprobs)
    return columns


def policy_loss(config: RlvrConfig, items: Sequence[Item]) -> ItemLoss:
    """The configured policy loss over all items, written out in fp64; formulas and sources: docs/policy.md."""
    rlvr = config.rlvr
    tokens = sum(len(response) for item in items for response in item.responses)
    count = tokens if rlvr.normalisation == "token_mean" else sum(len(item.responses) for item in items)

    def loss(item: Item, answers: Answers) -> Tensor:
        known = _columns(rlvr, item, [each.detach().cpu() for each in answers.logprobs])
        total = answers.logprobs[0].new_zeros((), dtype=torch.float64)
        for index, logprobs in enumerate(answers.logprobs):
            columns = {name: column[index].to(logprobs.device).double() for name, column in known.items()}
            if rlvr.kind == "ppo":
                advantages = item.per_target["advantages"][index].to(logprobs.device).double()
            else:
                advantages = torch.full_like(logprobs, item.per_sequence["advantage"][index], dtype=torch.float64)
            losses = token_losses(rlvr, logprobs.double(), advantages, **columns)
            divisor = {"sequence_mean": len(losses), "constant": config.rollout.max_new_tokens}
            total = total + losses.sum() / divisor.get(rlvr.normalisation, 1) / count
        return total

    return loss


def token_losses(
    rlvr: RlvrSection,
    logprobs: Tensor,
    advantages: Tensor,
    behaviour_logprobs: Tensor,
    old_logprobs: Tensor | None = None,
    reference_logprobs: Tensor | None = None,
) -> Tensor:
    """[n] losses of the tokens of one answer, before normalisation; fp64, differentiable in `logprobs`."""
    old = behaviour_logprobs if old_logprobs is None else old_logprobs
    log_ratio = logprobs - old
    ratio = (log_ratio.mean().expand_as(log_ratio) if rlvr.kind == "gspo" else log_ratio).exp()
    clipped = ratio.clamp(1 - rlvr.clip_low, 1 + rlvr.clip_high)
    if rlvr.kind == "cispo":
        losses = -advantages * clipped.detach() * logprobs
    else:
        losses = torch.maximum(-advantages * ratio, -advantages * clipped)
        if rlvr.dual_clip is not None:
            losses = torch.where(advantages < 0, losses.clamp(max=-advantages * rlvr.dual_clip), losses)
    if rlvr.importance != "none":
        losses = losses * _importance(rlvr, old - behaviour_logprobs)
    if reference_logprobs is not None and rlvr.kl_in == "loss":
        difference = logprobs - reference_logprobs
        estimates = {"k1": difference, "k2": difference**2 / 2, "k3": (-difference).exp() - 1 + difference}
        losses = losses + rlvr.kl_coef * estimates[rlvr.kl_kind]
    return losses


def _importance(rlvr: RlvrSection, log_weight: Tensor) -> Tensor:
    """[n] importance weights after truncation or masking."""
    if rlvr.importance != "token":
        one = log_weight.sum() if rlvr.importance == "sequence" else log_weight.mean()
        log_weight = one.expand_as(log_weight)
    weight, (low, cap) = log_weight.exp(), rlvr.importance_bounds
    if rlvr.importance_mode == "truncate":
        return weight.clamp(max=cap)
    return torch.where((weight < low) | (weight > cap), 0.0, weight)
