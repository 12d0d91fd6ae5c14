"""TRL's GRPOTrainer as a contestant. Its answers are given to it; everything after generation is its own.

Two updates per batch of samples (`num_iterations` 2): TRL then computes the samples' log-probs before the first one,
and the loss of the second one depends on what the first one did.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from common import GROUP, UPDATES_PER_BATCH, Spec, answers_of, read_rows, rewards_of
from torch import Tensor, nn
from trl_side import load, train, training_arguments
from turns import Turn


def grpo_worker(spec: Spec, turn: Turn) -> None:
    """Token mean over the batch, rewards less their group's mean, no KL; TRL reads text, as in the DPO comparison."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    rows = read_rows(spec)
    model, tokenizer = load(spec)
    words = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    answers = {tuple(row["prompt"]): answers_of(row) for row in rows}

    class Grpo(GRPOTrainer):
        loss_sum, rows, tokens, logprob_sum = 0.0, 0, 0, 0.0

        def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> tuple[Any, None]:
            return [answers[tuple(ids)][place % GROUP] for place, ids in enumerate(prompt_ids)], None

        def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
            found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
            self._latest = found[0].detach()
            return found

        def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
            mask = inputs["completion_mask"]
            self.rows += inputs["prompt_ids"].numel() + mask.numel()
            self.tokens += int(mask.sum())
            loss: Tensor = super()._compute_loss(model, inputs)
            self.logprob_sum += float((self._latest * mask).sum())
            return loss

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            loss: Tensor = super().training_step(*args, **kwargs)
            self.loss_sum += float(loss)
            return loss

        def take(self) -> dict[str, Any]:
            found = {"loss": self.loss_sum, "rows": self.rows, "tokens": self.tokens}
            found["logprob"] = self.logprob_sum / self.tokens
            self.loss_sum, self.rows, self.tokens, self.logprob_sum = 0.0, 0, 0, 0.0
            return found

    def fixed_rewards(completion_ids: list[list[int]], scores: list[list[float]], **others: Any) -> list[float]:
        return [each[place % GROUP] for place, each in enumerate(scores)]

    dataset = Dataset.from_dict(
        {
            "prompt": [" ".join(words[i] for i in row["prompt"]) for row in rows],
            "scores": [rewards_of(row) for row in rows],
        }
    )
    values = training_arguments(replace(spec, global_batch=spec.global_batch * GROUP))
    del values["max_length"]
    values |= {
        "num_generations": GROUP,
        "num_iterations": UPDATES_PER_BATCH,
        "max_completion_length": max(len(ids) for each in answers.values() for ids in each),
        "beta": 0.0,
        "epsilon": 0.2,
        "loss_type": "dapo",
        "scale_rewards": "none",
        "shuffle_dataset": False,
    }
    trainer = Grpo(
        model=model,
        reward_funcs=fixed_rewards,
        args=GRPOConfig(**values),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    torch.manual_seed(0)
    train(trainer, turn)
