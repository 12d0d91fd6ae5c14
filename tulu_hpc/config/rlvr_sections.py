"""Sections of reinforcement learning beside `rlvr` itself."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from tulu_hpc.config.layer_spec import check_layer_spec
from tulu_hpc.config.sections import ModelSection, OptimizerSection, ParallelSection, Section


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
