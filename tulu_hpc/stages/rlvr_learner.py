"""What one process holds for reinforcement learning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tulu_hpc.config.schema import RlvrConfig
from tulu_hpc.data.datasets import Prompt
from tulu_hpc.parallel.second_layout import SecondLayout
from tulu_hpc.rollout.embedded import EmbeddedEngine
from tulu_hpc.rollout.engine import Sampling
from tulu_hpc.stages.rlvr_throughput import RolloutThroughput
from tulu_hpc.stages.served import ServedEngine
from tulu_hpc.stages.training_run import Run
from tulu_hpc.training.partner import Partner
from tulu_hpc.training.runner import Runner
from tulu_hpc.training.trainer import Trainer
from tulu_hpc.verifiers.sandbox import VerifierPool

_KEPT_VERSIONS = 64  # no sample may be older than this many steps


@dataclass
class ValueModel:
    """PPO's value model; everything that touches `trainer` happens inside `place.active()`."""

    trainer: Trainer
    place: SecondLayout

    @property
    def partner(self) -> Partner:
        """Its part of a checkpoint."""
        return Partner("value", self.trainer, self.place.active)


@dataclass
class Learner:
    """What one process needs for a rollout step.

    Attributes:
        reference: None when kl_coef is 0.
        position: in the stream of prompts: those before it belong to earlier steps.
        versions: of the trainer's weights at the start of the last rollout steps, ascending.
        value: None without ppo.
        throughput: times the model phases of a step.
    """

    run: Run
    config: RlvrConfig
    trainer: Trainer
    reference: Runner | None
    engine: EmbeddedEngine | ServedEngine
    pool: VerifierPool | None  # on the leader of the replica
    prompts: list[Prompt]
    sampling: Sampling
    tokenizer: Any
    pad_id: int
    throughput: RolloutThroughput
    position: int = 0
    versions: list[int] = field(default_factory=list)
    value: ValueModel | None = None

    def begin_step(self) -> None:
        """Note the weights that a step starts with."""
        if self.versions[-1:] != [self.trainer.step]:
            self.versions = [*self.versions[1 - _KEPT_VERSIONS :], self.trainer.step]

    @property
    def partners(self) -> list[Partner]:
        """What is saved with the policy."""
        return [] if self.value is None else [self.value.partner]
