"""The sections `rlvr`: policy loss, and what a step samples and learns from; `async`; `value`: PPO's value model."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from tulu_hpc.config.layer_spec import check_layer_spec
from tulu_hpc.config.sections import ModelSection, OptimizerSection, ParallelSection, Section

PolicyKind = Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "ppo"]
AdvantageKind = Literal["standard", "centered", "leave_one_out"]
Normalisation = Literal["token_mean", "sequence_mean", "sequence_sum", "constant"]

# What a key is when it is not given, where this depends on the kind. Sources: docs/policy.md.
KIND_DEFAULTS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "dr_grpo": {"advantage": "centered", "normalisation": "constant", "kl_coef": 0.0},
    "dapo": {"clip_high": 0.28, "kl_coef": 0.0, "dynamic_sampling": True},
    "gspo": {"clip_low": 3e-4, "clip_high": 4e-4, "normalisation": "sequence_mean", "kl_coef": 0.0},
    "cispo": {"clip_low": 1.0, "clip_high": 4.0, "kl_coef": 0.0},
    "rloo": {"advantage": "leave_one_out", "normalisation": "sequence_sum"},
}


class RlvrSection(Section):
    """Defaults are those of grpo; the other kinds' are in docs/policy.md."""

    kind: PolicyKind = Field(
        default="grpo",
        description="Formulas, sources and defaults: docs/policy.md; `ppo`: advantages per token, see `value`.",
    )
    prompts_per_step: int = Field(ge=1)
    samples_per_prompt: int = Field(ge=1, description="At least 2 where answers are compared (all kinds but ppo).")
    epochs: int = Field(default=1, ge=1, description="Passes over the samples of one step.")
    minibatches: int = Field(default=1, ge=1, description="Optimizer steps per pass.")
    clip_low: float = Field(default=0.2, ge=0, le=1, description="The ratio is clipped below 1 - clip_low.")
    clip_high: float = Field(default=0.2, ge=0, description="The ratio is clipped above 1 + clip_high.")
    dual_clip: float | None = Field(
        default=None, gt=1, description="Bound of the ratio where the advantage is negative; empty: none."
    )
    kl_coef: float = Field(default=0.01, ge=0, description="0: no reference is loaded.")
    kl_kind: Literal["k1", "k2", "k3"] = "k3"
    kl_in: Literal["loss", "reward"] = Field(
        default="loss", description="`reward` (ppo): subtracted from the reward of each token, without gradient."
    )
    old_logprobs: Literal["engine", "trainer"] = Field(
        default="engine",
        description="Denominator of the ratio (and the policy of kl_in: reward): log-probs that the engine sampled "
        "with, or the trainer's, computed before the first update of a step (always with importance weights).",
    )
    advantage: AdvantageKind = Field(
        default="standard",
        description="(r - mean) / (std + 1e-8) of the group, r - mean, or r - mean of the others.",
    )
    normalisation: Normalisation = Field(
        default="token_mean",
        description="Mean over tokens; mean over sequences of their means, their sums, or their sums over "
        "rollout.max_new_tokens (constant).",
    )
    verification_reward: float = 10.0
    no_eos_penalty: float = Field(
        default=0.0, description="Reward of a completion without end-of-text; 0: it scores 0."
    )
    overlong_buffer: int = Field(
        default=0,
        ge=0,
        description="The last tokens before rollout.max_new_tokens over which an answer's reward falls; 0: none.",
    )
    overlong_penalty: float | None = Field(
        default=None,
        gt=0,
        description="What an answer of rollout.max_new_tokens loses; empty: verification_reward.",
    )
    dynamic_sampling: bool = Field(
        default=False, description="Replace groups whose verified rewards are all equal by new prompts."
    )
    max_extra_rounds: int = Field(
        default=10, ge=1, description="Of dynamic sampling in one step: how often missing groups are asked for again."
    )
    incomplete_step: Literal["error", "train"] = Field(
        default="error", description="When groups are still missing then: stop, or train on those that there are."
    )
    importance: Literal["none", "token", "sequence", "geometric"] = Field(
        default="none",
        description="Weight for what separates the trainer before its first update from the policy that sampled: of "
        "the token, of the sequence (product over its tokens), or the geometric mean of these.",
    )
    importance_mode: Literal["truncate", "mask"] = Field(
        default="truncate", description="Weights above importance_cap become it, or weights out of bounds become 0."
    )
    importance_cap: float | None = Field(default=None, gt=0, description="Largest weight; empty: 2.")
    importance_low: float | None = Field(default=None, ge=0, description="Of `mask`: smallest weight; empty: 0.5.")

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_kind(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        kind = values.get("kind", "grpo")
        return {**(KIND_DEFAULTS.get(kind, {}) if isinstance(kind, str) else {}), **values}

    @model_validator(mode="after")
    def _fits_the_kind(self) -> Self:
        kind = self.kind
        if kind == "ppo" and self.advantage != "standard":
            raise ValueError(f"advantage: {self.advantage} compares answers of a group; ppo has a value model for that")
        if kind == "ppo" and self.dynamic_sampling:
            raise ValueError("dynamic_sampling replaces groups that teach nothing; under ppo every answer teaches")
        if kind != "ppo" and self.samples_per_prompt < 2:
            raise ValueError(f"{kind} compares the answers to a prompt: samples_per_prompt must be at least 2")
        if kind != "ppo" and self.kl_in == "reward":
            raise ValueError(f"kl_in: reward is for ppo; {kind} has one reward per answer")
        if kind == "dr_grpo" and self.advantage == "standard":
            raise ValueError("kind dr_grpo does not divide by the standard deviation: advantage standard is not for it")
        if kind == "dr_grpo" and self.normalisation != "constant":
            raise ValueError(f"kind dr_grpo divides by a constant: normalisation {self.normalisation} is not for it")
        if kind == "rloo" and self.advantage != "leave_one_out":
            raise ValueError(f"kind rloo has the baseline leave_one_out: advantage {self.advantage} is not for it")
        if kind == "dapo" and self.normalisation != "token_mean":
            raise ValueError(f"kind dapo is a mean over tokens: normalisation {self.normalisation} is not for it")
        if kind == "dapo" and self.clip_high < self.clip_low:
            raise ValueError(f"kind dapo clips higher: clip_high {self.clip_high} is below clip_low {self.clip_low}")
        if kind == "cispo" and self.dual_clip is not None:
            raise ValueError("kind cispo bounds the ratio for every advantage: dual_clip is not for it")
        return self

    @model_validator(mode="after")
    def _importance(self) -> Self:
        if self.importance == "none" and (self.importance_cap, self.importance_low) != (None, None):
            raise ValueError("importance_cap and importance_low need importance: token, sequence or geometric")
        if self.importance == "none" and self.importance_mode != "truncate":
            raise ValueError("importance_mode needs importance: token, sequence or geometric")
        if self.importance_mode == "truncate" and self.importance_low is not None:
            raise ValueError("importance_low is of importance_mode: mask")
        low, cap = self.importance_bounds
        if low > cap:
            raise ValueError(f"importance_low {low:g} is above importance_cap {cap:g}")
        return self

    @model_validator(mode="after")
    def _overlong(self) -> Self:
        if self.overlong_penalty is not None and not self.overlong_buffer:
            raise ValueError("overlong_penalty needs overlong_buffer")
        return self

    @property
    def uses_own_logprobs(self) -> bool:
        """The trainer's log-probs before the first update are needed."""
        return self.old_logprobs == "trainer" or self.importance != "none"

    @property
    def importance_bounds(self) -> tuple[float, float]:
        """Smallest (of `mask`) and largest importance weight."""
        return (
            0.5 if self.importance_low is None else self.importance_low,
            2.0 if self.importance_cap is None else self.importance_cap,
        )


class AsyncSection(Section):
    """Rollouts of later steps while a step trains: docs/asynchrony.md."""

    max_staleness: int = Field(
        default=0,
        ge=0,
        le=32,
        description="Rollout steps that a sample may be older than the weights it trains; 0: synchronous, 1: Tulu 3.",
    )
    update: Literal["boundary", "in_flight"] = Field(
        default="boundary",
        description="The engine gets new weights when it has answered everything, or while it answers: requests are "
        "frozen, and go on under the new weights.",
    )

    @model_validator(mode="after")
    def _is_asynchronous(self) -> Self:
        if self.update == "in_flight" and self.max_staleness == 0:
            raise ValueError("update in_flight needs max_staleness of at least 1: nothing is in flight otherwise")
        return self


class ValueSection(Section):
    """PPO's value model: a model of its own with a scalar head, optimizer and layout."""

    model: ModelSection = Field(description="A reward model (the export of `rm`); it may be smaller than the policy.")
    new_head: bool = Field(
        default=False, description="Draw the scalar head by run.seed where model.path is a language model."
    )
    parallel: ParallelSection | None = Field(
        default=None, description="Layout of the value model over the same processes; empty: that of the policy."
    )
    optimizer: OptimizerSection = Field(description="As of the policy; one step after each of the policy's.")
    recompute: Literal["none", "selective", "full"] = "none"
    gamma: float = Field(default=1.0, ge=0, le=1, description="Discount per token.")
    lam: float = Field(default=0.95, ge=0, le=1, description="Of generalised advantage estimation.")
    whiten: bool = Field(default=True, description="Advantages of a whole step to mean 0 and deviation 1.")
    coef: float = Field(default=0.1, gt=0, description="Of the value loss; matters beside clip_grad and eps only.")
    clip: float | None = Field(
        default=0.2, gt=0, description="How far a value may move from the old one in the loss; empty: no limit."
    )

    @model_validator(mode="after")
    def _scalar_head(self) -> Self:
        if self.model.fp32_head:
            raise ValueError("model.fp32_head is of the vocabulary's head; a scalar head computes in fp32 anyway")
        if self.parallel is not None and self.parallel.tp_comm_overlap:
            raise ValueError("parallel.tp_comm_overlap has buffers for one model per process, which are the policy's")
        check_layer_spec(self.model, self.parallel or ParallelSection(), decodes=False)
        return self
